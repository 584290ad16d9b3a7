"""Samples whose activations have the moments that BatchNormalization knew from training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import reductions
from onnxq.feeds import Feed
from onnxq.model import BatchNormStatistics, Model, is_standard
from onnxq.runtime import Session, cores

__all__ = ["MomentSession", "Moments", "NormTargets", "herd"]

# Below this share of its tensor's median, gamma belongs to a channel that is as good as dead.
DEAD = 1e-2
# A channel that is further off than this, in standard errors of a sample, counts no more.
FAR = 30.0
SWAPS = 8


@dataclass(frozen=True)
class Moments:
    """Means and mean squares per channel, one row per sample, float64 [S, C].

    Args:
        mean: Of the values.
        square: Of their squares.
    """

    mean: np.ndarray
    square: np.ndarray


@dataclass(frozen=True, eq=False)
class NormTargets:
    """Mean and standard deviation that training saw behind each BatchNormalization.

    Args:
        names: The tensors, in graph order.
        beta: Means per channel, all tensors in a row, float64 [C].
        gamma: Standard deviations, the same.
        tensor: The number of the tensor that a channel belongs to.
    """

    names: tuple[str, ...]
    beta: np.ndarray
    gamma: np.ndarray
    tensor: np.ndarray

    @classmethod
    def of(
        cls, model: Model, most: int | None = None, among: Collection[str] | None = None
    ) -> NormTargets | None:
        """Those of a model, whether its normalizations are folded or not.

        Args:
            model: The model, shapes inferred.
            most: Only so many tensors, the first ones.
            among: Only tensors of these names.

        Returns:
            None if there are none.
        """
        found = {n: s for n, s in _known(model).items() if _has_channels(model, n, s)}
        names = tuple(n for n in found if among is None or n in among)[:most]
        if not names:
            return None
        statistics = [found[n] for n in names]
        return cls(
            names,
            np.concatenate([s.beta for s in statistics]).astype(np.float64),
            np.abs(np.concatenate([s.gamma for s in statistics])).astype(np.float64),
            np.repeat(np.arange(len(names)), [s.beta.size for s in statistics]),
        )

    @property
    def live(self) -> np.ndarray:
        """Which channels vary enough to be compared, bool [C]."""
        medians = np.array([np.median(self.gamma[self.tensor == t]) for t in range(self._count)])
        result: np.ndarray = self.gamma > np.maximum(DEAD * medians[self.tensor], 1e-12)
        return result

    @property
    def _count(self) -> int:
        return len(self.names)

    def divergence(self, moments: Moments) -> float:
        """How far samples taken together are from training; 0 is no difference.

        The mean over tensors of the mean over channels of log(1 + KL(N(m, v) || N(beta, gamma^2))),
        the logarithm for channels that no input can bring right.
        """
        live, mean = self.live, moments.mean.mean(axis=0)
        if not live.any():
            return 0.0
        variance = moments.square.mean(axis=0) - mean**2
        ratio = np.maximum(variance[live] / self.gamma[live] ** 2, 1e-9)
        shift = (mean[live] - self.beta[live]) / self.gamma[live]
        error = np.log1p(np.maximum(0.5 * (ratio + shift**2 - 1 - np.log(ratio)), 0))
        tensor = self.tensor[live]
        total = np.bincount(tensor, error, self._count)
        count = np.bincount(tensor, minlength=self._count)
        return float(np.mean(total[count > 0] / count[count > 0]))

    def features(self, moments: Moments) -> np.ndarray:
        """Deviations of each sample, float32 [S, F]; samples whose sum is near 0 match together.

        Means in units of gamma, mean squares in units of their spread; each tensor counts the same.
        """
        live = self.live
        beta, gamma = self.beta[live], self.gamma[live]
        mean = (moments.mean[:, live] - beta) / gamma
        spread = gamma**2 * np.sqrt(2 + 4 * (beta / gamma) ** 2)
        square = (moments.square[:, live] - beta**2 - gamma**2) / spread
        weight = 1 / np.sqrt(np.bincount(self.tensor[live], minlength=self._count))
        weights = np.tile(weight[self.tensor[live]], 2)
        both = np.clip(np.concatenate([mean, square], axis=1), -FAR, FAR)
        return np.asarray(both * weights, np.float32)


def herd(features: np.ndarray, count: int) -> list[int]:
    """The rows, each at most once, whose sum is about as near to zero as can be.

    Greedy, then exchanged one by one while that helps (kernel herding, Welling 2009).

    Args:
        features: float32 [S, F].
        count: How many rows to choose.

    Returns:
        Their numbers, ascending.
    """
    gram = (features @ features.T).astype(np.float64)
    power = np.diag(gram)
    left = np.ones(len(gram), bool)
    chosen: list[int] = []
    reach = np.zeros(len(gram))  # inner products with the sum of those chosen
    for _ in range(min(count, len(gram))):
        best = int(np.argmin(np.where(left, 2 * reach + power, np.inf)))
        chosen.append(best)
        left[best] = False
        reach += gram[best]
    for _ in range(SWAPS):
        swapped = False
        for place, old in enumerate(chosen):
            reach -= gram[old]
            left[old] = True
            best = int(np.argmin(np.where(left, 2 * reach + power, np.inf)))
            swapped |= best != old
            chosen[place] = best
            left[best] = False
            reach += gram[best]
        if not swapped:
            break
    return sorted(chosen)


class MomentSession:
    """The part of a model before some tensors, giving their moments per channel (axis 1).

    The reductions run inside onnxruntime, several feeds side by side.

    Args:
        model: The model, shapes inferred; the tensors have two axes or more.
        names: The tensors.
        threads: How many feeds at a time; 0 for as many as there are cores.
    """

    def __init__(self, model: Model, names: Sequence[str], threads: int = 0) -> None:
        self.names = tuple(names)
        self._session = Session(_reduced(model, names), threads=1)
        self._streams = min(threads or cores(), cores())

    def run(
        self, feeds: Iterable[Feed], progress: Callable[[int], object] = lambda steps: None
    ) -> Moments:
        """The moments, one row per feed.

        Args:
            feeds: What to run the model on; made in the calling thread.
            progress: Called with 1 after each feed.
        """
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        pending: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(self._streams, thread_name_prefix="onnxq-moments")
        try:
            for feed in feeds:
                pending.append(pool.submit(self._one, feed))
                while len(pending) > self._streams:
                    rows.append(pending.popleft().result())
                    progress(1)
            while pending:
                rows.append(pending.popleft().result())
                progress(1)
        finally:
            pool.shutdown(cancel_futures=True)
        mean, square = zip(*rows, strict=True)
        return Moments(np.stack(mean), np.stack(square))

    def _one(self, feed: Feed) -> tuple[np.ndarray, np.ndarray]:
        values = self._session.run({s.name: feed[s.name] for s in self._session.inputs})
        means, squares = [], []
        for name in self.names:
            mean = values[f"{name}/mean"].astype(np.float64).reshape(-1)
            count = float(values[f"{name}/size"]) / mean.size
            means.append(mean)
            squares.append(values[f"{name}/squares"].astype(np.float64) / count + mean**2)
        return np.concatenate(means), np.concatenate(squares)


def _reduced(model: Model, names: Sequence[str]) -> onnx.ModelProto:
    """The part of the model before some tensors, putting out their moments."""
    part = model.clone()
    tensors = part.tensors()
    part.graph.outputs = [tensors[name] for name in names]
    part.cleanup()
    return reductions.with_moments(part, reductions.ranks(part, names))


def _known(model: Model) -> dict[str, BatchNormStatistics]:
    """Statistics by tensor, in graph order, folded normalizations and those in the graph."""
    found = {}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            if tensor.name in model.batch_norms:
                found[tensor.name] = model.batch_norms[tensor.name]
        if node.op == "BatchNormalization" and is_standard(node):
            gamma, beta = node.inputs[1:3]
            if isinstance(gamma, gs.Constant) and isinstance(beta, gs.Constant):
                statistics = BatchNormStatistics(model.array(gamma), model.array(beta))
                found[node.outputs[0].name] = statistics
    return found


def _has_channels(model: Model, name: str, statistics: BatchNormStatistics) -> bool:
    tensor = model.tensors()[name]
    shape = tensor.shape
    is_float = tensor.dtype == np.float32
    return is_float and shape is not None and len(shape) >= 2 and shape[1] == statistics.beta.size
