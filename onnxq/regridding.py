"""Write grids and biases of Q/DQ models anew: the same numbers, or within half a step of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.layer_faults import EXACT, INT32, layer_grids
from onnxq.analysis.prediction import Prediction
from onnxq.analysis.qdq import dequantize_before, grid_of, is_dequantize, is_quantize
from onnxq.analysis.rules import RULES
from onnxq.model import Model, consumers, is_standard, producer
from onnxq.ops import LAYERS

__all__ = [
    "Mend",
    "biases",
    "gemm_biases",
    "moved_grids",
    "remove",
    "scalars",
    "set_input",
    "unsigned",
    "zero_points",
]

Keeps = Literal["every bit", "half a step"]


@dataclass(frozen=True)
class Mend:
    """One thing that was mended.

    Args:
        code: The fault, in a word.
        node: The node concerned.
        what: What was done, in one sentence.
        keeps: How near the numbers stay: ``every bit``, computed as ONNX defines it; or ``half a
            step`` of the grid concerned.
    """

    code: str
    node: str
    what: str
    keeps: Keeps


def remove(model: Model, node: gs.Node) -> None:
    """Take a node out that nothing reads any more."""
    node.inputs.clear()
    node.outputs.clear()
    model.graph.nodes[:] = [n for n in model.graph.nodes if n is not node]


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Give a node an input, also where it had none."""
    if len(node.inputs) > index:
        node.inputs[index] = tensor
    else:
        node.inputs.append(tensor)


def scalars(model: Model) -> Iterator[Mend]:
    """Scales and zero points of shape [1] get no dimensions, as Relu and Clip need them."""
    for node in [n for n in model.graph.nodes if is_quantize(n)]:
        source = producer(node.inputs[0])
        if source is None or source.op not in ("Relu", "Clip"):
            continue
        changed = False
        for index, tensor in enumerate(node.inputs[1:], 1):
            if isinstance(tensor, gs.Constant) and tuple(tensor.shape) == (1,):
                node.inputs[index] = model.constant(tensor.name, model.array(tensor).reshape(()))
                changed = True
        if changed:
            yield Mend("activation", node.name, "scale and zero point as scalars", "every bit")


def zero_points(model: Model) -> Iterator[Mend]:
    """Zero points that are left out are written, as Gemm and data movement need them."""
    wanted = set()
    for node in model.graph.nodes:
        rule = RULES.get(node.op) if is_standard(node) else None
        if rule is not None and rule.same_grid:
            before = dequantize_before(node.inputs[0])
            after = [n for t in node.outputs for n in consumers(t) if is_quantize(n)]
            if before is not None and after:
                wanted |= {id(n) for n in (before, *after)}
        if node.op == "Gemm" and is_standard(node):
            found = [dequantize_before(t) for t in node.inputs[:2]]
            wanted |= {id(n) for n in found if n is not None}
    for node in model.graph.nodes:
        if id(node) not in wanted:
            continue
        grid = grid_of(model, node)
        if grid.has_zero or grid.scale is None or grid.dtype not in ("uint8", "int8"):
            continue
        zero = model.constant(f"{node.name}_zero_point", np.zeros(grid.scale.shape, grid.dtype))
        set_input(node, 2, zero)
        node.attrs.pop("output_dtype", None)
        yield Mend("no-zero-point", node.name, "zero point 0 is written", "every bit")


def unsigned(model: Model) -> Iterator[Mend]:
    """int8 activations become uint8, zero points 128 higher: the same values."""
    count = 0
    for node in [n for n in model.graph.nodes if is_quantize(n)]:
        readers = consumers(node.outputs[0])
        nodes = [node, *readers]
        if model.is_output(node.outputs[0]) or not all(is_dequantize(n) for n in readers):
            continue
        if isinstance(node.inputs[0], gs.Constant):
            continue
        if all(_is_int8(model, n) for n in nodes):
            for other in nodes:
                _raise(model, other)
            node.outputs[0].dtype = np.dtype(np.uint8)
            count += 1
    for node in [n for n in model.graph.nodes if is_dequantize(n)]:
        values = node.inputs[0]
        readers = consumers(node.outputs[0])
        if not isinstance(values, gs.Constant) or not _is_int8(model, node):
            continue
        if any(r.op in LAYERS for r in readers):
            continue
        shifted = (model.array(values).astype(np.int16) + 128).astype(np.uint8)
        node.inputs[0] = model.constant(values.name, shifted)
        _raise(model, node)
        count += 1
    if count:
        yield Mend(
            "int8-on-x64",
            "",
            f"{count} tensors in uint8 instead of int8, zero points 128 higher",
            "every bit",
        )


def _is_int8(model: Model, node: gs.Node) -> bool:
    grid = grid_of(model, node)
    return grid.dtype == "int8" and grid.has_zero and grid.zero is not None


def _raise(model: Model, node: gs.Node) -> None:
    zero = model.array(node.inputs[2]).astype(np.int16) + 128
    node.inputs[2] = model.constant(node.inputs[2].name, zero.astype(np.uint8))


