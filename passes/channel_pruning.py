"""Take out the channels that are missed least, and let the layers that read them make up for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxq.cut import cut
from onnxq.dependency import Dependencies, Group, find_groups, is_depthwise
from onnxq.errors import RecipeError
from onnxq.layer_inputs import LayerInputs, statistics_bytes
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context
from onnxq.passes.fold_dead_channels import FoldDeadChannels
from onnxq.patches import rows_of, weight_of
from onnxq.placement import match_nodes
from onnxq.pruning import (
    Costs,
    channels_at,
    dead_classes,
    order_by_error,
    order_by_magnitude,
    reconstruct,
)
from onnxq.second_order import SecondOrder, collect, correct_bias, input_session, takes_bias

__all__ = ["ChannelPruning"]


@dataclass(frozen=True, kw_only=True)
class ChannelPruning:
    name: ClassVar[str] = "channel-pruning"

    ratio: float = 0.75
    ratios: tuple[tuple[str, float], ...] = ()
    multiple: int = 8
    least: int = 1
    importance: Literal["error", "magnitude"] = "error"
    reconstruct: bool = True
    exclude: tuple[str, ...] = ()
    samples: int = 0
    patches: int = 16384
    memory_mb: int = 1024
    everything: bool = True

    def apply(self, model: Model, ctx: Context) -> Changes:
        changes = Changes()
        changes.extend(FoldDeadChannels().apply(model, ctx))
        found = find_groups(model)
        for name, why in found.refused.items():
            changes.skip(name, why)
        costs = Costs.of(model)
        counts = self._counts(model, found)
        keep = np.ones(found.count, bool)
        for group, order in self._orders(model, found, counts, ctx):
            keep[group.classes[order[: group.classes.size - counts[group]]]] = False
        if keep.all():
            return changes
        if self.reconstruct:
            self._reconstruct(model, found, keep, ctx, changes)
        cut(model, found, keep)
        macs, _ = costs.after(counts)
        for group, count in counts.items():
            changes.add(f"{group.name}: {count} of {group.classes.size} channels kept")
        changes.add(f"multiply-accumulates {costs.macs} -> {macs}")
        return changes

    def _counts(self, model, found):
        out = match_nodes(model, self.exclude) if self.exclude else set()
        return {g: channels_at(g.classes.size, 1.0 if out & set(g.members) else self.ratio, self.multiple, self.least) for g in found.groups}

    def _orders(self, model, found, counts, ctx):
        groups = [g for g, c in counts.items() if c < g.classes.size]
        if self.importance == "magnitude":
            for group in groups:
                order = order_by_magnitude(group)
                dead = dead_classes(found, group)[order]
                yield group, np.concatenate([order[dead], order[~dead]])
            return
        readers = {s.layer.name: s.layer for g in groups for s in g.readers}
        layers = [l for l in model.layers() if l.name in readers]
        session = input_session(model, layers, ctx.threads)
        samples = ctx.spread(session, self.samples)
        with ctx.progress.task("second-order statistics", samples.length) as advance:
            stats = collect(layers, session, samples, expected=samples.length or 1, rng=ctx.rng(self), patches=self.patches, progress=advance)
        for group in groups:
            yield group, order_by_error(group, stats, counts[group])[0]

    def _reconstruct(self, model, found, keep, ctx, changes):
        masks = {}
        for name, side in found.inputs.items():
            mask = keep[side.classes]
            if not is_depthwise(side.layer) and not mask.all():
                masks[name] = mask
        layers = model.layers()
        first = next(i for i, l in enumerate(layers) if l.name in masks)
        layers = [l for l in layers[first:] if l.name in masks or (self.everything and l.owns_params and takes_bias(l))]
        seed = int(ctx.rng(self).integers(2**31))
        inputs = LayerInputs(model, layers, ctx, rng=lambda i: np.random.default_rng([seed, i]), sequential=True, samples=self.samples, patches=self.patches, memory_mb=self.memory_mb)
        with ctx.progress.task("reconstruct", len(layers)) as advance:
            for layer in layers:
                statistics = inputs.regress(layer)
                mask = masks.get(layer.name, np.ones(layer.input_channels, bool))
                reconstruct(layer, statistics, mask)
                inputs.settle(layer)
                advance(1)
