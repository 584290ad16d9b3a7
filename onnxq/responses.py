"""What layers are to put out, beside what they read once the layers before them have changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph import consumers, producer
from onnxq.kernels.lowrank import refit
from onnxq.layer_inputs import LayerInputs, statistics_bytes
from onnxq.model import Layer
from onnxq.patches import PatchSource, columns_of, rows_of, weight_of
from onnxq.second_order import (
    Accumulator,
    SecondOrder,
    patches_per_sample,
    takes_bias,
    trusted_moment,
)

__all__ = ["Response", "Responses"]

# The share of H's diagonal that the search begins at, and the most and least that it goes to.
_RIDGE, _RIDGES = 1e-2, (1e-4, 1e4)


@dataclass(frozen=True)
class Response:
    """What one layer reads now, and what it is to put out, at the same positions.

    Args:
        layer: The layer, its weight that of the float model.
        statistics: Of its input x'.  In place of the patches x of the float model they know the
            output t that is wanted: `cross` is [G, O/G, K], its means are [G, O/G].
    """

    layer: Layer
    statistics: SecondOrder

    @property
    def moment(self) -> np.ndarray:
        """H of the patches x', as far as the samples can be trusted, [G, K, K]."""
        return trusted_moment(self.layer, self.statistics)

    def solution(self, kept: np.ndarray | None = None) -> np.ndarray:
        """The rows that come nearest to what is wanted, float64 [G, O/G, K].

        They are drawn towards those of the float model, as much as serves the one half of the
        samples best where they come from the other.

        Args:
            kept: Which input channels are read, bool [I]; columns of the others are zero.  None for
                all.
        """
        rows = _alpha(self.layer) * rows_of(self.layer).astype(np.float64)
        halves = [self._moments(half) for half in self.statistics.halves or ()]
        read = np.ones(self.layer.input_channels, bool) if kept is None else kept
        columns = columns_of(self.layer, read)

        def fit(moments: tuple[np.ndarray, np.ndarray], ridge: float) -> np.ndarray:
            found = np.zeros_like(rows)
            for g, (h, c) in enumerate(zip(*moments, strict=True)):
                s = columns[g]
                found[g][:, s] = refit(rows[g][:, s], h[np.ix_(s, s)], c[:, s], ridge)
            return found

        def misfit(ridge: float) -> float:
            total = 0.0
            for one, (h, c) in zip(halves, halves[::-1], strict=True):
                found = fit(one, ridge)
                total += float(np.sum((found @ h - 2 * c) * found))
            return total

        ridge = _lowest(misfit) if halves else _RIDGE
        return fit(self._moments(self.statistics), ridge)

    def settle(self, rows: np.ndarray) -> None:
        """Give the layer a weight, and the bias that keeps the mean of what is wanted.

        Args:
            rows: What is to multiply the patches, [G, O/G, K].
        """
        alpha = _alpha(self.layer)
        stored = (rows / alpha).astype(np.float32)
        if takes_bias(self.layer):
            known = self.statistics
            made = alpha * np.einsum("gok,gk->go", stored.astype(np.float64), known.mean)
            self.layer.set_bias((known.reference_mean - made).reshape(-1).astype(np.float32))
        self.layer.set_weight(np.ascontiguousarray(weight_of(self.layer, stored)))

    def _moments(self, known: SecondOrder) -> tuple[np.ndarray, np.ndarray]:
        """H and the cross moment with what is wanted."""
        if takes_bias(self.layer):
            return known.covariance, known.cross_covariance
        return known.moment, known.cross_moment