def moved_grids(model: Model, predictions: list[Prediction]) -> Iterator[Mend]:
    """Data movement gives its input's grid, where that holds all that the old one held."""
    broken = {p.name for p in predictions if p.why is not None and p.why.code == "grids"}
    for node in [n for n in model.graph.nodes if n.name in broken]:
        before = dequantize_before(node.inputs[0])
        pairs = [n for t in node.outputs for n in consumers(t) if is_quantize(n)]
        if before is None:
            continue
        grid = grid_of(model, before)
        for after in pairs:
            old = grid_of(model, after)
            readers = consumers(after.outputs[0])
            if grid.dtype != old.dtype or grid.bounds is None or old.bounds is None:
                continue
            half = 0.5 * (old.point[0] if old.point else 0.0)
            inside = grid.bounds[0] >= old.bounds[0] - half
            inside &= grid.bounds[1] <= old.bounds[1] + half
            if not inside or model.is_output(after.outputs[0]):
                continue
            if not all(is_dequantize(n) for n in readers) or not grid.has_zero:
                continue
            for other in (after, *readers):
                for index in (1, 2):
                    set_input(other, index, before.inputs[index])
            yield Mend(
                "grids", node.name, "gives the grid of its input, rounds no more", "half a step"
            )


def gemm_biases(model: Model, predictions: list[Prediction]) -> Iterator[Mend]:
    """The float bias of a Gemm, or of MatMul and Add, becomes int32."""
    broken = {p.name for p in predictions if p.why is not None and p.why.code == "float-bias"}
    for node in [n for n in model.graph.nodes if n.name in broken]:
        if node.op not in ("Gemm", "MatMul"):
            continue
        scale = layer_grids(model, node).bias_scale
        weight = dequantize_before(node.inputs[1])
        if scale is None or weight is None or not (scale > 0).all():
            continue
        add = consumers(node.outputs[0])[0] if node.op == "MatMul" else None
        if add is not None:
            bias = next((t for t in add.inputs if t is not node.outputs[0]), None)
        else:
            bias = node.inputs[2]
        shape = weight.inputs[0].shape
        if not isinstance(bias, gs.Constant) or shape is None or len(shape) != 2:
            continue
        columns = shape[0 if node.attrs.get("transB", 0) else 1]
        values = model.array(bias).reshape(-1).astype(np.float64)
        if values.size != columns or scale.size not in (1, columns):
            continue
        steps = np.rint(values / scale)
        if np.abs(steps).max(initial=0) >= INT32:
            continue
        if add is not None:
            if node.inputs[0].shape is None or len(node.inputs[0].shape) != 2:
                continue
            node.op, node.outputs[0] = "Gemm", add.outputs[0]
            node.inputs.append(bias)
            add.outputs.clear()
            remove(model, add)
        node.inputs[2] = _int32(model, node, steps, scale)
        what = "its bias is int32 of scale s_x * s_w"
        yield Mend(
            "float-bias",
            node.name,
            what if add is None else f"a Gemm with the Add behind it, {what}",
            "half a step",
        )


def biases(model: Model) -> Iterator[Mend]:
    """int32 biases get the scale s_x * s_w and no zero point, one for each layer."""
    for node in [n for n in model.graph.nodes if n.op in ("Conv", "Gemm") and is_standard(n)]:
        grids = layer_grids(model, node)
        scale, old = grids.bias_scale, grids.bias
        if scale is None or old is None or grids.biases is None or not old.known:
            continue
        if grids.biases.dtype != np.int32 or not (scale > 0).all() or old.scale is None:
            continue
        channels = grids.biases.size
        if grids.biases.ndim != 1 or scale.size not in (1, channels):
            continue
        now = np.broadcast_to(old.scale.reshape(-1).astype(np.float64), channels)
        zero = np.zeros(1) if old.zero is None else old.zero.reshape(-1)
        if not zero.any() and (np.abs(now / scale - 1) <= EXACT).all():
            continue
        values = (grids.biases.astype(np.float64) - zero) * now
        steps = np.rint(values / scale)
        if np.abs(steps).max(initial=0) >= INT32:
            continue
        node.inputs[2] = _int32(model, node, steps, scale)
        yield Mend("bias-scale", node.name, "its bias has the scale s_x * s_w", "half a step")


def _int32(model: Model, node: gs.Node, steps: np.ndarray, scale: np.ndarray) -> gs.Variable:
    """A bias of these integers, behind a DQ."""
    integers = model.constant(f"{node.name}_bias_quantized", steps.astype(np.int32))
    scales = scale.astype(np.float32).reshape(-1 if scale.size > 1 else ())
    result = model.variable(f"{node.name}_bias", np.float32, [steps.size])
    attrs = {"axis": 0} if scale.size > 1 else {}
    inputs = [integers, model.constant(f"{node.name}_bias_scale", scales)]
    model.insert([gs.Node("DequantizeLinear", f"{result.name}_dq", attrs, inputs, [result])])
    return result
