"""The pass behind spatial and weight SVD: each layer against what the layers before it deliver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxq.analysis.cost import mac_nodes
from onnxq.checkpoint import Checkpoint, fingerprint
from onnxq.curvature import curvatures
from onnxq.errors import CalibrationError, RecipeError, did_you_mean
from onnxq.layer_inputs import statistics_bytes
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context, options
from onnxq.patches import rows_of, supports, weight_of
from onnxq.placement import match_nodes
from onnxq.responses import Responses
from onnxq.second_order import takes_bias
from onnxq.splits import Split
from onnxq.version import __version__

__all__ = ["LowRank"]

_MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Split layers in two of lower rank; the options are explained where a pass has them."""

    name: ClassVar[str]
    split: ClassVar[type[Split]]

    ratio: float = 0.5
    ratios: tuple[tuple[str, float], ...] = ()
    multiple: int = 8
    least: int = 1
    exclude: tuple[str, ...] = ()
    reconstruct: Literal["all", "split", "none"] = "all"
    samples: int = 0
    patches: int = 32768
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        for what, ratio in (("ratio", self.ratio), *self.ratios):
            if not 0 < ratio <= 1:
                raise RecipeError(f"{what}: wanted a share in (0, 1], got {ratio:g}")
        for name in ("multiple", "least", "patches", "memory_mb"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if self.samples < 0:
            raise RecipeError(f"samples: wanted 0 or more, got {self.samples}")

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Choose ranks, find the weights, write the factors."""
        changes = Changes()
        if model.encodings.tensors:
            raise RecipeError(f"{self.name} is for float models", fix="put it before calibrate")
        split = self.split(self.multiple, self.least)
        ranks = self._ranks(model, split, changes)
        if not ranks:
            return changes
        if self.reconstruct == "none":
            for layer in model.layers():
                if layer.name in ranks:
                    rows = rows_of(layer)[0].astype(np.float64)
                    rows = split.nearest(layer, rows, None, ranks[layer.name])
                    layer.set_weight(weight_of(layer, rows[None]).astype(np.float32))
        else:
            self._reconstruct(model, split, ranks, ctx, changes)
        for layer in model.layers():
            if layer.name in ranks:
                rank, weights = ranks[layer.name], layer.weight.size
                kept = rank * split.weights(layer)
                split.write(model, layer, rank)
                changes.add(f"{layer.name}: rank {rank}, {kept} of {weights} weights")
        return changes

    def _ranks(self, model: Model, split: Split, changes: Changes) -> dict[str, int]:
        """Layer -> the rank that it gets."""
        excluded = match_nodes(model, self.exclude)
        given = dict(self.ratios)
        layers = {layer.name: layer for layer in model.layers()}
        if unknown := [name for name in given if name not in layers]:
            hint = did_you_mean(unknown[0], layers, "onnxq inspect lists the layers")
            raise RecipeError(f"ratios: no layer {unknown[0]!r}", fix=hint)
        found = {}
        for node in mac_nodes(model):
            layer = layers.get(node.name)
            ratio = given.get(node.name, self.ratio)
            if ratio == 1 or node.name in excluded:
                continue
            why = "its weight is computed" if layer is None else split.why_not(layer)
            if layer is None or why is not None:
                changes.skip(node.name, why or "")
            elif (rank := split.rank_at(layer, ratio)) is None:
                changes.skip(node.name, f"no rank saves as little as a ratio of {ratio:g} says")
            else:
                found[node.name] = rank
        return found

    def _reconstruct(
        self, model: Model, split: Split, ranks: Mapping[str, int], ctx: Context, changes: Changes
    ) -> None:
        """Give layers the weights that bring their outputs nearest to the float model's."""
        layers = self._layers(model, ranks, changes)
        seed = int(ctx.rng(self).integers(2**31))
        responses = Responses(
            model,
            layers,
            ctx,
            rng=lambda index: np.random.default_rng([seed, index]),
            sequential=True,
            samples=self.samples,
            patches=self.patches,
            memory_mb=self.memory_mb,
        )
        for note in responses.notes:
            changes.add(note)
        curved, unknown = curvatures(
            model,
            [layer for layer in layers if layer.name in ranks],
            ctx,
            np.random.default_rng([seed, len(layers)]),
        )
        for name, why in unknown.items():
            changes.add(f"{name}: errors of its outputs weigh alike: {why}")
        checkpoint = None
        if ctx.resume is not None:
            key = fingerprint(model, __version__, options(self), ctx.seed, responses.digest())
            checkpoint = Checkpoint(ctx.resume, key)
        kept = 0
        with ctx.progress.task("reconstruct layers", len(layers)) as advance:
            for index, layer in enumerate(layers):
                if checkpoint is not None and checkpoint.restore(layer, index):
                    kept += 1
                    responses.reach(layer)
                elif (response := responses.response(layer)) is None:
                    if layer.name in ranks:
                        raise CalibrationError("no sample reached it", where=layer.name)
                else:
                    rows = response.solution()
                    if (rank := ranks.get(layer.name)) is not None:
                        rows = split.nearest(
                            layer, rows[0], response.moment[0], rank, curved.get(layer.name)
                        )[None]
                    response.settle(rows)
                    if checkpoint is not None:
                        checkpoint.keep(layer, index)
                responses.settle(layer)
                advance(1)
        if kept:
            changes.add(f"{kept} layers taken up from an earlier run")

    def _layers(self, model: Model, ranks: Mapping[str, int], changes: Changes) -> list[Layer]:
        """The layers that get new weights, in graph order: none before the first that is split."""
        found: list[Layer] = []
        for layer in model.layers():
            split = layer.name in ranks
            if not split and not (found and self.reconstruct == "all" and _refits(layer)):
                continue
            if statistics_bytes(layer) > self.memory_mb * _MB:
                megabytes = statistics_bytes(layer) // _MB
                if split:
                    raise RecipeError(
                        f"the statistics of {layer.name} take {megabytes} MB",
                        fix="raise memory_mb, or exclude the layer",
                    )
                changes.skip(layer.name, f"not fitted anew: its statistics take {megabytes} MB")
                continue
            found.append(layer)
        return found


def _refits(layer: Layer) -> bool:
    """Whether a layer that stays whole can get another weight."""
    return (
        supports(layer)
        and layer.owns_params
        and takes_bias(layer)
        and layer.weight.dtype == np.float32
        and not layer.model.is_output(layer.weight_tensor)
    )
