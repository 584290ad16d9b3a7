"""Q and DQ nodes as any tool writes them, and the grids that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.cost import dequantized_type, element_type
from onnxq.model import Model, is_standard, producer

__all__ = [
    "QDQ",
    "Grid",
    "bias_ratio",
    "bias_scales",
    "dequantize_before",
    "grid_of",
    "is_dequantize",
    "is_qdq",
    "is_quantize",
    "is_residue",
    "limits",
    "quantized_by",
    "typed",
]

QDQ = ("QuantizeLinear", "DequantizeLinear")
_MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators


def is_qdq(node: gs.Node | None) -> bool:
    """Whether a node is a Q or a DQ, of ONNX or of onnxruntime's own domain."""
    return node is not None and node.op in QDQ and (is_standard(node) or node.domain == _MICROSOFT)


def is_quantize(node: gs.Node | None) -> bool:
    """Whether a node is a Q."""
    return node is not None and node.op == "QuantizeLinear" and is_qdq(node)


def is_dequantize(node: gs.Node | None) -> bool:
    """Whether a node is a DQ."""
    return node is not None and node.op == "DequantizeLinear" and is_qdq(node)


def limits(dtype: str) -> tuple[int, int]:
    """Least and greatest value of an integer type, 4-bit ones included."""
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@dataclass(frozen=True, eq=False)
class Grid:
    """What a Q or a DQ converts to or from.

    Args:
        dtype: Element type of the integers, such as uint8.
        scale: The scales as stored; None if they are computed.
        zero: The zero points as stored; None if they are computed, zeros if they are left out.
        has_zero: Whether the node has an input for zero points.
        axis: The axis along which scales run, as stored.
        block: Values that share a scale; 0 if they are not in blocks.
    """

    dtype: str
    scale: np.ndarray | None
    zero: np.ndarray | None
    has_zero: bool
    axis: int = 1
    block: int = 0

    @property
    def known(self) -> bool:
        """Whether scales and zero points are constants."""
        return self.scale is not None and self.zero is not None

    @property
    def single(self) -> bool:
        """Whether one scale is for all values."""
        return self.scale is not None and self.scale.size == 1

    @property
    def point(self) -> tuple[float, int] | None:
        """Scale and zero point of a grid that has one of each; None for others."""
        if self.scale is None or self.zero is None or self.scale.size != 1:
            return None
        return float(self.scale.reshape(-1)[0]), int(self.zero.reshape(-1)[0])

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and greatest value of a grid with a single scale; None for others."""
        if self.point is None:
            return None
        (scale, zero), (low, high) = self.point, limits(self.dtype)
        return scale * (low - zero), scale * (high - zero)

    def equals(self, other: Grid) -> bool:
        """Whether both hold the same values at the same integers."""
        if self.scale is None or other.scale is None or self.zero is None or other.zero is None:
            return False
        return (
            self.dtype == other.dtype
            and np.array_equal(self.scale.reshape(-1), other.scale.reshape(-1))
            and np.array_equal(
                np.broadcast_to(self.zero.reshape(-1), self.scale.size),
                np.broadcast_to(other.zero.reshape(-1), other.scale.size),
            )
            and (self.single or (self.axis, self.block) == (other.axis, other.block))
        )

    def __str__(self) -> str:
        if self.scale is None or self.zero is None:
            return f"{self.dtype}, scale computed"
        if self.point is None:
            return f"{self.dtype}, {self.scale.size} scales along axis {self.axis}"
        return f"{self.dtype}, scale {self.point[0]:.4g}, zero point {self.point[1]}"


def grid_of(model: Model, node: gs.Node) -> Grid:
    """The grid of a Q or a DQ."""
    scale = node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    scales = model.array(scale) if isinstance(scale, gs.Constant) else None
    zeros: np.ndarray | None
    if zero is None:
        zeros = np.zeros(() if scales is None else scales.shape, np.int64)
    else:
        zeros = model.array(zero) if isinstance(zero, gs.Constant) else None
    return Grid(
        dtype=_dtype(node, zero),
        scale=scales,
        zero=zeros,
        has_zero=zero is not None,
        axis=int(node.attrs.get("axis", 1)),
        block=int(node.attrs.get("block_size", 0)),
    )


def _dtype(node: gs.Node, zero: gs.Tensor | None) -> str:
    if zero is not None and zero.dtype is not None:
        return element_type(zero.dtype)
    if node.op == "DequantizeLinear":
        before = producer(node.inputs[0])
        if before is not None and is_quantize(before) and node.inputs[0].dtype is None:
            return _dtype(before, before.inputs[2] if len(before.inputs) > 2 else None)
        return element_type(dequantized_type(node))
    chosen = int(node.attrs.get("output_dtype", 0))
    return element_type(chosen) if chosen else "uint8"


def typed(model: Model) -> Model:
    """The model with the types and shapes of its tensors; itself if it has them."""
    results = [t for n in model.graph.nodes if is_standard(n) for t in n.outputs if t.name]
    if all(t.dtype is not None and t.shape is not None for t in results):
        return model
    copy = model.clone()
    copy.infer()
    return copy


def dequantize_before(tensor: gs.Tensor) -> gs.Node | None:
    """The DQ that a tensor comes from; None if it comes from something else."""
    node = producer(tensor)
    return node if is_dequantize(node) else None


def is_residue(node: gs.Node) -> bool:
    """Whether a node computes what quantizing a tensor left of it: x - DQ(Q(x))."""
    if node.op != "Sub" or not is_standard(node):
        return False
    dequantize = dequantize_before(node.inputs[1])
    quantize = None if dequantize is None else producer(dequantize.inputs[0])
    return quantize is not None and is_quantize(quantize) and quantize.inputs[0] is node.inputs[0]


def quantized_by(tensor: gs.Tensor) -> list[gs.Node]:
    """The Q nodes that read a tensor."""
    return [n for n in tensor.outputs if is_quantize(n) and n.inputs[0] is tensor]


def bias_scales(x: Grid, weight: Grid, bias: Grid) -> tuple[np.ndarray, np.ndarray] | None:
    """The scale s_x * s_w that a bias should have, and the one it has; None where not known."""
    if x.point is None or weight.scale is None or bias.scale is None or weight.block:
        return None
    wanted = x.point[0] * weight.scale.reshape(-1).astype(np.float64)
    scales = bias.scale.reshape(-1).astype(np.float64)
    if not (wanted > 0).all() or not (scales > 0).all():
        return None
    if scales.size != wanted.size and 1 not in (scales.size, wanted.size):
        return None
    return wanted, scales


def bias_ratio(x: Grid, weight: Grid, bias: Grid) -> float | None:
    """Scale of a bias over s_x * s_w where it is furthest from 1; None where not known."""
    found = bias_scales(x, weight, bias)
    if found is None:
        return None
    ratios: np.ndarray = found[1] / found[0]
    return float(ratios[np.abs(np.log(ratios)).argmax()])
