"""Which element types, scales and zero points keep a node in float."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.qdq import bias_ratio, bias_scales, dequantize_before
from onnxq.analysis.rewrites import Rewritten
from onnxq.analysis.rules import BIAS_SLACK, BIAS_TOLERANCE, Rule, Why
from onnxq.analysis.surroundings import data, dequantizes, has_input, quantizes

__all__ = ["broken_by_grids"]


def broken_by_grids(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    """What of the grids around a node breaks its rule.

    Args:
        node: A node of the rewritten model with DQ and Q where the rule wants them.
        rule: Its rule.
        graph: The rewritten model.
    """
    for check in (_types, _zero_points, _scalars, _grids, _layer):
        yield from check(node, rule, graph)


def _types(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    pairs = dequantizes(node, rule)[: 2 if rule.types == "pair" else None]
    types = [graph.dtype(n) for n in pairs]
    if rule.types == "pair" and (node.name, 1) in graph.filled:
        types.append("int8")
    results = [graph.dtype(n) for n in quantizes(node, graph)] if rule.output != "none" else []
    written = [graph.grid(n).dtype for n in (*pairs[:1], *quantizes(node, graph))]
    for kind in (*types, *results):
        if kind in ("int4", "uint4", "int2", "uint2"):
            yield Why(
                "bits",
                f"onnxruntime has no integer {node.op} of {kind}",
                "put a Cast to int8 in front of the DQ: it is done once, as the model is loaded",
            )
        if kind in ("int16", "uint16") and not rule.wide:
            yield Why(
                "bits", f"onnxruntime has no integer {node.op} of {kind}", "use 8-bit integers"
            )
    signed = not graph.arm and all(kind == "int8" for kind in written)
    if rule.types == "pair" and types[:1] == ["int8"] and types[1:2] not in ([], ["int8"]):
        yield Why(
            "types",
            f"onnxruntime has no integer {node.op} of int8 and {types[1]}",
            "use uint8 activations, or int8 weights",
        )
    sides = dict.fromkeys([*(types[:1] if rule.types == "pair" else types), *results])
    left = types[:1] == ["int8"] and node.op in ("Conv", "MatMul")
    if signed and (left or len(sides) > 1):
        yield Why(
            "int8-on-x64",
            "on x86-64 it needs uint8, and onnxruntime turns int8 into it only where a Q has one"
            " reader, and no constants",
            "quantize activations to uint8: the same grid with zero points 128 higher",
        )
    elif len(sides) > 1:
        first = " and ".join(dict.fromkeys(types[:1] if rule.types == "pair" else types))
        gives = f" and gives {results[0]}" if results else ""
        yield Why("types", f"it reads {first}{gives}", "use one type on both sides")


def _zero_points(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    """Where zero points have to be written out, even zeros."""
    before = dequantizes(node, rule)
    filled = node.op == "Where" and len(before) < len(data(node, rule))
    wanted = before[:2] if node.op in ("ArgMax", "Gemm") or filled or rule.same_grid else []
    for other in [*wanted, *(quantizes(node, graph) if rule.same_grid else [])]:
        if not graph.grid(other).has_zero:
            yield Why(
                "no-zero-point",
                f"{other.name} has no zero point, which an integer {node.op} needs written out",
                "write the zero point 0 as an input",
            )


def _scalars(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    """Activations have one scale: kernels of several would fail or are not taken."""
    if rule.types == "pair" or rule.same_grid or node.op not in ("Add", "Mul"):
        return
    for other in (*dequantizes(node, rule), *quantizes(node, graph)):
        grid = graph.grid(other)
        if grid.scale is not None and grid.scale.size > 1:
            yield Why(
                "per-channel",
                f"{other.name} has {grid.scale.size} scales, and an integer {node.op} takes one",
                "give the tensor one scale",
            )


def _grids(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    if not rule.same_grid:
        return
    before = dequantizes(node, rule)[0]
    for after in quantizes(node, graph):
        grids = graph.grid(before), graph.grid(after)
        for other, grid in zip((before, after), grids, strict=True):
            if grid.scale is not None and grid.scale.size > 1:
                yield Why(
                    "per-channel",
                    f"{other.name} has {grid.scale.size} scales; data movement takes one",
                    "give the tensor one scale",
                )
        if not grids[0].equals(grids[1]):
            yield Why(
                "grids",
                f"it only moves values, but reads {grids[0]} and gives {grids[1]}",
                "give its result the scale and zero point of its input",
            )


def _layer(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    if node.op in ("Gemm", "MatMul"):
        weight = dequantize_before(node.inputs[1])
        yield from _columns(node, weight, graph)
    if node.op not in ("Conv", "Gemm") or not has_input(node, 2):
        return
    bias = dequantize_before(node.inputs[2])
    if bias is None:
        return
    if graph.dtype(bias) != "int32":
        yield Why(
            "bias-type",
            f"its bias is {graph.dtype(bias)}, not int32",
            "write it as int32 of scale s_x * s_w",
        )
    if node.op == "Gemm":
        return
    grid = graph.grid(bias)
    if grid.zero is not None and grid.zero.any():
        yield Why("bias-zero-point", "its bias has a zero point", "subtract it from the bias")
    x, weight = (dequantize_before(t) for t in node.inputs[:2])
    if x is None or weight is None:
        return
    scales = graph.grid(x), graph.grid(weight), grid
    ratio, found = bias_ratio(*scales), bias_scales(*scales)
    if ratio is None or found is None:
        return
    wanted, given = found
    if (np.abs(given - wanted) > BIAS_SLACK + BIAS_TOLERANCE * wanted).any():
        yield Why(
            "bias-scale",
            f"the scale of its bias is {ratio:.4g} x s_x * s_w",
            "write the bias anew, of scale s_x * s_w",
        )


def _columns(node: gs.Node, weight: gs.Node | None, graph: Rewritten) -> Iterator[Why]:
    """Scales of a matrix on the right run along its columns."""
    if weight is None:
        return
    grid, shape = graph.grid(weight), weight.inputs[0].shape
    if grid.scale is None or grid.scale.size == 1 or shape is None:
        return
    axis = grid.axis % len(shape)
    if node.op == "Gemm":
        columns = shape[0 if node.attrs.get("transB", 0) else 1]
        broken = grid.scale.size != columns
    else:
        broken = axis != len(shape) - 1
    if broken or grid.block:
        yield Why(
            "weight-axis",
            f"its weight has scales along axis {axis}, not one for each column of its result",
            "quantize the weight along the axis of the output channels",
        )
