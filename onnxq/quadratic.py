"""The error of a layer's output as a quadratic in its rounded weight.

With d = q - w for a row w of the weight, the expected squared error of its output is, but for what
no rounding changes, ``d H d^T + 2 d g``.  There is a ``g = w (H - C)`` where the layer meets other
inputs than the float layer did, see `onnxq.second_order`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxq.biases import least_scale, written_bias
from onnxq.encoding import SMALLEST_SCALE, Encoding
from onnxq.kernels.objective import objective
from onnxq.kernels.rounding import gptq, inverse_factor, shrink, solved
from onnxq.kernels.scales import (
    output_scale,
    output_scales,
    refit_scale,
    refit_scales,
    searched_scales,
)
from onnxq.model import Layer
from onnxq.patches import rows_of, weight_of
from onnxq.placement import Ends
from onnxq.second_order import SecondOrder, correct_bias, takes_bias
from onnxq.targets import Kernel

__all__ = ["Quadratic", "settle"]

# Of the mean of H's diagonal, added to it: patches may span fewer dimensions than they have.
_RIDGE = 1e-6
# Scales that are tried before short searches look around the best of them.
_CANDIDATES = 12


@dataclass(frozen=True)
class Quadratic:
    """One layer's rounding as an optimization problem.

    Args:
        rows: The weight, float32 [G, R, K].
        gram: H, drawn towards its diagonal by its sampling noise, float64 [G, K, K].
        linear: g, float64 [G, R, K]; None for 0.
        scale: Scale of each row, float32 [G * R].
        zero: Zero point of each row, int32 [G * R].
        qmin: Least integer.
        qmax: Greatest integer.
        per_tensor: Whether all rows share one scale.
        least: Scales below which the bias would overflow int32, float64 [G * R].
    """

    rows: np.ndarray
    gram: np.ndarray
    linear: np.ndarray | None
    scale: np.ndarray
    zero: np.ndarray
    qmin: int
    qmax: int
    per_tensor: bool
    least: np.ndarray

    @classmethod
    def of(cls, layer: Layer, statistics: SecondOrder) -> Quadratic:
        """The problem of a layer whose weight has an encoding.

        About the means where a bias makes up for their shift. The rounding noise of the layer's
        integer input, s_x^2 / 12, is added where the statistics do not hold it already.
        """
        encoding = layer.model.encodings[layer.weight_tensor.name]
        biased = takes_bias(layer)
        rows = np.ascontiguousarray(rows_of(layer), np.float32)
        linear = None
        noise = 0.0
        if statistics.is_shifted:
            linear = statistics.drift(rows, centred=biased)
            linear *= _trust(rows, statistics, biased)
        else:
            x = layer.model.encodings.get(layer.x.name)
            noise = 0.0 if x is None else float(x.scale) ** 2 / 12
        # only now, since a large H fills the memory as often as it is at hand
        apart = [_short(half, biased) for half in statistics.halves or ()]
        moment = _moment(statistics, biased)
        for g, h in enumerate(moment):
            moment[g] = shrink(h, statistics.sampled, *(a[g] for a in apart))
            ridge = noise + _RIDGE * float(np.trace(h)) / len(h) + 1e-30
            moment[g].flat[:: len(h) + 1] += ridge
        count = rows.shape[0] * rows.shape[1]
        scale = np.ascontiguousarray(np.broadcast_to(encoding.scale, count), np.float32)
        zero = np.ascontiguousarray(np.broadcast_to(encoding.zero_point, count), np.int32)
        return cls(
            rows=rows,
            gram=moment,
            linear=linear,
            scale=scale,
            zero=zero,
            qmin=encoding.qmin,
            qmax=encoding.qmax,
            per_tensor=encoding.axis is None,
            least=np.minimum(np.broadcast_to(_least(layer), count), scale),
        )

    def with_scale(self, scale: np.ndarray) -> Quadratic:
        """The same with other scales, [G * R]."""
        return replace(self, scale=scale.astype(np.float32))

    def best_scale(self, seed: int, threads: int) -> np.ndarray:
        """Scales of least objective, found by short searches; one for all, or per row, [G * R]."""
        given = (self.rows, self.zero, self.qmin, self.qmax, self.gram, self.linear)
        if self.per_tensor:
            one = output_scale(*given, base=float(self.scale[0]))
            scale = np.full(self.scale.shape, max(float(one), self.least.max()))
            return np.asarray(scale, np.float32)
        around = output_scales(*given, base=self.scale, candidates=_CANDIDATES)
        around = np.maximum(around, self.least)
        found = searched_scales(*given, around=around, seed=seed, threads=threads)
        return np.asarray(np.maximum(found, self.least), np.float32)

    def refitted(self, values: np.ndarray) -> tuple[Quadratic, np.ndarray]:
        """The problem with the scales that serve the integers of a rounding best, and its values.

        Where one scale is for all rows, that is their sum's best.  Rows whose best is none that may
        be keep their scale.
        """
        scale = self.scale.reshape(*self.rows.shape[:2], 1)
        codes = np.rint(values / scale)
        if self.per_tensor:
            new = np.full(self.scale.shape, refit_scale(self.rows, codes, self.gram, self.linear))
        else:
            new = refit_scales(self.rows, codes, self.gram, self.linear)
        fits = (new >= np.maximum(self.least, SMALLEST_SCALE)) & np.isfinite(new)
        fits &= fits.all() or not self.per_tensor
        new = np.where(fits, new, self.scale).astype(np.float32)
        moved = codes.astype(np.float32) * new.reshape(scale.shape)
        return self.with_scale(new), np.where(fits.reshape(scale.shape), moved, values)

    @property
    def nearest(self) -> np.ndarray:
        """The weight rounded to nearest, float32 [G, R, K]."""
        shape = (*self.rows.shape[:2], 1)
        scale, zero = self.scale.reshape(shape), self.zero.reshape(shape)
        codes = np.clip(np.rint(self.rows / scale) + zero, self.qmin, self.qmax) - zero
        return np.asarray(codes.astype(np.float32) * scale)

    def column_by_column(self) -> np.ndarray:
        """GPTQ's rounding, float32 [G, R, K]; not finite where H cannot be factored.

        With g, it is that of the weight that serves the layer's new input best, w - g H^-1.

        Source: Frantar et al. 2022 (arXiv 2210.17323).
        """
        groups, each, columns = self.rows.shape
        found = np.empty(self.rows.shape, np.float32)  # in C order, as the kernel is compiled for
        for g in range(groups):
            part = slice(g * each, (g + 1) * each)
            wanted = self.rows[g].copy()
            try:
                factor = inverse_factor(self.gram[g], 0.0)
                if self.linear is not None:
                    wanted -= np.linalg.solve(self.gram[g], self.linear[g].T).T.astype(np.float32)
            except np.linalg.LinAlgError:
                factor = np.full((columns, columns), np.nan, np.float32)
            gptq(wanted, self.scale[part], self.zero[part], self.qmin, self.qmax, factor, found[g])
        return found

    def cost(self, values: np.ndarray) -> np.ndarray:
        """The objective of each row for values on the grid, float64 [G * R]."""
        return np.asarray(objective(values - self.rows, self.gram, self.linear))

    def better(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Row by row the better of two roundings; the first where they are equal."""
        wins = (self.cost(other) < self.cost(one)).reshape(*self.rows.shape[:2], 1)
        return np.where(wins, other, one)


