"""What each layer will read once the layers before it are quantized, one layer after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxq.frontier import Frontier, peak_bytes
from onnxq.model import Layer, Model
from onnxq.pass_manager import Context
from onnxq.patches import PatchSource, rows_of, supports
from onnxq.runtime import Session, cores
from onnxq.second_order import (
    LONG,
    Accumulator,
    SecondOrder,
    collect,
    input_session,
    pick,
    takes_bias,
)
from onnxq.simulation import input_name, simulated

__all__ = ["LayerInputs", "moments", "patches_for", "statistics_bytes", "why_nearest"]

# Patches that even the shortest patch is worth, and how many more each of its values is.
LEAST_PATCHES, PATCHES_PER_VALUE = 4096, 64
# Weights with so many times more columns than rows are multiplied into C as it is added up.
FEW_ROWS = 4
_MB = 1 << 20


def patches_for(columns: int, most: int) -> int:
    """How many patches of K values to draw: short ones need fewer, never less than four a value."""
    return max(min(most, max(LEAST_PATCHES, PATCHES_PER_VALUE * columns)), 4 * columns)


def statistics_bytes(layer: Layer, *, halves: bool = False) -> int:
    """Bytes that the second moments of a layer's input take while they are added up and used.

    Args:
        layer: A layer that `supports`.
        halves: Whether every second sample is added up apart.
    """
    source = PatchSource.of(layer)
    size = source.groups * source.columns**2
    if source.columns > LONG:  # in float32 H, C and products of each, or H and what is made of it
        return 40 * size if halves else 28 * size
    whole = 40 * size  # H and C, a part of each, and its products
    return 2 * whole if halves else whole


def why_nearest(layer: Layer) -> str | None:
    """Why the weight of a layer can only be rounded to nearest; None if more can be done."""
    assert layer.weight_encoding is not None
    if layer.weight_encoding.block:
        return "scales per block are rounded to nearest"
    if not supports(layer):
        return f"{layer.op} of this kind is rounded to nearest"
    if not layer.owns_params or layer.model.is_output(layer.weight_tensor):
        return "its weight or bias is shared; rounded to nearest"
    return None


def moments(
    model: Model,
    layers: Sequence[Layer],
    ctx: Context,
    *,
    rng: np.random.Generator,
    patches: int,
    samples: int | Sequence[Mapping[str, np.ndarray]] = 0,
    halves: bool = False,
) -> dict[str, SecondOrder]:
    """Second-order statistics of what layers read in the float model, by layer name.

    Args:
        model: The model.
        layers: Layers that `supports`.
        ctx: Where samples come from.
        rng: Draws the positions of patches.
        patches: Patches per layer, about.
        samples: At most so many, spread evenly; 0 uses all; or the samples themselves.
        halves: Whether to keep every second sample apart.
    """
    session = input_session(model, layers, ctx.threads)
    if isinstance(samples, int):
        feeds: Iterable[Mapping[str, np.ndarray]] = (bound := ctx.spread(session, samples))
        length, expected = bound.length, bound.length or samples or 1
    else:
        feeds, length, expected = samples, len(samples), len(samples)
    with ctx.progress.task("second-order statistics", length) as advance:
        return collect(
            layers,
            session,
            feeds,
            expected=expected,
            rng=rng,
            patches=patches,
            halves=halves,
            progress=advance,
        )


class LayerInputs:
    """Second-order statistics of the inputs of layers, asked for in graph order.

    Layers that take a bias and have none get one of zeros.

    Sequentially, two frontiers move through the graph side by side: one of the float model, one of
    the model as it will be in integers, which takes over the weights that are settled.  Otherwise
    the float model's inputs stand for both, and groups of layers share one run over the samples.

    Args:
        model: The model, float weights and encodings in place.
        layers: The layers that will be asked for, in graph order.
        ctx: Where samples come from.
        rng: A generator for the positions of patches, given the index of a layer: of the first
            that reads them, so that they do not depend on which layers are asked for.
        sequential: Whether what a layer reads is that of the model in integers.
        samples: Use at most so many samples, spread evenly; 0 uses all.
        patches: Patches per layer, about.
        memory_mb: Megabytes that activations, and that statistics may take; where they would take
            more, fewer samples are kept, halves of them not kept apart, or layers go in smaller
            groups.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[Layer],
        ctx: Context,
        *,
        rng: Callable[[int], np.random.Generator],
        sequential: bool,
        samples: int,
        patches: int,
        memory_mb: int,
    ) -> None:
        self._model = model
        self._layers = [*layers]
        self._sources = [PatchSource.of(layer) for layer in layers]
        self._ctx = ctx
        self._rng = rng
        self._patches = patches
        self._limit = samples
        self._memory = memory_mb * _MB
        self._threads = min(ctx.threads, cores()) or cores()
        self._known: dict[str, SecondOrder | None] = {}
        self._last: tuple[PatchSource, SecondOrder | None] | None = None
        self.notes: list[str] = []
        self.samples: list[Mapping[str, np.ndarray]] = []
        self._frontiers: tuple[Frontier, Frontier] | None = None
        if not sequential:
            self._float = model.clone()  # what is settled does not show here
            self._groups = self._grouped()
        else:
            _give_biases(layers)
            self.samples = self._load()
            self._simulated = simulated(model, ctx.target)
            protos = model.to_proto(), self._simulated.to_proto()
            floats, ints = (Frontier(p, self.samples, threads=self._threads) for p in protos)
            self._frontiers = floats, ints

    def digest(self) -> str:
        """SHA-256 of the samples, in hexadecimal."""
        sha = hashlib.sha256()
        session = Session(self._model.to_proto(), threads=1, level="disabled")
        for feed in self.samples or self._ctx.spread(session, self._limit):
            for name, array in sorted(feed.items()):
                sha.update(f"{name} {array.dtype} {array.shape}".encode())
                sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def measure(self, layer: Layer) -> SecondOrder | None:
        """The statistics of a layer's input; None if no sample reached it.

        Raises:
            CalibrationError: A value is not finite.
        """
        if self._frontiers is None:
            if layer.name not in self._known:
                self._known = self._collect(layer)
            return self._known[layer.name]
        source = PatchSource.of(layer)
        if self._last is not None and self._last[0] == source:
            return self._last[1]
        found = self._add_up(layer, source)
        self._last = source, found
        return found

    def draw(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        """Patches of a layer without groups that was measured last: of x', of x; float32 [P, K].

        Only where the layers are done sequentially.
        """
        assert self._frontiers is not None
        source = PatchSource.of(layer)
        rng, each = self._rng(self._index(source)), self._each(source)
        floats, ints = self._frontiers
        pairs = zip(
            ints.values(input_name(self._simulated, layer)),
            floats.values(layer.x.name),
            strict=True,
        )
        drawn = []
        for x, reference in pairs:
            picked = pick(source.positions(x), each, rng)
            drawn.append((source.draw(x, picked), source.draw(reference, picked)))
        x, reference = (np.concatenate(part)[:, 0] for part in zip(*drawn, strict=True))
        return x, reference

    def reach(self, layer: Layer) -> None:
        """Move to the input of a layer, whether it is measured or not.

        Stretches of other lengths are fused otherwise, and their floats differ in the last bits.
        """
        if self._frontiers is not None:
            self._frontiers[0].advance(layer.x.name)
            self._frontiers[1].advance(input_name(self._simulated, layer))

    def settle(self, layer: Layer) -> None:
        """Let the layers that follow meet what this one now makes of its input."""
        if self._frontiers is None:
            return
        for tensor in (layer.weight_tensor, layer.bias_tensor):
            if tensor is not None:
                self._frontiers[1].set_constant(tensor.name, self._model.array(tensor))

    # ---------------------------------------------------------------------- sequentially

    def _load(self) -> list[Mapping[str, np.ndarray]]:
        """The samples, as many as leave room for their activations."""
        session = Session(self._model.to_proto(), threads=1, level="disabled")
        first = [*self._ctx.spread(session, 1)]
        inputs = [layer.x.name for layer in self._layers]
        each = 2 * peak_bytes(self._model.to_proto(), first, inputs)  # of both models
        most = max(1, self._memory // max(each, 1))
        wanted = self._limit
        known = self._ctx.spread(session, wanted).length
        if known is None or known > most:
            wanted = most if not wanted else min(wanted, most)
        found = [*self._ctx.spread(session, wanted)]
        if known is not None and len(found) < known:
            self.notes.append(
                f"{len(found)} of {known} samples used: more would take more than"
                f" {self._memory // _MB} MB"
            )
        return found

    def _add_up(self, layer: Layer, source: PatchSource) -> SecondOrder | None:
        assert self._frontiers is not None
        floats, ints = self._frontiers
        inner = input_name(self._simulated, layer)
        self.reach(layer)
        halves = statistics_bytes(layer, halves=True) <= self._memory
        rng = self._rng(self._index(source))
        rows = rows_of(layer)
        alone = self._sources.count(source) == 1
        few = FEW_ROWS * rows.shape[1] <= source.columns and source.groups == 1
        total = Accumulator(
            source,
            self._each(source),
            rng,
            shifted=True,
            halves=halves,
            rows=rows if alone and few else None,
        )
        pairs = zip(ints.values(inner), floats.values(layer.x.name), strict=True)
        return self._summed(total, pairs)

    def _summed(
        self, total: Accumulator, pairs: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> SecondOrder | None:
        """What comes of all samples, their patches drawn side by side."""
        if self._threads == 1:
            total.add_all(pairs)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                total.add_all(pairs, pool.map)
        return total.result()

    def _index(self, source: PatchSource) -> int:
        """Of the first layer that reads these patches."""
        return self._sources.index(source)

    def _each(self, source: PatchSource) -> int:
        """Patches to draw of each sample."""
        wanted = patches_for(source.columns, self._patches)
        return max(1, -(-wanted // max(len(self.samples), 1)))

    # ---------------------------------------------------------------------- from the float model

    def _grouped(self) -> list[list[Layer]]:
        """The layers of the float model, in groups whose statistics memory holds together."""
        names = {layer.name for layer in self._layers}
        groups: list[list[Layer]] = []
        taken = 0
        for layer in self._float.layers():
            if layer.name in names:
                needed = statistics_bytes(layer)
                taken += needed
                if not groups or taken > self._memory:
                    groups.append([])
                    taken = needed
                groups[-1].append(layer)
        return groups

    def _collect(self, layer: Layer) -> dict[str, SecondOrder | None]:
        """Statistics of the group that a layer is in, from one run over the samples."""
        group = next(g for g in self._groups if any(known.name == layer.name for known in g))
        rng = self._rng(self._index(PatchSource.of(group[0])))
        found = moments(
            self._float, group, self._ctx, rng=rng, samples=self._limit, patches=self._patches
        )
        return {layer.name: found.get(layer.name) for layer in group}


def _give_biases(layers: Sequence[Layer]) -> None:
    """Bring biases into the form in which they will be corrected: one value per channel."""
    for layer in layers:
        if takes_bias(layer):
            bias = np.broadcast_to(layer.take_bias().reshape(-1), layer.output_channels)
            layer.set_bias(bias.astype(np.float32))
