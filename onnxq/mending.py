"""Mend Q/DQ models where that is safe: the same numbers, or within half a step of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.analysis.contract import RULES
from onnxq.analysis.faults import EXACT, INT32, layer_grids
from onnxq.analysis.prediction import Prediction, predict
from onnxq.analysis.qdq import (
    dequantize_before,
    grid_of,
    is_dequantize,
    is_qdq,
    is_quantize,
)
from onnxq.model import Model, consumers, is_standard, producer, rewire
from onnxq.ops import LAYERS

__all__ = ["Mend", "mend"]

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


def mend(model: Model, *, arm: bool = False) -> list[Mend]:
    """Mend a model in place; returns what was done.

    Args:
        model: A Q/DQ model, as any tool writes it.
        arm: Whether it is for ARM, where int8 activations are as good as uint8 ones.
    """
    model.infer()
    done = [*_dead(model), *_duplicates(model), *_weights(model), *_unpacked(model)]
    done += [*_scalars(model), *_zero_points(model)]
    model.sort()
    wrong = predict(model, arm=arm)
    if any(p.why is not None and p.why.code == "int8-on-x64" for p in wrong):
        done += _unsigned(model)
    done += _pads(model)
    done += _grids(model, wrong)
    done += _gemm_biases(model, wrong)
    done += _biases(model)
    model.cleanup()
    model.sort()
    return done


def _remove(model: Model, node: gs.Node) -> None:
    node.inputs.clear()
    node.outputs.clear()
    model.graph.nodes[:] = [n for n in model.graph.nodes if n is not node]


def _set(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Give a node an input, also where it had none."""
    if len(node.inputs) > index:
        node.inputs[index] = tensor
    else:
        node.inputs.append(tensor)


# ---------------------------------------------------------------------- pairs


def _dead(model: Model) -> Iterator[Mend]:
    """Q and DQ that nothing reads."""
    for node in [*reversed(model.graph.nodes)]:
        result = node.outputs[0] if node.outputs else None
        if result is None or not is_qdq(node) or result.outputs or model.is_output(result):
            continue
        _remove(model, node)
        yield Mend("dead", node.name, "removed: nothing read it", "every bit")


def _duplicates(model: Model) -> Iterator[Mend]:
    """A Q behind a DQ of the same grid: its readers read the integers in front of the DQ."""
    for node in [*model.graph.nodes]:
        before = dequantize_before(node.inputs[0]) if is_quantize(node) and node.inputs else None
        if before is None or model.is_output(node.outputs[0]):
            continue
        if not grid_of(model, before).equals(grid_of(model, node)):
            continue
        for reader in [*node.outputs[0].outputs]:
            rewire(reader, node.outputs[0], before.inputs[0])
        _remove(model, node)
        if not before.outputs[0].outputs and not model.is_output(before.outputs[0]):
            _remove(model, before)
        yield Mend("duplicate-pair", node.name, "removed: a pair of the same grid", "every bit")


# ---------------------------------------------------------------------- constants


def _weights(model: Model) -> Iterator[Mend]:
    """Q of a constant: its integers are stored."""
    for node in [*model.graph.nodes]:
        if not is_quantize(node) or not isinstance(node.inputs[0], gs.Constant):
            continue
        grid = grid_of(model, node)
        if grid.scale is None or grid.zero is None or grid.block:
            continue
        if grid.dtype not in ("int8", "uint8"):
            continue
        if model.is_output(node.outputs[0]):
            continue
        values = model.array(node.inputs[0])
        shape = [1] * values.ndim
        if grid.scale.size > 1:
            shape[grid.axis % values.ndim] = -1
        scale, zero = grid.scale.reshape(shape), grid.zero.reshape(shape)
        ends = np.iinfo(grid.dtype)
        steps = np.rint(values / scale) + zero.astype(np.int64)
        stored = np.clip(steps, ends.min, ends.max).astype(grid.dtype)
        integers = model.constant(f"{node.inputs[0].name}_quantized", stored)
        for reader in [*node.outputs[0].outputs]:
            rewire(reader, node.outputs[0], integers)
        _remove(model, node)
        yield Mend("float-weight", node.name, "its integers are stored", "every bit")


