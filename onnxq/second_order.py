"""Second-order statistics of layer inputs: means and second moments of the patches a weight meets.

For a layer y = W x, W [O, K] acting on patches x [K], they say how much any change of W changes
the output.  Where the layer will meet the input x' of a model whose earlier layers are quantized::

    E|Q x' - W x|^2  =  tr(Q H Q^T) - 2 tr(Q C^T W^T) + tr(W E[x x^T] W^T)

    H = E[x' x'^T]      C = E[x x'^T]

They are sums, so they stream, in memory that does not depend on the number of samples, and merge.
They are kept about the mean, so that float32 products do not lose a small spread beside a large
mean, and because what a bias can make up for is no error of the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from onnxq.errors import CalibrationError
from onnxq.kernels.gram import add_outer_products
from onnxq.kernels.rounding import shrink
from onnxq.model import Layer, Model
from onnxq.patches import PatchSource, rows_of, supports, weight_of
from onnxq.runtime import Session

__all__ = [
    "Accumulator",
    "SecondOrder",
    "collect",
    "collect_means",
    "correct_bias",
    "input_session",
    "patches_per_sample",
    "pick",
    "rows_of",
    "supports",
    "takes_bias",
    "trusted_moment",
    "weight_of",
]

_T = TypeVar("_T")
_Pair = tuple[np.ndarray, np.ndarray]
_Picked = tuple[np.ndarray, np.ndarray, int, np.ndarray]
Map = Callable[..., Iterable[tuple[int, _Pair, _Pair]]]
# Bytes of patches that are multiplied at once: enough for the speed of large products.
_CHUNK = 32 << 20
# Patches so short are multiplied by a kernel of our own.
_SHORT = 32


@dataclass
class SecondOrder:
    """Moments of the patches x that one layer reads, per group, or of x' where it reads others.

    Args:
        count: How many patches the means are over.
        mean: E[x'] over all patches of all samples, borders included, float64 [G, K].
        reference_mean: E[x] in the float model; the same array where x' is x.
        sampled: How many patches were sampled for what follows.
        sampled_mean: E[x'] over the sampled patches, float64 [G, K].
        sampled_reference: E[x] over the sampled patches, float64 [G, K].
        scatter: Sum of (x' - mean)(x' - mean)^T over them, float64 [G, K, K].
        cross: Sum of (x - mean)(x' - mean)^T over them; the same array where x' is x.
        halves: The statistics of every second sample, and of the others: how far they differ says
            how far the whole can be trusted.  None where they were not kept apart.
    """

    count: int
    mean: np.ndarray
    reference_mean: np.ndarray
    sampled: int
    sampled_mean: np.ndarray
    sampled_reference: np.ndarray
    scatter: np.ndarray
    cross: np.ndarray
    halves: tuple[SecondOrder, SecondOrder] | None = None

    @property
    def covariance(self) -> np.ndarray:
        """H about the mean: what a bias cannot make up for, [G, K, K]."""
        return np.asarray(self.scatter / max(self.sampled, 1))

    @property
    def moment(self) -> np.ndarray:
        """H = E[x' x'^T], [G, K, K]."""
        return np.asarray(self.covariance + _outer(self.sampled_mean, self.sampled_mean))

    @property
    def cross_covariance(self) -> np.ndarray:
        """C about the means, [G, K, K]."""
        return np.asarray(self.cross / max(self.sampled, 1))

    @property
    def cross_moment(self) -> np.ndarray:
        """C = E[x x'^T], [G, K, K]."""
        means = _outer(self.sampled_reference, self.sampled_mean)
        return np.asarray(self.cross_covariance + means)

    @property
    def is_shifted(self) -> bool:
        """Whether the input differs from that of the float model."""
        return self.cross is not self.scatter

    def merge(self, other: SecondOrder) -> SecondOrder:
        """The statistics over the samples of both.

        Source: Chan, Golub and LeVeque 1979 (pairwise update of sums of squares).
        """
        count, sampled = self.count + other.count, self.sampled + other.sampled
        weight, part = other.count / max(count, 1), other.sampled / max(sampled, 1)
        moved = other.sampled_mean - self.sampled_mean
        scale = self.sampled * part
        mean = self.mean + weight * (other.mean - self.mean)
        sampled_mean = self.sampled_mean + part * moved
        scatter = self.scatter + other.scatter + scale * _outer(moved, moved)
        if not (self.is_shifted or other.is_shifted):
            return SecondOrder(
                count, mean, mean, sampled, sampled_mean, sampled_mean, scatter, scatter
            )
        drift = other.sampled_reference - self.sampled_reference
        return SecondOrder(
            count=count,
            mean=mean,
            reference_mean=self.reference_mean
            + weight * (other.reference_mean - self.reference_mean),
            sampled=sampled,
            sampled_mean=sampled_mean,
            sampled_reference=self.sampled_reference + part * drift,
            scatter=scatter,
            cross=self.cross + other.cross + scale * _outer(drift, moved),
        )


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(a[:, :, None] * b[:, None, :])


class Accumulator:
    """Adds up second-order statistics of one source, sample by sample.

    Args:
        source: The input and its window.
        patches: Patches to draw of each sample, about.
        rng: Draws their positions.
        shifted: Whether the float model's input is given, too, and differs.
        halves: Whether to keep every second sample apart.
        reference: How that is drawn, where it is not such patches, but something else at the same
            positions: the cross moment is with these.
    """

    def __init__(
        self,
        source: PatchSource,
        patches: int,
        rng: np.random.Generator,
        *,
        shifted: bool = False,
        halves: bool = False,
        reference: PatchSource | None = None,
    ) -> None:
        self._source = source
        self._other = reference or source
        self._patches = patches
        self._rng = rng
        self._shifted = shifted
        self._count = 0
        self._total, self._reference = (
            np.zeros((s.groups, s.columns)) for s in (source, self._other)
        )
        most = max(1, _CHUNK // (4 * source.groups * source.columns))
        self._parts = [_Part(shifted, most) for _ in range(1 + halves)]
        self._seen = 0

    def add(self, x: np.ndarray, reference: np.ndarray | None = None) -> None:
        """Take in one sample.

        Args:
            x: The layer's input, float32.
            reference: The same in the float model, where the statistics are `shifted`.
        """
        self.add_all([(x, x if reference is None else reference)], map)

    def add_all(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]], each: Map = map) -> None:
        """Take in samples: what the layer reads, and the same in the float model.

        Args:
            pairs: Of arrays, float32; the second counts where the statistics are `shifted`.
            each: As `map`; that of an executor draws patches side by side.
        """
        for positions, totals, drawn in each(self._drawn, self._picked(pairs)):
            self._count += positions
            self._total += totals[0]
            self._reference += totals[1]
            self._parts[self._seen % len(self._parts)].add(drawn)
            self._seen += 1

    def _picked(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[_Picked]:
        for x, reference in pairs:
            positions = self._source.positions(x)
            yield x, reference, positions, pick(positions, self._patches, self._rng)

    def _drawn(self, given: _Picked) -> tuple[int, _Pair, _Pair]:
        """How many patches a sample has, their sums, and some of them: of x' and of x."""
        x, reference, positions, picked = given
        total, drawn = self._source.sums(x), self._source.draw(x, picked)
        if not self._shifted:
            return positions, (total, total), (drawn, drawn)
        known = self._other.sums(reference), self._other.draw(reference, picked)
        return positions, (total, known[0]), (drawn, known[1])

    def result(self) -> SecondOrder | None:
        """What came of it; None if there was no patch.

        Raises:
            CalibrationError: A value was not finite.
        """
        parts = [part.result() for part in self._parts]
        known = [part for part in parts if part is not None]
        if not known or not self._count:
            return None
        found = known[0] if len(known) == 1 else known[0].merge(known[1])
        found.halves = (known[0], known[1]) if len(known) == 2 else None
        found.count = self._count
        found.mean = self._total / self._count
        found.reference_mean = self._reference / self._count if self._shifted else found.mean
        if not np.isfinite(found.scatter).all() or not np.isfinite(found.cross).all():
            raise CalibrationError(
                "values are NaN or infinite, or too large for their squares",
                where=f"tensor {self._source.name}",
                fix="check the samples, and that they are preprocessed as in training",
            )
        return found


class _Part:
    """Patches of some of the samples, multiplied whenever enough have come together."""

    def __init__(self, shifted: bool, most: int) -> None:
        self._shifted = shifted
        self._most = most
        self._kept: list[_Pair] = []
        self._rows = 0
        self._sum: SecondOrder | None = None

    def add(self, drawn: _Pair) -> None:
        self._kept.append(drawn)
        self._rows += len(drawn[0])
        if self._rows >= self._most:
            self._reduce()

    def result(self) -> SecondOrder | None:
        self._reduce()
        return self._sum

    def _reduce(self) -> None:
        if not self._rows:
            return
        x = np.concatenate([a for a, _ in self._kept])
        y = np.concatenate([b for _, b in self._kept]) if self._shifted else x
        mean = x.mean(axis=0, dtype=np.float64)
        known = y.mean(axis=0, dtype=np.float64) if self._shifted else mean
        scatter = _products(x, x, mean, mean)
        cross = _products(y, x, known, mean) if self._shifted else scatter
        part = SecondOrder(self._rows, mean, known, self._rows, mean, known, scatter, cross)
        self._sum = part if self._sum is None else self._sum.merge(part)
        self._kept, self._rows = [], 0


def _products(a: np.ndarray, b: np.ndarray, centre: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Per group the sum of (a - centre) (b - other)^T over patches, added up in float32.

    Args:
        a: float32 [P, G, J].
        b: float32 [P, G, K]; the same array costs half (syrk).
        centre: Mean of a, [G, J].
        other: Mean of b, [G, K].

    Returns:
        float64 [G, J, K].
    """
    means = centre.astype(np.float32), other.astype(np.float32)
    _, groups, columns = a.shape
    total = np.zeros((groups, columns, b.shape[2]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the result
        if groups > 1 and a.shape == b.shape and columns <= _SHORT:
            add_outer_products(a, b, *means, total)
        else:
            for g in range(groups):
                left = a[:, g] - means[0][g]
                right = left if a is b else b[:, g] - means[1][g]
                np.dot(left.T, right, out=total[g])
    return total.astype(np.float64)


def takes_bias(layer: Layer) -> bool:
    """Whether the bias of a layer can be moved: it may have one, and none that is computed."""
    if layer.op not in ("Conv", "ConvTranspose", "Gemm"):
        return False
    return layer.bias is not None or layer.bias_tensor is None


def correct_bias(layer: Layer, rounded: np.ndarray, statistics: SecondOrder | np.ndarray) -> None:
    """Move the bias so that rounding the weight W to Q keeps the mean output: b += W m - Q m'.

    Args:
        layer: A layer that takes a bias and has no computed one, its weight not yet rounded.
        rounded: Q as rows, [G, O/G, K].
        statistics: What holds the mean patches m and m', or m = m' itself, [G, K].
    """
    if isinstance(statistics, SecondOrder):
        wanted, given = statistics.reference_mean, statistics.mean
    else:
        wanted = given = statistics
    before = np.einsum("gok,gk->go", rows_of(layer).astype(np.float64), wanted)
    shift = (before - np.einsum("gok,gk->go", rounded.astype(np.float64), given)).reshape(-1)
    alpha = float(layer.node.attrs.get("alpha", 1.0))  # of a Gemm
    layer.set_bias((layer.take_bias() + alpha * shift).astype(np.float32))


def trusted_moment(layer: Layer, known: SecondOrder) -> np.ndarray:
    """H of a layer's input as far as the samples can be trusted, [G, K, K].

    It is about the mean where a bias makes up for that, and drawn towards its diagonal by as much
    as its halves differ, see `shrink`.
    """

    def moment(part: SecondOrder) -> np.ndarray:
        return part.covariance if takes_bias(layer) else part.moment

    halves = [moment(half) for half in known.halves or ()]
    return np.array(
        [
            shrink(h, known.sampled, *(half[g] for half in halves))
            for g, h in enumerate(moment(known))
        ]
    )


def input_session(model: Model, layers: Sequence[Layer], threads: int) -> Session:
    """The model, with the inputs of the layers among its outputs."""
    names = dict.fromkeys(layer.x.name for layer in layers)
    inner = [name for name in names if name not in model.inputs]
    return Session(model.to_proto(inner), outputs=inner, threads=threads)


def collect(
    layers: Sequence[Layer],
    session: Session,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    expected: int,
    rng: np.random.Generator,
    patches: int = 8192,
    halves: bool = False,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict[str, SecondOrder]:
    """Second-order statistics of the inputs of layers, by layer name.

    Args:
        layers: Layers that `supports`.
        session: The model, with the inputs of the layers among its outputs.
        samples: What to run it on.
        expected: About how many samples there are, to spread the patches over them.
        rng: Draws the positions of the patches.
        patches: Patches per layer, about; layers with more than a quarter as many weights per
            output draw four per weight.
        halves: Whether to keep every second sample apart.
        progress: Called with 1 after each sample.
    """
    sums = {
        source: Accumulator(
            source, patches_per_sample(source, patches, expected), rng, halves=halves
        )
        for source in _sources(layers)
    }
    for source, x in _inputs(sums, session, samples, progress):
        sums[source].add(x)
    return _by_layer(layers, {source: total.result() for source, total in sums.items()})


def patches_per_sample(source: PatchSource, patches: int, samples: int) -> int:
    """How many patches of a source to draw of each of so many samples; at least one."""
    return max(1, -(-max(patches, 4 * source.columns) // max(samples, 1)))


def collect_means(
    layers: Sequence[Layer],
    session: Session,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict[str, np.ndarray]:
    """The mean patch [G, K] of each layer's input alone; the arguments are those of `collect`."""
    means = {source: _Mean() for source in _sources(layers)}
    for source, x in _inputs(means, session, samples, progress):
        means[source].add(source, x)
    return _by_layer(layers, {source: mean.result() for source, mean in means.items()})


@dataclass
class _Mean:
    total: np.ndarray = field(default_factory=lambda: np.zeros(1))
    count: int = 0

    def add(self, source: PatchSource, x: np.ndarray) -> None:
        self.total = self.total + source.sums(x)
        self.count += source.positions(x)

    def result(self) -> np.ndarray | None:
        return self.total / self.count if self.count else None


def _sources(layers: Sequence[Layer]) -> list[PatchSource]:
    return [*dict.fromkeys(map(PatchSource.of, layers))]


def _inputs(
    sources: Iterable[PatchSource],
    session: Session,
    samples: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], object],
) -> Iterable[tuple[PatchSource, np.ndarray]]:
    for feed in samples:
        values = {**feed, **session.run_shared(feed)}
        for source in sources:
            yield source, np.asarray(values[source.name], np.float32)
        del values  # before the next ones are made
        progress(1)


def _by_layer(layers: Sequence[Layer], found: Mapping[PatchSource, _T | None]) -> dict[str, _T]:
    results = ((layer.name, found[PatchSource.of(layer)]) for layer in layers)
    return {name: result for name, result in results if result is not None}


def pick(positions: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """The positions of about so many patches, in order: all where there are no more."""
    if positions <= wanted:
        return np.arange(positions)
    return np.sort(rng.integers(0, positions, wanted))
