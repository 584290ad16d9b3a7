"""What is wrong or wasteful about the weights and biases of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.qdq import Grid, bias_ratio, dequantize_before, grid_of, limits
from onnxq.analysis.rules import BIAS_TOLERANCE
from onnxq.model import Model, producer
from onnxq.ops import channel_axis

__all__ = ["EXACT", "INT32", "Fault", "LayerGrids", "layer_faults", "layer_grids"]

Severity = Literal["error", "warning", "note"]
# Scales that differ by no more than this share are one scale, rounded in other ways.
EXACT = 1e-5
# An int32 bias beyond this leaves less than half of the accumulator to the products.
LARGE_BIAS = 2**30
INT32, INT16 = 2**31 - 1, 2**15 - 1


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong or wasteful.

    Args:
        code: What it is, in a word.
        severity: ``error``: other numbers come out, or none; ``warning``: slow, or a risk;
            ``note``: wasteful.
        node: The node concerned.
        what: In one sentence.
        mend: What to do about it, in another.
    """

    code: str
    severity: Severity
    node: str
    what: str
    mend: str


@dataclass(frozen=True)
class LayerGrids:
    """The grids around a Conv or Gemm.

    Args:
        x: Of what it reads.
        weight: Of its weight.
        bias: Of its bias; None if it has none in integers.
        integers: The integers of its weight; None if they are not constant.
        biases: Those of its bias.
        axis: The axis of the weight along which its output channels run.
    """

    x: Grid | None
    weight: Grid | None
    bias: Grid | None
    integers: np.ndarray | None
    biases: np.ndarray | None
    axis: int

    @property
    def bias_scale(self) -> np.ndarray | None:
        """The scale that the bias should have, s_x * s_w, float64; None where it is not known."""
        if self.x is None or self.weight is None or self.weight.scale is None:
            return None
        if self.x.point is None or self.weight.block:
            return None
        product: np.ndarray = self.x.point[0] * self.weight.scale.reshape(-1).astype(np.float64)
        return product


def layer_grids(model: Model, node: gs.Node) -> LayerGrids:
    """The grids around a Conv, ConvTranspose, Gemm or MatMul."""
    x, weight = (dequantize_before(t) for t in node.inputs[:2])
    third = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    bias = None if third is None else dequantize_before(third)
    integers = None if weight is None else _constant(model, weight.inputs[0])
    shape = () if integers is None else integers.shape
    return LayerGrids(
        x=None if x is None else grid_of(model, x),
        weight=None if weight is None else grid_of(model, weight),
        bias=None if bias is None else grid_of(model, bias),
        integers=integers,
        biases=None if bias is None else _constant(model, bias.inputs[0]),
        axis=channel_axis(node.op, node.attrs, shape) if len(shape) > 1 else 0,
    )


def _constant(model: Model, tensor: gs.Tensor) -> np.ndarray | None:
    node = producer(tensor)
    if node is not None and node.op == "Cast":
        tensor = node.inputs[0]
    return model.array(tensor) if isinstance(tensor, gs.Constant) else None


def layer_faults(model: Model, node: gs.Node, integer: bool) -> Iterator[Fault]:
    """What is wrong or wasteful about a layer.

    Args:
        model: A Q/DQ model.
        node: A Conv, Gemm or MatMul of it.
        integer: Whether it runs in integers.
    """
    grids = layer_grids(model, node)
    if grids.x is not None and grids.x.scale is not None and grids.x.scale.size > 1:
        yield Fault(
            "per-channel-input",
            "error" if integer else "warning",
            node.name,
            f"the tensor that it reads has {grids.x.scale.size} scales, and its kernel takes one",
            "give activations one scale",
        )
    if grids.weight is not None:
        yield from _of_weight(node, grids, grids.weight, integer)
    if grids.bias is not None and grids.biases is not None:
        yield from _of_bias(node, grids, grids.bias, grids.biases, integer)
    yield from _of_sums(node, grids)
    yield from _of_saturation(node, grids)


def _of_weight(node: gs.Node, grids: LayerGrids, grid: Grid, integer: bool) -> Iterator[Fault]:
    if grids.integers is None or grid.scale is None:
        return
    rank = grids.integers.ndim
    if grid.scale.size > 1 and not grid.block and grid.axis % rank != grids.axis:
        yield Fault(
            "weight-axis",
            "error" if integer else "warning",
            node.name,
            f"the scales of its weight run along axis {grid.axis % rank}, its output channels along"
            f" {grids.axis}"
            + (", and onnxruntime applies them to the output channels" if integer else ""),
            f"quantize the weight along axis {grids.axis}",
        )
    if grid.zero is not None and grid.dtype == "int8" and grid.zero.any():
        yield Fault(
            "weight-zero-point",
            "warning",
            node.name,
            "its int8 weight has a zero point: products have to be corrected for it, and most"
            " other runtimes refuse it",
            "quantize weights symmetrically",
        )


