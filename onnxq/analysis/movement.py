"""Where the channels of a result come from, for operators that only move values.

Found out by running the operator on channel numbers instead of values: what comes out says of each
element where it was before.  One rule serves Slice, Pad, Flatten, Concat and all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.analysis.cost import Shapes
from onnxq.model import Model
from onnxq.runtime import Session

__all__ = ["Moved", "follow", "is_followed"]

# Only the shape changes: no need to run them, and their second input may be computed.
_RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
# The IR version of the models of one node: old enough for every onnxruntime, newer than none needs.
_IR_VERSION = 8


@dataclass(frozen=True, eq=False)
class Moved:
    """Where the channels of one result come from; one entry per pair of channels.

    Args:
        axis: The axis that the channels of the result run along.
        channels: How many it has.
        target: Channel of the result, ascending, int64 [P].
        source: Channel of the inputs, numbered on from one input to the next; -1 for zeros that
            were padded; int64 [P].
        share: Which part of the target's values comes from the source, float64 [P].
    """

    axis: int
    channels: int
    target: np.ndarray
    source: np.ndarray
    share: np.ndarray

    @property
    def whole(self) -> np.ndarray | None:
        """The one source of each channel, int64 [channels]; None where some have several."""
        return self.source if self.source.size == self.channels else None


def is_followed(node: gs.Node) -> bool:
    """Whether it is an operator that `follow` knows; Resize and MaxPool leave channels in place."""
    if node.op in ("MaxPool", "Resize"):
        return False
    return node.op == "Concat" or ops.is_movement(node.op, node.attrs)


def follow(model: Model, node: gs.Node, axes: Sequence[int], shapes: Shapes) -> list[Moved] | str:
    """Follow channels through a node.

    Args:
        model: The model.
        node: One of its nodes that `is_followed`.
        axes: The axis of the channels, for each input of a Concat, else for the first one.
        shapes: Concrete shapes by name.

    Returns:
        One entry per output; or why the channels cannot be followed.
    """
    data = list(node.inputs[: len(axes)])
    numbers, start = [], 1  # 0 is what Pad puts in
    for tensor, axis in zip(data, axes, strict=True):
        shape = shapes.get(tensor.name)
        if shape is None:
            return f"the shape of {tensor.name} is not known"
        line = np.arange(start, start + shape[axis], dtype=np.float32)
        along = [-1 if i == axis else 1 for i in range(len(shape))]
        numbers.append(np.broadcast_to(line.reshape(along), shape))
        start += shape[axis]
    results = _run(model, node, numbers, shapes)
    if isinstance(results, str):
        return results
    if not all(r.size for r in results):
        return f"{node.name} ({node.op}) gives a tensor without values"
    return [_moved(node, axes[0], numbers[0].ndim, r.astype(np.int64) - 1) for r in results]


def _run(
    model: Model, node: gs.Node, numbers: Sequence[np.ndarray], shapes: Shapes
) -> list[np.ndarray] | str:
    if node.op in _RESHAPES:
        shape = shapes.get(node.outputs[0].name)
        if shape is None or np.prod(shape) != numbers[0].size:
            return f"the shape that {node.name} ({node.op}) gives is not known"
        return [numbers[0].reshape(shape)]
    if node.op == "Pad" and (why := _odd_padding(model, node)):
        return why
    rest = list(node.inputs[len(numbers) :])
    for tensor in rest:
        if tensor.name and not isinstance(tensor, gs.Constant):
            return f"{tensor.name}, by which {node.name} ({node.op}) moves them, is computed"
    names = [f"{i}" for i in range(len(numbers))]
    inputs = [gs.Variable(n, np.float32, a.shape) for n, a in zip(names, numbers, strict=True)]
    outputs = [gs.Variable(t.name, np.float32) for t in node.outputs]
    twin = gs.Node(node.op, node.name, dict(node.attrs), [*inputs, *_copies(model, rest)], outputs)
    proto = gs.export_onnx(
        gs.Graph([twin], inputs, outputs, opset=model.opset), do_type_check=False
    )
    proto.ir_version = _IR_VERSION
    session = Session(proto, threads=1, level="disabled")
    found = session.run(dict(zip(names, map(np.ascontiguousarray, numbers), strict=True)))
    return [found[t.name] for t in node.outputs]


def _copies(model: Model, tensors: Sequence[gs.Tensor]) -> list[gs.Tensor]:
    """The constants once more, so that the model's own are not linked to another graph."""
    return [
        gs.Constant(t.name, model.array(t)) if isinstance(t, gs.Constant) else gs.Variable.empty()
        for t in tensors
    ]


def _odd_padding(model: Model, node: gs.Node) -> str | None:
    value = node.attrs.get("value", 0.0)
    if len(node.inputs) > 2 and node.inputs[2].name:
        if not isinstance(node.inputs[2], gs.Constant):
            return f"what {node.name} (Pad) pads with is computed"
        value = model.array(node.inputs[2])
    if node.attrs.get("mode", "constant") == "constant" and np.any(value):
        return f"{node.name} (Pad) pads with something else than zeros"
    return None


def _moved(node: gs.Node, axis: int, rank: int, source: np.ndarray) -> Moved:
    if node.op == "Transpose":
        axis = [*(node.attrs.get("perm") or reversed(range(rank)))].index(axis)
    elif source.ndim != rank:  # the axis along which channels mix least
        axis = min(range(1, source.ndim), key=lambda a: _pairs(source, a)[0].size, default=0)
    channels = source.shape[axis]
    pairs, counts = _pairs(source, axis)
    target, index = np.divmod(pairs, source.max() + 2)
    return Moved(axis, channels, target, index - 1, counts * (channels / source.size))


def _pairs(source: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of target and source as one number each, ascending, and how often each occurs."""
    rows = np.moveaxis(source, axis, 0).reshape(source.shape[axis], -1)
    target = np.arange(len(rows))[:, None]
    if (rows == rows[:, :1]).all():
        target, rows, counts = target, rows[:, :1], np.full(len(rows), rows.shape[1])
        return (target * (source.max() + 2) + rows + 1).reshape(-1), counts
    return np.unique(target * (source.max() + 2) + rows + 1, return_counts=True)
