"""Second-order statistics of layer inputs: mean and second moment of the patches a weight meets.

For a layer y = W x, W [O, K] acting on patches x [K], they say how much any change of W changes
the output: E|(W' - W) x|^2 = tr((W' - W) H (W' - W)^T) with H = E[x x^T].  They are sums, so they
stream: memory does not depend on the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from onnxq.kernels.patches import add_patch_sums, gather_patches
from onnxq.model import Layer, Model
from onnxq.ops import conv_window
from onnxq.runtime import Session

__all__ = [
    "SecondOrder",
    "collect",
    "collect_means",
    "correct_bias",
    "input_session",
    "rows_of",
    "supports",
    "weight_of",
]


_T = TypeVar("_T")
_Three = tuple[int, int, int]
_Geometry = tuple[_Three, _Three, _Three, _Three, _Three]


@dataclass
class SecondOrder:
    """Moments of the patches that one layer reads, per group.

    Args:
        mean: E[x] over all patches of all samples, borders included, float64 [G, K].
        moment: E[x x^T] over the sampled patches, float64 [G, K, K].
        sampled_mean: E[x] over the sampled patches, float64 [G, K].
        sampled: How many patches were sampled.
    """

    mean: np.ndarray
    moment: np.ndarray
    sampled_mean: np.ndarray
    sampled: int

    @property
    def covariance(self) -> np.ndarray:
        """The second moment about the mean: what a bias cannot make up for, [G, K, K]."""
        about: np.ndarray = np.einsum("gk,gl->gkl", self.sampled_mean, self.sampled_mean)
        return np.asarray(self.moment - about)


def rows_of(layer: Layer, weight: np.ndarray | None = None) -> np.ndarray:
    """The weight as rows that multiply patches, [G, O/G, K].

    Args:
        layer: Conv [O, I/g, ...], Gemm [K, N] or [N, K], MatMul [K, N].
        weight: Other values, laid out as the layer's weight.
    """
    weight = layer.weight if weight is None else weight
    if layer.op == "Conv":
        return weight.reshape(layer.group, weight.shape[0] // layer.group, -1)
    if layer.op == "Gemm" and layer.node.attrs.get("transB", 0):
        return weight[None]
    return weight.T[None]


def weight_of(layer: Layer, rows: np.ndarray) -> np.ndarray:
    """The inverse of `rows_of`: rows [G, O/G, K] in the layout of the layer's weight."""
    if layer.op == "Conv" or (layer.op == "Gemm" and layer.node.attrs.get("transB", 0)):
        return rows.reshape(layer.weight.shape)
    return np.ascontiguousarray(rows[0].T)


def supports(layer: Layer) -> bool:
    """Whether the layer is one whose patches can be collected."""
    if layer.op == "Conv":
        return layer.weight.ndim <= 5
    if layer.op == "Gemm":
        return layer.side == 1 and not layer.node.attrs.get("transA", 0)
    return layer.op == "MatMul" and layer.side == 1 and layer.weight.ndim == 2


def correct_bias(layer: Layer, rounded: np.ndarray, mean: np.ndarray) -> None:
    """Move the bias so that rounding the weight W to Q keeps the mean output: b += (W - Q) m.

    Args:
        layer: A Conv or Gemm without computed bias, its weight not yet rounded.
        rounded: Q as rows, [G, O/G, K].
        mean: m, the mean patch, [G, K].
    """
    error = rows_of(layer).astype(np.float64) - rounded
    shift = np.einsum("gok,gk->go", error, mean).reshape(-1)
    alpha = float(layer.node.attrs.get("alpha", 1.0))  # of a Gemm
    layer.set_bias((layer.take_bias() + alpha * shift).astype(np.float32))


