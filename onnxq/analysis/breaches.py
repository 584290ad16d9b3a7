"""Where a Q/DQ model breaks the contract of a target, rule by rule."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnxq.analysis.layer_faults import Fault
from onnxq.analysis.qdq import Grid, dequantize_before, grid_of, is_qdq, is_quantize, is_residue
from onnxq.contract import Target
from onnxq.model import Model, consumers, is_standard
from onnxq.ops import LAYERS

__all__ = ["breaches"]


def breaches(model: Model, target: Target) -> list[Fault]:
    """What the target does not run in integers, or refuses; one fault for each rule.

    Args:
        model: A Q/DQ model, as any tool writes it.
        target: The contract.

    Returns:
        Faults with the code ``contract``, each at the first node that breaks the rule.
    """
    broken: dict[tuple[str, str], list[str]] = {}
    for node in model.graph.nodes:
        for rule in _of_node(model, node, target):
            broken.setdefault(rule, []).append(node.name)
    found = []
    if target.opset is not None and model.opset > target.opset:
        what = f"the model has operator set {model.opset}, {target.name} takes {target.opset}"
        mend = f"export the float model with opset {target.opset} or older"
        found.append(Fault("contract", "warning", "", what, mend))
    for (what, mend), names in broken.items():
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        found.append(Fault("contract", "warning", names[0], f"{what}{others}", mend))
    return found


def _of_node(model: Model, node: gs.Node, target: Target) -> Iterator[tuple[str, str]]:
    """The rules that a node breaks, each with the mend."""
    if is_quantize(node) and not isinstance(node.inputs[0], gs.Constant):
        yield from _of_activation(grid_of(model, node), target)
    if is_qdq(node) or not is_standard(node) or is_residue(node):
        return
    before = [dequantize_before(t) for t in node.inputs if t.name]
    if not any(before):
        return
    kernel = target.kernels.get(node.op)
    after = [r for t in node.outputs for r in consumers(t) if is_quantize(r)]
    if kernel is None:
        if after:
            yield (
                f"{target.name} has no integer {node.op}",
                "leave it in float, with no Q/DQ around it",
            )
    elif node.op in LAYERS and len(before) > 1 and before[0] is not None and before[1] is not None:
        grids = [None if b is None else grid_of(model, b) for b in before]
        yield from _of_layer(node, grids, kernel.per_channel, target)


def _of_activation(grid: Grid, target: Target) -> Iterator[tuple[str, str]]:
    wanted = " or ".join(target.activations)
    if grid.dtype not in target.activations:
        yield (
            f"its result is {grid.dtype}, {target.name} computes in {wanted}",
            f"quantize the float model with --target {target.name}",
        )
    if target.symmetric and grid.zero is not None and grid.zero.any():
        yield (
            f"its zero point is not 0, as {target.name} wants it",
            f"quantize the float model with --target {target.name}",
        )
    if not target.cpu and not grid.single and grid.scale is not None:
        yield (
            f"it has several scales, {target.name} takes one per activation tensor",
            "give the tensor one scale",
        )


def _of_layer(
    node: gs.Node, grids: list[Grid | None], per_channel: bool, target: Target
) -> Iterator[tuple[str, str]]:
    x, weight = grids[:2]
    if x is None or weight is None:
        return
    if (x.dtype, weight.dtype) not in target.pairs and x.dtype in target.activations:
        legal = " or ".join(w for a, w in sorted(target.pairs) if a == x.dtype)
        yield (
            f"{target.name} has no integer {node.op} of {x.dtype} and {weight.dtype}",
            f"use {legal} weights with {x.dtype} activations",
        )
    elif not weight.single and not (per_channel and weight.dtype in target.per_channel):
        yield (
            f"its {weight.dtype} weight has a scale per channel, {target.name} takes one",
            f"use --weights {weight.dtype}/tensor",
        )
    if weight.zero is not None and weight.zero.any() and weight.dtype.startswith("int"):
        yield "its signed weight has a zero point", "use symmetric weights"
    bias = grids[2] if len(grids) > 2 else None
    if bias is not None and target.bias == "float":
        yield (
            f"its bias is {bias.dtype}, {target.name} takes it in float",
            f"quantize the float model with --target {target.name}",
        )
