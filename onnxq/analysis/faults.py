"""What is wrong or wasteful in a Q/DQ model, whether or not its nodes run in integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.layer_faults import Fault, layer_faults
from onnxq.analysis.prediction import Prediction
from onnxq.analysis.qdq import dequantize_before, grid_of, is_dequantize, is_quantize, typed
from onnxq.analysis.rewrites import Rewritten
from onnxq.model import Model, consumers, is_standard, producer

__all__ = ["Fault", "faults"]


def faults(model: Model, predictions: Iterable[Prediction]) -> list[Fault]:
    """What is wrong or wasteful, worst first.

    Args:
        model: A Q/DQ model, as any tool writes it.
        predictions: What its nodes are to become, on one processor or several.
    """
    inside: dict[str, bool | None] = {}
    for p in predictions:
        inside[p.name] = p.integer or inside.get(p.name, p.integer)
    found: list[Fault] = []
    for node in model.graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            found += _of_grid(model, node)
            found += _of_pair(model, node, inside)
        elif node.op in ("Conv", "Gemm", "MatMul") and is_standard(node):
            found += layer_faults(model, node, bool(inside.get(node.name)))
        elif node.op == "Concat":
            found += _of_concat(model, node, bool(inside.get(node.name)))
    found += [_unloadable(name) for name in Rewritten(typed(model), arm=False).unloadable]
    if not any(f.severity == "error" for f in found) and model.opset < 13:
        found += _of_opset(model)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda f: order[f.severity])


def _unloadable(name: str) -> Fault:
    return Fault(
        "unloadable",
        "error",
        name,
        "onnxruntime 1.32 on x86-64 does not load the model: it puts int8 Q/DQ behind this node,"
        " where none stand, and then makes them uint8 by half",
        "quantize activations to uint8, put Q/DQ there, or use operator set 20",
    )


# ---------------------------------------------------------------------- scales


def _of_grid(model: Model, node: gs.Node) -> Iterator[Fault]:
    grid = grid_of(model, node)
    if grid.scale is None:
        yield Fault(
            "computed-scale",
            "note",
            node.name,
            "its scale is computed as the model runs",
            "calibrate the range and store the scale as a constant",
        )
        return
    if not np.isfinite(grid.scale).all() or (grid.scale <= 0).any():
        yield Fault(
            "bad-scale",
            "error",
            node.name,
            "its scale is zero, negative, infinite or NaN",
            "calibrate the tensor again",
        )
    elif float(grid.scale.min()) < np.finfo(np.float32).tiny:
        yield Fault(
            "tiny-scale",
            "warning",
            node.name,
            "its scale is denormal: its reciprocal overflows",
            "calibrate the tensor again, or raise the scale",
        )


# ---------------------------------------------------------------------- pairs


def _of_pair(model: Model, node: gs.Node, inside: dict[str, bool | None]) -> Iterator[Fault]:
    result = node.outputs[0]
    if not result.outputs and not model.is_output(result):
        yield Fault(
            "dead",
            "warning",
            node.name,
            "nothing reads its result, and onnxruntime computes it all the same",
            "remove it",
        )
        return
    if not is_quantize(node):
        return
    if isinstance(node.inputs[0], gs.Constant):
        yield Fault(
            "float-weight",
            "note",
            node.name,
            f"the constant {node.inputs[0].name} is stored in float and quantized when the model"
            " is loaded",
            "store its integers: a quarter of the bytes",
        )
        return
    yield from _after_pair(model, node)
    yield from _useless(model, node, inside)


def _after_pair(model: Model, node: gs.Node) -> Iterator[Fault]:
    """A Q behind a DQ."""
    before = dequantize_before(node.inputs[0])
    if before is None or isinstance(before.inputs[0], gs.Constant):
        return
    grids = grid_of(model, before), grid_of(model, node)
    if grids[0].equals(grids[1]):
        yield Fault(
            "duplicate-pair",
            "note",
            node.name,
            f"it quantizes what {before.name} gives on the same grid",
            "let its readers read the first pair",
        )
    elif grids[0].known and grids[1].known:
        yield Fault(
            "requantized",
            "warning",
            node.name,
            f"the tensor is rounded twice, to {grids[0]}, then to {grids[1]}",
            "keep one of the two pairs",
        )


def _useless(model: Model, node: gs.Node, inside: dict[str, bool | None]) -> Iterator[Fault]:
    """A pair between nodes that all compute in float."""
    tensor, source = node.outputs[0], producer(node.inputs[0])
    if model.is_output(tensor) or (source is not None and inside.get(source.name) is not False):
        return
    readers = consumers(tensor)
    if not all(is_dequantize(n) for n in readers):
        return
    ends = [r for n in readers for r in consumers(n.outputs[0])]
    if ends and all(inside.get(r.name) is False for r in ends):
        yield Fault(
            "useless-pair",
            "warning",
            node.name,
            f"nothing around it runs in integers ({ends[0].name} does not): it costs time and adds"
            " noise",
            "remove the pair, or mend its neighbours",
        )


# ---------------------------------------------------------------------- the rest


def _of_concat(model: Model, node: gs.Node, integer: bool) -> Iterator[Fault]:
    sources = [n for t in node.inputs if (n := dequantize_before(t)) is not None]
    after = [n for n in consumers(node.outputs[0]) if is_quantize(n)]
    if not integer or len(sources) < 2 or not after:
        return
    result = grid_of(model, after[0])
    other = [n for n in sources if not grid_of(model, n).equals(result)]
    if other:
        yield Fault(
            "concat-grids",
            "note",
            node.name,
            f"inputs on other grids than its result, {len(other)} of {len(sources)}: their values"
            " go through a table, and are rounded once more",
            "give the inputs the scale and zero point of the result",
        )


def _of_opset(model: Model) -> Iterator[Fault]:
    node = model.graph.nodes[0].name
    yield Fault(
        "opset",
        "warning",
        node,
        f"operator set {model.opset} has no scales per channel (13), 4-bit or 16-bit integers (21)",
        "convert the model to operator set 13 or newer",
    )