@dataclass
class _Source:
    """One input with one window; layers that share both share the statistics."""

    name: str
    op: str
    groups: int
    size: tuple[int, ...]
    attrs: Mapping[str, object]
    columns: int
    layers: list[Layer] = field(default_factory=list)
    total: np.ndarray | None = None
    count: int = 0
    moment: np.ndarray | None = None
    sampled_total: np.ndarray | None = None
    sampled: int = 0

    def add_mean(self, x: np.ndarray) -> None:
        if self.op == "Conv":
            cube, positions, geometry = self._unfolding(x)
            if self.total is None:
                self.total = np.zeros((x.shape[1], *geometry[0]))
            add_patch_sums(cube, *geometry, self.total)
            self.count += positions
            return
        rows = x.reshape(-1, x.shape[-1])
        part = rows.sum(axis=0, dtype=np.float64)
        self.total = part if self.total is None else self.total + part
        self.count += rows.shape[0]

    def add_moment(self, x: np.ndarray, patches: int, rng: np.random.Generator) -> None:
        drawn = self._draw(x, patches, rng)
        columns = drawn.shape[1] // self.groups  # -1 would not do: there may be no patch
        grouped = drawn.reshape(len(drawn), self.groups, columns).transpose(1, 0, 2)
        moment = np.matmul(grouped.transpose(0, 2, 1), grouped).astype(np.float64)
        sums = grouped.sum(axis=1, dtype=np.float64)
        self.moment = moment if self.moment is None else self.moment + moment
        self.sampled_total = sums if self.sampled_total is None else self.sampled_total + sums
        self.sampled += len(drawn)

    def _draw(self, x: np.ndarray, patches: int, rng: np.random.Generator) -> np.ndarray:
        if self.op != "Conv":
            rows = x.reshape(-1, x.shape[-1])
            return np.asarray(rows[_pick(rows.shape[0], patches, rng)])
        cube, positions, geometry = self._unfolding(x)
        picked = _pick(positions, patches, rng)
        drawn = np.empty((picked.size, x.shape[1] * int(np.prod(geometry[0]))), np.float32)
        gather_patches(cube, *geometry, picked, drawn)
        return drawn

    def _unfolding(self, x: np.ndarray) -> tuple[np.ndarray, int, _Geometry]:
        """The input as [N, C, D, H, W], how many patches it has, and where, as kernels want it."""
        window = conv_window(dict(self.attrs), x.shape[2:], self.size)
        geometry = (
            _three(window.size, 1),
            _three(window.strides, 1),
            _three(window.begin, 0),
            _three(window.dilations, 1),
            _three(window.positions, 1),
        )
        cube = np.ascontiguousarray(x.reshape(*x.shape[:2], *_three(x.shape[2:], 1)))
        return cube, x.shape[0] * int(np.prod(window.positions)), geometry

    def mean(self) -> np.ndarray | None:
        if self.total is None or not self.count:
            return None
        return np.asarray(self.total / self.count).reshape(self.groups, -1)

    def result(self) -> SecondOrder | None:
        mean = self.mean()
        if mean is None or self.moment is None or self.sampled_total is None:
            return None
        return SecondOrder(
            mean=mean,
            moment=self.moment / self.sampled,
            sampled_mean=self.sampled_total / self.sampled,
            sampled=self.sampled,
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
        progress: Called with 1 after each sample.
    """
    sources = _sources(layers)

    def add(source: _Source, x: np.ndarray) -> None:
        wanted = max(patches, 4 * source.columns)
        source.add_mean(x)
        source.add_moment(x, max(1, -(-wanted // max(expected, 1))), rng)

    _observe(sources, session, samples, progress, add)
    return _by_layer(sources, _Source.result)


def collect_means(
    layers: Sequence[Layer],
    session: Session,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict[str, np.ndarray]:
    """The mean patch [G, K] of each layer's input alone; the arguments are those of `collect`."""
    sources = _sources(layers)
    _observe(sources, session, samples, progress, _Source.add_mean)
    return _by_layer(sources, _Source.mean)


def _sources(layers: Sequence[Layer]) -> list[_Source]:
    sources: dict[tuple[object, ...], _Source] = {}
    for layer in layers:
        op = "Conv" if layer.op == "Conv" else "rows"
        size = tuple(layer.weight.shape[2:]) if layer.op == "Conv" else ()
        keys = ("strides", "dilations", "pads", "auto_pad")
        attrs = {k: layer.node.attrs[k] for k in keys if k in layer.node.attrs}
        key = (layer.x.name, op, layer.group, size, repr(attrs))
        if key not in sources:
            columns = rows_of(layer).shape[-1]
            sources[key] = _Source(layer.x.name, op, layer.group, size, attrs, columns)
        sources[key].layers.append(layer)
    return list(sources.values())


def _observe(
    sources: Sequence[_Source],
    session: Session,
    samples: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], object],
    add: Callable[[_Source, np.ndarray], None],
) -> None:
    for feed in samples:
        values = {**feed, **session.run_shared(feed)}
        for source in sources:
            add(source, np.asarray(values[source.name], np.float32))
        del values  # before the next ones are made
        progress(1)


def _by_layer(sources: Sequence[_Source], get: Callable[[_Source], _T | None]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for source in sources:
        result = get(source)
        if result is not None:
            found.update((layer.name, result) for layer in source.layers)
    return found


def _pick(positions: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    if positions <= wanted:
        return np.arange(positions)
    return np.sort(rng.integers(0, positions, wanted))


def _three(sizes: tuple[int, ...], fill: int) -> _Three:
    """Sizes of up to three spatial axes, leading axes filled."""
    padded = (*[fill] * (3 - len(sizes)), *sizes)
    return padded[0], padded[1], padded[2]
