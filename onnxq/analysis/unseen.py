"""How much wider ranges are than synthetic samples show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Layer, Model, producer
from onnxq.statistics import TensorStatistics

__all__ = ["UNSEEN", "UNSEEN_CLASSES", "margins", "widened"]

# Factors on ranges: in general, and for results that have one value per class. Only samples of a
# class make them large, and only others negative: they get room on both sides.
UNSEEN, UNSEEN_CLASSES = 1.1, 2.0
# Ranges that functions cannot leave.
_LIMITS = {
    "HardSigmoid": (0.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}


def margins(
    model: Model, seen: Mapping[str, TensorStatistics], names: Iterable[str]
) -> dict[str, float]:
    """By what factor to widen the range of each tensor.

    Those of the model's inputs stay: what is made up for them has the range that they are meant to
    have.

    Args:
        model: The model.
        seen: Statistics of the tensors over synthetic samples.
        names: The tensors.
    """
    inner: set[str] = set()  # what a layer is still to come for
    for node in reversed(model.graph.nodes):
        if Layer.of(model, node) is not None or any(t.name in inner for t in node.outputs):
            inner.update(t.name for t in node.inputs)
    tensors = model.tensors()
    return {
        name: UNSEEN_CLASSES
        if name not in inner and _has_one_position(tensors[name], seen[name])
        else UNSEEN
        for name in names
        if name not in model.inputs
    }


def widened(
    tensor: gs.Tensor, low: float, high: float, margin: float = UNSEEN
) -> tuple[float, float]:
    """The range of a tensor times a margin, as far as its function can reach."""
    node = producer(tensor)
    least, most = _LIMITS.get("" if node is None else node.op, (-np.inf, np.inf))
    least, most = min(low, least), max(high, most)
    if margin == UNSEEN_CLASSES:
        low, high = min(low, -high), max(high, -low)
    return max(low * margin, least), min(high * margin, most)


def _has_one_position(tensor: gs.Tensor, seen: TensorStatistics) -> bool:
    """Whether a sample gives each channel one value."""
    shape: Sequence[object] = tensor.shape or ()
    if len(shape) < 2 or not isinstance(shape[1], int):
        return False
    batch = shape[0] if isinstance(shape[0], int) else 1
    return seen.count <= seen.batches * batch * shape[1]