class Responses(LayerInputs):
    """The `Response` of layers, asked for in graph order, sequentially; see `LayerInputs`.

    Where a layer's output goes nowhere but into a sum with something that is known by then, it is
    to put out the float model's sum less that, and so makes up for the error on the other branch.

    Source: He et al. 2017 (arXiv 1707.06168), section 3.3, for the sums.
    """

    def response(self, layer: Layer) -> Response | None:
        """What a layer reads now, and what it is to put out; None if no sample reached it.

        Raises:
            CalibrationError: A value is not finite.
        """
        self.reach(layer)
        assert self._frontiers is not None
        floats, others = self._frontiers
        source = PatchSource.of(layer)
        wanted, branch = self._wanted(layer)
        targets = floats.values(wanted)
        if branch is not None:
            targets = (t - b for t, b in zip(targets, others.values(branch), strict=True))
        total = Accumulator(
            source,
            self._each(source),
            self._rng(self._index(source)),
            shifted=True,
            halves=statistics_bytes(layer, halves=True) <= self._memory,
            reference=_outputs(layer),
        )
        pairs = zip(others.values(layer.x.name), targets, strict=True)
        found = self._summed(total, pairs)
        return None if found is None else Response(layer, found)

    def reach(self, layer: Layer) -> None:
        """Move to the input of a layer, and to what it is to put out."""
        super().reach(layer)
        self._wanted(layer)

    def _wanted(self, layer: Layer) -> tuple[str, str | None]:
        """The tensor of the float model that a layer is to put out, and what is taken off it."""
        assert self._frontiers is not None
        floats, others = self._frontiers
        branch = self._branch(layer)
        if branch is not None:
            others.advance(branch)
            if next(others.values(branch)).shape == self._shape(layer):
                total = str(consumers(layer.y)[0].outputs[0].name)
                floats.advance(total)
                return total, branch
        floats.advance(layer.y.name)
        return str(layer.y.name), None

    def _each(self, source: PatchSource) -> int:
        """Patches to draw of each sample: least squares follow the noise of few."""
        return patches_per_sample(source, self._patches, len(self.samples))

    def _branch(self, layer: Layer) -> str | None:
        """What alone is added to a layer's output, if no layer that is still to change makes it."""
        readers = consumers(layer.y)
        if len(readers) != 1 or readers[0].op != "Add" or self._model.is_output(layer.y):
            return None
        other = next((t for t in readers[0].inputs if t is not layer.y), None)
        if other is None or isinstance(other, gs.Constant):
            return None
        names = [known.name for known in self._layers]
        pending = {*names[names.index(layer.name) :]}
        seen: set[int] = set()
        todo = [other]
        while todo:
            node = producer(todo.pop())
            if node is None or id(node) in seen:
                continue
            if node.name in pending:
                return None
            seen.add(id(node))
            todo += node.inputs
        return str(other.name)

    def _shape(self, layer: Layer) -> tuple[int, ...]:
        """The shape of what a layer puts out for the first sample."""
        assert self._frontiers is not None
        source = PatchSource.of(layer)
        first, *rest = source.grid(next(self._frontiers[1].values(layer.x.name)))
        if source.op == "rows":
            return first, *rest, layer.output_channels
        return first, layer.output_channels, *rest


def _lowest(misfit: Callable[[float], float]) -> float:
    """The power of ten at which a function with one valley is lowest."""
    ridge, lowest = _RIDGE, misfit(_RIDGE)
    for factor in (10.0, 0.1):
        while _RIDGES[0] <= ridge * factor <= _RIDGES[1]:
            tried = misfit(ridge * factor)
            if tried >= lowest:
                break
            ridge, lowest = ridge * factor, tried
        if ridge != _RIDGE:
            break
    return ridge


def _outputs(layer: Layer) -> PatchSource:
    """A layer's output, one position of it a patch."""
    convolution = layer.op in ("Conv", "ConvTranspose")
    return PatchSource(
        name=layer.y.name,
        op="Conv" if convolution else "rows",
        groups=layer.group,
        size=(1,) * (layer.weight.ndim - 2) if convolution else (),
        window=(),
        columns=layer.output_channels // layer.group,
    )


def _alpha(layer: Layer) -> float:
    """What a Gemm multiplies its product by."""
    return float(layer.node.attrs.get("alpha", 1.0))