def settle(
    layer: Layer, rounded: np.ndarray, statistics: SecondOrder | None, scale: np.ndarray
) -> None:
    """Give a layer its rounded weight, the scales, and the bias that goes with them.

    Args:
        layer: The layer, its weight still in float.
        rounded: Values on the grid, [G, R, K].
        statistics: Of its input; None leaves the bias as it is.
        scale: Scale of each row, [G * R].
    """
    name = layer.weight_tensor.name
    encoding: Encoding = layer.model.encodings[name]
    if statistics is not None and takes_bias(layer):
        correct_bias(layer, rounded, statistics)
    layer.set_weight(weight_of(layer, rounded).astype(np.float32))
    known = scale[: encoding.scale.size].reshape(encoding.scale.shape)  # the first is that of all
    layer.model.encodings[layer.weight_tensor.name] = replace(encoding, scale=known)


def _least(layer: Layer) -> np.ndarray:
    """The least scale that the bias of a layer allows, [O] or [1]."""
    encodings = layer.model.encodings
    x = encodings.get(layer.x.name)
    if x is None or layer.op not in ("Conv", "Gemm"):
        return np.zeros(1)
    end = Ends(layer.model, encodings.float_nodes).of(layer.y, Kernel("layer"))
    return least_scale(written_bias(layer, end), float(x.scale))


def _moment(statistics: SecondOrder, biased: bool) -> np.ndarray:
    """H, about the mean where a bias makes up for its shift, [G, K, K]."""
    return statistics.covariance if biased else statistics.moment


def _short(statistics: SecondOrder, biased: bool) -> np.ndarray:
    """The same as it was added up: in float32 where K is large."""
    if biased:
        return np.asarray(statistics.scatter / np.float32(max(statistics.sampled, 1)))
    return statistics.moment.astype(statistics.scatter.dtype)


def _trust(rows: np.ndarray, statistics: SecondOrder, biased: bool) -> float:
    """How much of g helps on samples that it was not computed from, from 0 to 1.

    The move that g asks for, -g H^-1, is computed from each half of the samples, and scaled by
    what serves the other half best.  Few samples show drifts that no others have.
    """
    if statistics.halves is None:
        return 0.0
    found = []
    for one, other in (statistics.halves, statistics.halves[::-1]):
        here, there = _short(one, biased), _short(other, biased)
        pull, test = (half.drift(rows, centred=biased) for half in (one, other))
        gain = cost = 0.0
        for g, h in enumerate(here):
            h = shrink(h, one.sampled, here[g], there[g])
            h.flat[:: len(h) + 1] += _RIDGE * np.trace(h) / len(h) + 1e-30
            move = -_solved(h, pull[g])
            gain -= float(np.einsum("ok,ok->", move, test[g]))
            cost += float(np.einsum("ok,ok->", move @ there[g], move, dtype=np.float64))
        found.append(gain / cost if cost > 0 else 0.0)
    return float(np.clip(np.mean(found), 0.0, 1.0))


def _solved(h: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """G H^-1, in H's precision where that leaves no more than a hundredth of g."""
    if h.dtype == np.float64:
        return np.asarray(np.linalg.solve(h, pull.T).T)
    try:
        found = solved(h, pull)
    except np.linalg.LinAlgError:
        found = np.zeros_like(pull)
    missed = np.linalg.norm(found @ h - pull)
    if missed <= 0.01 * np.linalg.norm(pull):
        return found
    return np.asarray(np.linalg.solve(h.astype(np.float64), pull.T).T)
