"""Strided slices that are joined along the channels become one SpaceToDepth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Layer, Model, consumers, is_standard, producer, rewire
from onnxq.report import Changes

if TYPE_CHECKING:
    from onnxq.pass_manager import Context

__all__ = ["SpaceToDepth"]

# start and step along height and width
Pick = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class SpaceToDepth:
    r"""Write the "focus" stem of detectors, pixels of a block moved into channels, as one operator.

    Each of b * b pairs of Slices takes every b-th row and column, and a Concat joins what they
    took.  That is SpaceToDepth, but for the order of the blocks, which goes into the weights::

        x -> Slice(0::2 rows) -> Slice(0::2 columns) \
        x -> Slice(1::2 rows) -> Slice(0::2 columns)  Concat -> Conv(W)
        x -> Slice(0::2 rows) -> Slice(1::2 columns)  /
        x -> Slice(1::2 rows) -> Slice(1::2 columns) /

        x -> SpaceToDepth(b) -> Conv(W')         W'[:, (b i + j) C + c] = W[:, k C + c]

    where block k starts at row i and column j.  Strided copies along rows of an image take several
    times as long as the one operator.

    Refused, with the reason: blocks in another order than that of SpaceToDepth whose result
    something else than convolutions without groups reads.

    Source: ONNX operator specification; the stem is that of YOLOv5 and YOLOX (Ge et al. 2021,
    arXiv 2107.08430).
    """

    name: ClassVar[str] = "space-to-depth"

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Replace the slices."""
        changes = Changes()
        joins = [n for n in model.graph.nodes if n.op == "Concat" and is_standard(n)]
        joins = [n for n in joins if all(_is_slice(producer(t)) for t in n.inputs)]
        if not joins:
            return changes
        model.infer()
        for node in joins:
            found = _blocks(model, node)
            if found is None:
                continue
            x, size, order = found
            readers = [] if order == sorted(order) else _readers(model, node)
            if isinstance(readers, str):
                changes.skip(node.name, readers)
                continue
            for layer in readers:
                layer.set_weight(_reordered(layer.weight, order))
            model.insert([_operator(model, node, x, size, keep=not readers)])
            changes.add(f"{node.name}: {len(order)} slices to one SpaceToDepth")
        if changes:
            model.cleanup()
        return changes


def _blocks(model: Model, node: gs.Node) -> tuple[gs.Tensor, int, list[int]] | None:
    """Source, size of the blocks and the number b i + j of each; None if they do not cover it."""
    size = round(len(node.inputs) ** 0.5)
    picks = [_traced(model, t) for t in node.inputs]
    x = picks[0][0]
    if size < 2 or x.shape is None or len(x.shape) != 4 or node.attrs.get("axis") not in (1, -3):
        return None
    order = []
    for source, pick in picks:
        if source is not x or pick is None or any(step != size for _, step in pick):
            return None
        (row, _), (column, _) = pick
        order.append(size * row + column)
    return (x, size, order) if sorted(order) == [*range(size * size)] else None


def _traced(model: Model, tensor: gs.Tensor) -> tuple[gs.Tensor, Pick | None]:
    """The tensor before the slices that made this one, and which rows and columns they took."""
    picks = {}
    node = producer(tensor)
    while _is_slice(node):
        assert node is not None
        for axis, pick in _slice(model, node):
            if axis in picks or axis not in (2, 3):
                return tensor, None
            picks[axis] = pick
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor, (picks[2], picks[3]) if len(picks) == 2 else None


def _is_slice(node: gs.Node | None) -> bool:
    return node is not None and node.op == "Slice" and is_standard(node)


def _slice(model: Model, node: gs.Node) -> list[tuple[int, tuple[int, int]]]:
    """Axis, start and step of each axis that is cut; axis -1 where that is not known."""
    unknown = [(-1, (0, 0))]
    x, constants = node.inputs[0], node.inputs[1:]
    # steps came as a fifth input, and never as an attribute
    if x.shape is None or [isinstance(t, gs.Constant) for t in constants] != [True] * 4:
        return unknown
    found = []
    for start, end, axis, step in zip(*(model.array(t).tolist() for t in constants), strict=True):
        at = axis + len(x.shape) if axis < 0 else axis
        extent = x.shape[at] if isinstance(x.shape[at], int) else np.iinfo(np.int32).max
        if not 0 <= start < step or end < extent:
            return unknown
        found.append((at, (start, step)))
    return found


def _readers(model: Model, node: gs.Node) -> list[Layer] | str:
    """The convolutions that read the result; why not, if something stands against it."""
    result, found = node.outputs[0], []
    if model.is_output(result):
        return "its blocks are in an order of their own, and it is an output"
    for reader in consumers(result):
        layer = Layer.of(model, reader)
        if layer is None or layer.op != "Conv" or layer.x is not result or layer.group != 1:
            return f"its blocks are in an order of their own, and {reader.name} ({reader.op})" + (
                " has groups" if layer is not None and layer.op == "Conv" else " reads it"
            )
        found.append(layer)
    return found


def _reordered(weight: np.ndarray, order: list[int]) -> np.ndarray:
    """A weight for blocks in the order of SpaceToDepth."""
    outputs, inputs, *window = weight.shape
    blocks = weight.reshape(outputs, len(order), inputs // len(order), *window)
    return blocks[:, np.argsort(order)].reshape(weight.shape)


def _operator(model: Model, node: gs.Node, x: gs.Tensor, size: int, *, keep: bool) -> gs.Node:
    """SpaceToDepth in place of a Concat; its result has a new name if the order is another."""
    result = node.outputs[0]
    node.outputs.clear()
    if not keep:
        moved = model.variable(f"{result.name}_blocks", result.dtype, result.shape)
        for reader in consumers(result):
            rewire(reader, result, moved)
        result = moved
    return gs.Node("SpaceToDepth", f"{node.name}_blocks", {"blocksize": size}, [x], [result])
