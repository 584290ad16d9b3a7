"""How much wider ranges are than synthetic samples show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Layer, Model, producer
from onnxq.statistics import TensorStatistics

__all__ = ["UNSEEN", "UNSEEN_CLASSES", "class_scores", "widened"]

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


def class_scores(
    model: Model, seen: Mapping[str, TensorStatistics], names: Iterable[str]
) -> set[str]:
    """Those of the tensors that no layer is to come for, with one value per channel and sample.

    Args:
        model: The model.
        seen: Statistics of the tensors.
        names: The tensors.
    """
    inner: set[str] = set()  # what a layer is still to come for
    for node in reversed(model.graph.nodes):
        if Layer.of(model, node) is not None or any(t.name in inner for t in node.outputs):
            inner.update(t.name for t in node.inputs)
    tensors = model.tensors()
    return {n for n in names if n not in inner and _has_one_position(tensors[n], seen[n])}


def widened(
    tensor: gs.Tensor, low: float, high: float, *, is_score: bool = False
) -> tuple[float, float]:
    """The range that a tensor may have where synthetic samples showed this one.

    Args:
        tensor: The tensor.
        low: Least value seen, or 0.
        high: Greatest value seen, or 0.
        is_score: Whether it is the score of a class.
    """
    node = producer(tensor)
    least, most = _LIMITS.get("" if node is None else node.op, (-np.inf, np.inf))
    least, most = min(low, least), max(high, most)
    if is_score:
        low, high = min(low, -high), max(high, -low)
    margin = UNSEEN_CLASSES if is_score else UNSEEN
    return max(low * margin, least), min(high * margin, most)


def _has_one_position(tensor: gs.Tensor, seen: TensorStatistics) -> bool:
    """Whether a sample gives each channel one value."""
    shape: Sequence[object] = tensor.shape or ()
    if len(shape) < 2 or not isinstance(shape[1], int):
        return False
    batch = shape[0] if isinstance(shape[0], int) else 1
    return seen.count <= seen.batches * batch * shape[1]