def _of_bias(
    node: gs.Node, grids: LayerGrids, grid: Grid, values: np.ndarray, integer: bool
) -> Iterator[Fault]:
    if grids.x is not None and grids.weight is not None:
        ratio = bias_ratio(grids.x, grids.weight, grid)
        if ratio is not None and abs(ratio - 1) > EXACT:
            slight = abs(ratio - 1) <= BIAS_TOLERANCE
            yield Fault(
                "bias-scale",
                "error" if integer and not slight else "warning",
                node.name,
                f"the scale of its bias is {ratio:.6g} x s_x * s_w"
                + (", which integer kernels take for s_x * s_w" if integer else ""),
                "write the bias anew, of scale s_x * s_w",
            )
    if grid.zero is not None and grid.zero.any() and node.op == "Gemm":
        yield Fault(
            "bias-zero-point",
            "error" if integer else "warning",
            node.name,
            "its bias has a zero point, which integer kernels leave out",
            "subtract it from the bias",
        )
    if values.dtype == np.int32 and values.size:
        largest = int(np.abs(values.astype(np.int64)).max())
        if largest >= INT32:
            yield Fault(
                "bias-overflow",
                "error",
                node.name,
                "its bias is cut off at the end of int32: the scale s_x * s_w is too small for it",
                "raise the scale of the weights in channels of tiny weights",
            )
        elif largest > LARGE_BIAS:
            yield Fault(
                "bias-overflow",
                "warning",
                node.name,
                f"its bias reaches {largest:,} of {INT32:,}: sums may pass the end of int32",
                "raise the scale of the weights in channels of tiny weights",
            )


def _of_sums(node: gs.Node, grids: LayerGrids) -> Iterator[Fault]:
    """Whether a sum could pass the end of int32, whatever the input is."""
    x, weight = grids.x, grids.weight
    if x is None or x.point is None or weight is None or weight.zero is None:
        return
    if grids.integers is None or grids.integers.ndim < 2 or x.dtype not in ("int8", "uint8"):
        return
    low, high = limits(x.dtype)
    most = max(high - x.point[1], x.point[1] - low)
    shape = [1] * grids.integers.ndim
    if weight.zero.size > 1 and weight.zero.size == grids.integers.shape[weight.axis % len(shape)]:
        shape[weight.axis % len(shape)] = -1
    elif weight.zero.size > 1:
        return
    centred = grids.integers.astype(np.int64) - weight.zero.reshape(shape).astype(np.int64)
    axes = tuple(a for a in range(centred.ndim) if a != grids.axis)
    sums = np.abs(centred).sum(axis=axes) * most
    if grids.biases is not None and grids.biases.size == sums.size:
        sums = sums + np.abs(grids.biases.reshape(-1).astype(np.int64))
    if sums.size and int(sums.max()) > INT32:
        count = int((sums > INT32).sum())
        yield Fault(
            "sum-overflow",
            "warning",
            node.name,
            f"products and bias of {count} channels could add up to {int(sums.max()):,}, beyond"
            " int32",
            "weights of fewer bits, or a larger scale in these channels",
        )


def _of_saturation(node: gs.Node, grids: LayerGrids) -> Iterator[Fault]:
    """Two products are added in int16 by x86-64 processors without VNNI."""
    if grids.x is None or grids.weight is None or grids.integers is None:
        return
    if (grids.x.dtype, grids.weight.dtype) != ("uint8", "int8") or grids.integers.ndim < 2:
        return
    rows = np.moveaxis(grids.integers.astype(np.int32), grids.axis, 0)
    rows = np.moveaxis(rows, 1, -1).reshape(rows.shape[0], -1)  # channels last, as kernels read
    pairs = 255 * (rows[:, 0 : rows.shape[1] // 2 * 2 : 2] + rows[:, 1::2])
    share = float(np.mean((pairs > INT16) | (pairs < -INT16 - 1))) if pairs.size else 0.0
    if share:
        yield Fault(
            "saturation",
            "note",
            node.name,
            f"{share:.2%} of the pairs of its weights could pass the end of int16 on x86-64"
            " processors without VNNI, which add products in pairs",
            "for such processors quantize with --target ort-x64-avx2",
        )
