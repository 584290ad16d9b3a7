"""Second-order statistics of layer inputs: mean and second moment of the patches a weight meets.

For a layer y = W x, W [O, K] acting on patches x [K], they say how much any change of W changes
the output: E|(W' - W) x|^2 = tr((W' - W) H (W' - W)^T) with H = E[x x^T].  They are sums, so they
stream: memory does not depend on the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxq.kernels.patches import add_patch_sums, gather_patches
from onnxq.model import Layer
from onnxq.ops import Window, conv_window
from onnxq.runtime import Session

__all__ = ["SecondOrder", "collect", "rows_of", "weight_of"]


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


def rows_of(layer: Layer) -> np.ndarray:
    """The weight as rows that multiply patches, [G, O/G, K].

    Conv [O, I/g, ...], Gemm [K, N] or [N, K], MatMul [K, N].
    """
    weight = layer.weight
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


@dataclass
class _Source:
    """One input with one window; layers that share both share the statistics."""

    name: str
    op: str
    groups: int
    size: tuple[int, ...]
    attrs: Mapping[str, object]
    per_sample: int
    total: np.ndarray | None = None
    count: int = 0
    moment: np.ndarray | None = None
    sampled_total: np.ndarray | None = None
    sampled: int = 0
    layers: list[Layer] = field(default_factory=list)

    def add(self, x: np.ndarray, rng: np.random.Generator) -> None:
        if self.op == "Conv":
            patches = self._conv(x, conv_window(dict(self.attrs), x.shape[2:], self.size), rng)
        else:
            rows = x.reshape(-1, x.shape[-1])
            part = rows.sum(axis=0, dtype=np.float64)
            self.total = part if self.total is None else self.total + part
            self.count += rows.shape[0]
            patches = rows[_pick(rows.shape[0], self.per_sample, rng)]
        grouped = patches.reshape(len(patches), self.groups, -1).transpose(1, 0, 2)
        moment = np.matmul(grouped.transpose(0, 2, 1), grouped).astype(np.float64)
        sums = grouped.sum(axis=1, dtype=np.float64)
        self.moment = moment if self.moment is None else self.moment + moment
        self.sampled_total = sums if self.sampled_total is None else self.sampled_total + sums
        self.sampled += len(patches)

    def _conv(self, x: np.ndarray, window: Window, rng: np.random.Generator) -> np.ndarray:
        cube = np.ascontiguousarray(x.reshape(*x.shape[:2], *_three(x.shape[2:], 1)))
        geometry = (
            _three(window.size, 1),
            _three(window.strides, 1),
            _three(window.begin, 0),
            _three(window.dilations, 1),
            _three(window.positions, 1),
        )
        if self.total is None:
            self.total = np.zeros((x.shape[1], *geometry[0]))
        add_patch_sums(cube, *geometry, self.total)
        positions = x.shape[0] * int(np.prod(window.positions))
        self.count += positions
        picked = _pick(positions, self.per_sample, rng)
        patches = np.empty((picked.size, x.shape[1] * int(np.prod(window.size))), np.float32)
        gather_patches(cube, *geometry, picked, patches)
        return patches

    def result(self) -> SecondOrder | None:
        if self.total is None or self.moment is None or not self.sampled:
            return None
        assert self.sampled_total is not None
        return SecondOrder(
            mean=(self.total / self.count).reshape(self.groups, -1),
            moment=self.moment / self.sampled,
            sampled_mean=self.sampled_total / self.sampled,
            sampled=self.sampled,
        )


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
    sources: dict[tuple[object, ...], _Source] = {}
    for layer in layers:
        size = tuple(layer.weight.shape[2:]) if layer.op == "Conv" else ()
        keys = ("strides", "dilations", "pads", "auto_pad")
        attrs = {k: layer.node.attrs[k] for k in keys if k in layer.node.attrs}
        key = (layer.x.name, layer.op == "Conv", layer.group, size, repr(attrs))
        if key not in sources:
            wanted = max(patches, 4 * rows_of(layer).shape[-1])
            per_sample = max(1, -(-wanted // max(expected, 1)))
            op = "Conv" if layer.op == "Conv" else "rows"
            sources[key] = _Source(layer.x.name, op, layer.group, size, attrs, per_sample)
        sources[key].layers.append(layer)
    for feed in samples:
        values = {**feed, **session.run_shared(feed)}
        for source in sources.values():
            source.add(np.asarray(values[source.name], np.float32), rng)
        del values
        progress(1)
    found: dict[str, SecondOrder] = {}
    for source in sources.values():
        result = source.result()
        if result is not None:
            found.update((layer.name, result) for layer in source.layers)
    return found


def _pick(positions: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    if positions <= wanted:
        return np.arange(positions)
    return np.sort(rng.integers(0, positions, wanted))


def _three(sizes: tuple[int, ...], fill: int) -> tuple[int, int, int]:
    """Sizes of up to three spatial axes, leading axes filled."""
    padded = (*[fill] * (3 - len(sizes)), *sizes)
    return padded[0], padded[1], padded[2]