def _unpacked(model: Model) -> Iterator[Mend]:
    """4-bit weights of layers with integer activations: unpacked as the model is loaded."""
    for node in [*model.graph.nodes]:
        if node.op not in ("Conv", "Gemm", "MatMul") or not is_standard(node):
            continue
        x, weight = (dequantize_before(t) for t in node.inputs[:2])
        if x is None or weight is None or not isinstance(weight.inputs[0], gs.Constant):
            continue
        grid = grid_of(model, weight)
        if grid.dtype not in ("int4", "uint4") or grid.block or grid.zero is None:
            continue
        if grid_of(model, x).dtype not in ("int8", "uint8"):
            continue
        wide = np.dtype(grid.dtype.replace("4", "8"))
        cast = model.variable(f"{weight.inputs[0].name}_unpacked", wide, weight.inputs[0].shape)
        packed = weight.inputs[0]
        weight.inputs[0] = cast
        zero = model.constant(f"{weight.name}_zero_point", grid.zero.astype(wide))
        _set(weight, 2, zero)
        model.insert(
            [
                gs.Node(
                    "Cast",
                    f"{cast.name}_Cast",
                    {"to": onnx.helper.np_dtype_to_tensor_dtype(wide)},
                    [packed],
                    [cast],
                )
            ]
        )
        yield Mend("bits", node.name, "its weight is unpacked as the model is loaded", "every bit")


# ---------------------------------------------------------------------- the form of grids


def _scalars(model: Model) -> Iterator[Mend]:
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


def _zero_points(model: Model) -> Iterator[Mend]:
    """Zero points that are left out are written, as data movement needs them."""
    wanted = set()
    for node in model.graph.nodes:
        rule = RULES.get(node.op) if is_standard(node) else None
        if rule is not None and rule.same_grid:
            before = dequantize_before(node.inputs[0])
            after = [n for t in node.outputs for n in consumers(t) if is_quantize(n)]
            if before is not None and after:
                wanted |= {id(n) for n in (before, *after)}
    for node in model.graph.nodes:
        if id(node) not in wanted:
            continue
        grid = grid_of(model, node)
        if grid.has_zero or grid.scale is None or grid.dtype not in ("uint8", "int8"):
            continue
        zero = model.constant(f"{node.name}_zero_point", np.zeros(grid.scale.shape, grid.dtype))
        _set(node, 2, zero)
        node.attrs.pop("output_dtype", None)
        yield Mend("no-zero-point", node.name, "zero point 0 is written", "every bit")


def _unsigned(model: Model) -> Iterator[Mend]:
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


def _pads(model: Model) -> Iterator[Mend]:
    """A Pad with zeros between DQ and Q of one grid pads the integers with the zero point."""
    for node in [n for n in model.graph.nodes if n.op == "Pad" and is_standard(n)]:
        before, after = dequantize_before(node.inputs[0]), consumers(node.outputs[0])
        if before is None or len(after) != 1 or not is_quantize(after[0]) or model.opset < 13:
            continue
        quantize, fill = after[0], node.inputs[2] if len(node.inputs) > 2 else None
        if model.is_output(node.outputs[0]) or model.is_output(quantize.outputs[0]):
            continue
        zeros = fill is None or not fill.name or not _values(model, fill).any()
        grid = grid_of(model, before)
        if not zeros or grid.point is None or not grid.equals(grid_of(model, quantize)):
            continue
        value = model.constant(f"{node.name}_value", np.array(grid.point[1], grid.dtype))
        result = quantize.outputs[0]
        _remove(model, quantize)
        node.inputs[0] = before.inputs[0]
        _set(node, 2, value)
        node.outputs[0] = result
        yield Mend("pad", node.name, "pads the integers with the zero point", "every bit")


def _values(model: Model, tensor: gs.Tensor) -> np.ndarray:
    """The values of a constant; ones for what is computed."""
    return model.array(tensor) if isinstance(tensor, gs.Constant) else np.ones(1)


# ---------------------------------------------------------------------- grids that differ


def _grids(model: Model, predictions: list[Prediction]) -> Iterator[Mend]:
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
                    _set(other, index, before.inputs[index])
            yield Mend(
                "grids", node.name, "gives the grid of its input, rounds no more", "half a step"
            )


# ---------------------------------------------------------------------- biases


def _gemm_biases(model: Model, predictions: list[Prediction]) -> Iterator[Mend]:
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
            _remove(model, add)
        node.inputs[2] = _int32(model, node, steps, scale)
        what = "its bias is int32 of scale s_x * s_w"
        yield Mend(
            "float-bias",
            node.name,
            what if add is None else f"a Gemm with the Add behind it, {what}",
            "half a step",
        )


def _biases(model: Model) -> Iterator[Mend]:
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
