"""Why a node runs in integers or not: its rule against what stands around it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.grid_rules import broken_by_grids
from onnxq.analysis.qdq import Grid, dequantize_before, is_quantize, limits
from onnxq.analysis.rewrites import Rewritten
from onnxq.analysis.rules import RULES, Rule, Why, missing_kernel
from onnxq.analysis.surroundings import absorber, data, has_input, quantizes
from onnxq.model import has_subgraph, is_standard, producer
from onnxq.placement import activation_bounds

__all__ = ["broken_rule"]


def broken_rule(node: gs.Node, graph: Rewritten) -> Why | None:
    """The first rule that keeps a node in float; None if it runs in integers.

    Args:
        node: A node of the rewritten model.
        graph: The rewritten model.
    """
    if has_subgraph(node):
        return Why("subgraph", "it holds a subgraph, which is left alone", "leave it in float")
    rule = RULES.get(node.op) if is_standard(node) else None
    if rule is None:
        return missing_kernel(node)
    for check in (_mode, _inputs, _output, _taken_over, broken_by_grids):
        for why in check(node, rule, graph):
            return why
    return None


def _mode(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    attrs = node.attrs
    if node.op == "Resize" and attrs.get("mode", "nearest") != "nearest":
        yield Why(
            "mode",
            f"onnxruntime has no integer Resize of mode {attrs['mode']}",
            "use mode nearest, or leave it in float without Q/DQ around it",
        )
    if node.op == "MaxPool" and graph.model.opset < 12:
        yield Why(
            "opset",
            f"MaxPool of integers needs operator set 12, the model has {graph.model.opset}",
            "convert the model to operator set 13 or newer",
        )
    if node.op == "Gemm" and has_input(node, 2):
        for name in ("alpha", "beta"):
            if float(attrs.get(name, 1.0)) != 1.0:
                yield Why(
                    name,
                    f"its {name} is {attrs[name]:g}, and a QGemm with bias needs 1",
                    f"multiply {'the weight' if name == 'alpha' else 'the bias'} by it",
                )


def _inputs(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    found = data(node, rule)
    quantized = [dequantize_before(t) is not None for _, t in found]
    if not any(quantized) and not quantizes(node, graph):
        yield Why(
            "not-quantized",
            "nothing around it is quantized",
            "if its neighbours run in integers, put Q/DQ on all that it reads and gives",
        )
    for index, tensor in found:
        if dequantize_before(tensor) is not None or (node.name, index) in graph.filled:
            continue
        if node.op == "Where" and any(quantized) and _is_scalar(tensor):
            continue  # onnxruntime quantizes it
        yield _unquantized(node, index, tensor, graph)


def _is_scalar(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tuple(tensor.shape) in ((), (1,))


def _unquantized(node: gs.Node, index: int, tensor: gs.Tensor, graph: Rewritten) -> Why:
    if index == 2 and node.op in ("Conv", "Gemm"):
        added = next((n for n, by in graph.taken.items() if by == node.name), None)
        what = "its bias" if added is None else f"the bias that {added} adds to it"
        return Why(
            "float-bias",
            f"{what} is float, and onnxruntime quantizes it only where a Q follows and the weight"
            " is quantized, too" if isinstance(tensor, gs.Constant) else f"{what} is computed",
            "write it as int32 of scale s_x * s_w with a DQ, as input 2 of a Gemm or Conv",
        )  # fmt: skip
    what = "its weight" if index == 1 and node.op in ("Conv", "Gemm", "MatMul") else "its input"
    kind = "is float" if isinstance(tensor, gs.Constant) else "is not quantized"
    mend = "store it in integers with a DQ" if isinstance(tensor, gs.Constant) else None
    before = producer(tensor)
    if mend is None and before is not None and RULES.get(before.op) is None:
        mend = f"put Q/DQ between {before.name} and it, or none around it"
    return Why(
        "unquantized-input", f"{what} {tensor.name} {kind}", mend or "put Q/DQ in front of it"
    )


def _output(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    if rule.output == "none":
        return
    activation = absorber(node, graph)
    last = node if activation is None else activation
    results = [t for t in last.outputs if t.name]
    behind = quantizes(node, graph)
    if rule.output == "optional" and not behind:
        return
    for tensor in results:
        if graph.is_output(tensor):
            yield Why(
                "graph-output",
                f"its result {tensor.name} is also an output of the model",
                "let the output be what its DQ gives, or leave the last node in float",
            )
        readers = graph.readers(tensor)
        floats = [n.name for n in readers if not is_quantize(n)]
        mine = [n for n in readers if is_quantize(n)]
        if floats:
            what = f"{floats[0]} reads its result in float"
            mend = "quantize its result right behind it, and let all readers read the DQ"
            if mine and activation is None:
                mend = "let it read the DQ behind the Q of this result"
            yield Why("float-reader", what, mend)
        if len(mine) > 1:
            yield Why(
                "two-quantizes",
                f"its result is quantized {len(mine)} times, on different grids",
                "quantize it once, and let all readers read that DQ",
            )
        if not mine and not floats:
            yield Why("no-quantize", "nothing quantizes its result", "put Q/DQ behind it")


def _taken_over(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    """The Relu or Clip behind it has to be redundant in front of the Q."""
    activation, behind = absorber(node, graph), quantizes(node, graph)
    if activation is None:
        return
    if rule.same_grid or rule.output in ("none", "each"):
        yield Why(
            "activation",
            f"{activation.name} stands between it and the Q",
            f"put {activation.name} in front of it, behind the layer",
        )
        return
    if not behind:
        yield Why(
            "activation",
            f"{activation.name} behind it keeps it from giving float",
            f"put Q/DQ behind {activation.name}",
        )
        return
    grid = graph.grid(behind[0])
    low = limits(grid.dtype)[0]
    span, bounds = grid.bounds, activation_bounds(graph.model, activation)
    if span is None or grid.scale is None or grid.scale.shape != ():
        yield Why(
            "activation",
            f"the Q behind {activation.name} has scales of shape {_shape(grid)}, not a scalar",
            "write its scale and zero point without dimensions",
        )
    elif activation.op == "Relu":
        zero = 0 if grid.point is None else grid.point[1]
        if zero != low:
            symmetric = " (symmetric)" if grid.dtype == "int8" and zero == 0 else ""
            yield Why(
                "activation",
                f"the zero point behind {activation.name} is {zero}{symmetric}, not {low}: the Q"
                " does not cut negative values off",
                f"quantize the result of a Relu from zero on: zero point {low}",
            )
    elif bounds is None:
        yield Why(
            "activation",
            f"the bounds of {activation.name} are computed, or leave zero out",
            "make them constants around zero",
        )
    elif not _clips(grid, bounds):
        yield Why(
            "activation",
            f"the Q behind {activation.name} reaches from {span[0]:.4g} to {span[1]:.4g}, beyond"
            f" its bounds {bounds[0]:.4g} and {bounds[1]:.4g}",
            "let the range of the Q end at the bounds",
        )


def _clips(grid: Grid, bounds: tuple[float, float]) -> bool:
    """Whether a Q holds no value beyond the bounds of a Clip, as onnxruntime rounds."""
    if grid.point is None:
        return False
    (scale, zero), (low, high) = grid.point, limits(grid.dtype)
    ends = [b if np.isinf(b) else np.rint(b / scale) + zero for b in bounds]
    return bool(ends[0] <= low and ends[1] >= high)


def _shape(grid: Grid) -> list[int] | str:
    return "unknown" if grid.scale is None else list(grid.scale.shape)
