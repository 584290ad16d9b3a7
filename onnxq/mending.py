"""Mend Q/DQ models where that is safe: the same numbers, or within half a step of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.analysis.prediction import predict
from onnxq.analysis.qdq import dequantize_before, grid_of, is_qdq, is_quantize, typed
from onnxq.analysis.rewrites import Rewritten
from onnxq.model import Model, consumers, is_standard, rewire
from onnxq.regridding import (
    Mend,
    biases,
    gemm_biases,
    moved_grids,
    remove,
    scalars,
    set_input,
    unsigned,
    zero_points,
)

__all__ = ["Mend", "mend"]


def mend(model: Model, *, arm: bool = False) -> list[Mend]:
    """Mend a model in place; returns what was done.

    Args:
        model: A Q/DQ model, as any tool writes it.
        arm: Whether it is for ARM, where int8 activations are as good as uint8 ones.
    """
    model.infer()
    done = [*_dead(model), *_duplicates(model), *_weights(model), *_unpacked(model)]
    done += [*scalars(model), *zero_points(model)]
    model.sort()
    wrong = predict(model, arm=arm)
    broken = not arm and Rewritten(typed(model), arm=False).unloadable
    if broken or any(p.why is not None and p.why.code == "int8-on-x64" for p in wrong):
        done += unsigned(model)
    done += _pads(model)
    done += moved_grids(model, wrong)
    done += gemm_biases(model, wrong)
    done += biases(model)
    model.cleanup()
    model.sort()
    return done


def _dead(model: Model) -> Iterator[Mend]:
    """Q and DQ that nothing reads."""
    for node in [*reversed(model.graph.nodes)]:
        result = node.outputs[0] if node.outputs else None
        if result is None or not is_qdq(node) or result.outputs or model.is_output(result):
            continue
        remove(model, node)
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
        remove(model, node)
        if not before.outputs[0].outputs and not model.is_output(before.outputs[0]):
            remove(model, before)
        yield Mend("duplicate-pair", node.name, "removed: a pair of the same grid", "every bit")


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
        remove(model, node)
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
        set_input(weight, 2, zero)
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
        remove(model, quantize)
        node.inputs[0] = before.inputs[0]
        set_input(node, 2, value)
        node.outputs[0] = result
        yield Mend("pad", node.name, "pads the integers with the zero point", "every bit")


def _values(model: Model, tensor: gs.Tensor) -> np.ndarray:
    """The values of a constant; ones for what is computed."""
    return model.array(tensor) if isinstance(tensor, gs.Constant) else np.ones(1)
