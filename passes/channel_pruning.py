"""Take out the channels that are missed least, and let the layers that read them make up for it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxq.analysis.cost import tensor_shapes
from onnxq.channel_budget import Loss, Trials, facts, loss, within_budget
from onnxq.cut import cut
from onnxq.dependency import Dependencies, Group, find_groups, is_depthwise
from onnxq.errors import RecipeError, did_you_mean
from onnxq.layer_inputs import moments, statistics_bytes
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context
from onnxq.passes.fold_dead_channels import FoldDeadChannels
from onnxq.patches import supports
from onnxq.placement import match_nodes
from onnxq.pruning import (
    Costs,
    channels_at,
    dead_classes,
    order_by_error,
    order_by_magnitude,
)
from onnxq.report import millions
from onnxq.responses import Responses
from onnxq.runtime import Session
from onnxq.second_order import SecondOrder
from onnxq.sensitivity import apart

__all__ = ["ChannelPruning"]

_MB = 1 << 20
# At most so many samples are kept apart to measure the effect of a group's error on.
TRIED = 8


@dataclass(frozen=True, kw_only=True)
class ChannelPruning:
    r"""Take channels out of a model: weights, biases and constants shrink, no masks are left.

    A channel goes from every layer that puts it out and from every one that reads it. What
    residual additions, depthwise convolutions or products tie together goes together, also through
    Concat, Split, pooling, Pad, Slice, Resize, Flatten and DepthToSpace::

        Conv [64, 3, 3, 3] -> Relu -> Conv [32, 64, 3, 3]
        Conv [48, 3, 3, 3] -> Relu -> Conv [32, 48, 3, 3]

    Dead channels go first: what they held is in the biases already (`fold-dead-channels`). Of the
    others those go that are missed least. By output error, that is what the layers that read them
    lose once their other inputs make up for it, with H the second moment of what they read, about
    the mean. One after the other is taken out, each time the one that costs least::

        cost of j = tr(V_j P_jj^-1 V_j^T)     V -= V_j P_jj^-1 P_j,:     P = H^-1,   at first V = W

    Then, in graph order, each layer is fitted to what the float model puts out there, from the
    inputs x' that the model delivers with all that changed before; layers that lost no input are,
    too. Where an Add follows, the layer makes up for the error of the other operand as well::

        W' = (T + r W D) (H + r D)^-1      T = E[y x'^T]   H = E[x' x'^T]   D = diag(H)
        b' = E[y] - W' E[x']

    The ridge r is the one with which what half of the samples asks for serves the other half best.

    Refused, with the reason: channels that an output of the model holds, that an operator reads
    which mixes channels or of which nothing is known, shared or computed weights. In grouped
    convolutions as many channels of each group stay.

    Given a budget, the numbers of channels follow from it: step by step the cut that adds least to
    the error of the outputs for what it saves. What the error of a group's readers does to the
    outputs is measured once for each group, on samples that it was not computed from.

    Args:
        budget: macs or bytes: what the model is to have less of; empty: ratios say what is cut.
        share: How much of it may be left, in (0, 1].
        ratio: Share of channels kept, in (0, 1].
        ratios: Other shares for some: pairs of a name and a share. The name is that of a group,
            which is the name of the first layer that puts its channels out; or it is a name or
            glob of any such layer, and means all groups of these. Of pairs that fit, the last one
            counts.
        multiple: Channels kept are a multiple of this, rounded to the nearest, which is what vector
            instructions like; where there are no more than that to begin with all are kept.
        least: Least number of channels kept.
        importance: What tells which channels are missed: "error" of the outputs of the layers that
            read them, or "magnitude", the squares of all weights that hold them.
        reconstruct: Whether weights and biases are fitted afterwards.
        exclude: Globs on node names and operator types of layers that keep all of their channels.
        samples: Use at most so many calibration samples, spread evenly; 0 uses all.
        patches: Patches drawn per layer, about.
        memory_mb: Megabytes that statistics, and that activations may take; where they would take
            more, there are more runs over the samples, or fewer samples.

    Source: He et al. 2017 (arXiv 1707.06168); what goes together: Fang et al. 2023
    (arXiv 2301.12900); costs: Hassibi and Stork 1993 (optimal brain surgeon).
    """

    name: ClassVar[str] = "channel-pruning"

    budget: Literal["", "macs", "bytes"] = ""
    share: float = 0.5
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

    def __post_init__(self) -> None:
        if self.budget not in ("", "macs", "bytes"):
            raise RecipeError(f"budget: wanted macs or bytes, got {self.budget!r}")
        if self.budget and self.ratios:
            raise RecipeError("a budget and ratios are given", fix="leave out the one or the other")
        if self.budget and self.importance != "error":
            raise RecipeError("a budget goes by errors", fix='take importance = "error"')
        for name, ratio in (("share", self.share), ("ratio", self.ratio), *self.ratios):
            if not 0 < ratio <= 1:
                raise RecipeError(f"{name}: wanted a share in (0, 1], got {ratio:g}")
        for name in ("multiple", "least", "patches", "memory_mb"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if self.samples < 0:
            raise RecipeError(f"samples: wanted 0 or more, got {self.samples}")

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Choose channels, cut them off, fit what is left."""
        if len(model.encodings):
            raise RecipeError(
                "channels are taken out of float models, and this one has encodings",
                fix="put channel-pruning before calibrate",
            )
        changes = FoldDeadChannels().apply(model, ctx)
        found = find_groups(model)
        for name, why in found.refused.items():
            changes.skip(name, f"keeps its channels: {why}")
        losses: dict[Group, Loss] = {}
        costs = self._costs(model, ctx)
        if self.budget:
            losses = self._losses(model, found, ctx, changes)
            counts = within_budget(losses, costs, self.budget, self.share)
        else:
            counts = self._counts(model, found, changes)
        if self.budget:
            ctx.report.facts["compression"] = facts(
                self.name, self.budget, self.share, costs, losses, counts, found.refused
            )
        cuts = [g for g, count in counts.items() if count < g.classes.size]
        if not cuts:
            return changes
        keep, lost = self._choose(model, found, cuts, counts, losses, ctx, changes)
        if self.reconstruct and lost:
            self._fit(model, found, keep, ctx, changes)
        cut(model, found, keep)
        for group in cuts:
            changes.add(f"{group.name}: {counts[group]} of {group.classes.size} channels kept")
        stay = np.concatenate([keep[side.classes] for side in found.outputs.values()])
        changes.add(
            f"channels in all: {stay.sum()} of {stay.size} kept, multiply-accumulates"
            f" {millions(costs.macs)} -> {millions(costs.after(counts)[0])}"
        )
        return changes

    def _counts(self, model: Model, found: Dependencies, changes: Changes) -> dict[Group, int]:
        """How many channels each group keeps."""
        spared = match_nodes(model, self.exclude) if self.exclude else set()
        given = self._given(found)
        counts = {}
        for group in found.groups:
            size = group.classes.size
            if named := sorted(spared.intersection(group.members)):
                changes.skip(group.name, f"keeps its channels: {named[0]} is excluded")
                counts[group] = size
                continue
            ratio = given.get(group.name, self.ratio)
            alive = size - int(dead_classes(found, group).sum())
            wanted = channels_at(size, ratio, self.multiple, self.least)
            counts[group] = min(wanted, self._up(alive))
            if counts[group] == size and ratio < 1:
                changes.skip(group.name, f"keeps its {size} channels: {self._why_all(size)}")
        return counts

    # -------------------------------------------------------------- how many, to a budget

    def _costs(self, model: Model, ctx: Context) -> Costs:
        feed = next(iter(ctx.samples(model))) if self.budget else {}
        return Costs.of(model, tensor_shapes(model, feed))

    def _losses(
        self, model: Model, found: Dependencies, ctx: Context, changes: Changes
    ) -> dict[Group, Loss]:
        """What each group may lose, and what that does to the outputs."""
        spared = match_nodes(model, self.exclude) if self.exclude else set()
        groups = []
        for group in found.groups:
            if named := sorted(spared.intersection(group.members)):
                changes.skip(group.name, f"keeps its channels: {named[0]} is excluded")
            elif group.readers:
                groups.append(group)
        plain = Session(model.to_proto(), threads=ctx.threads)
        known_by, feeds = apart([*ctx.spread(plain, self.samples)], TRIED)
        trials = Trials(feeds, [plain.run(feed) for feed in feeds], ctx.threads)
        losses: dict[Group, Loss] = {}
        with ctx.progress.task("effect of channels", len(groups)) as advance:
            for part, statistics in self._measured(model, groups, ctx, known_by):
                for group in part:
                    if all(s.layer.name in statistics for s in group.readers):
                        losses[group] = loss(
                            model,
                            group,
                            statistics,
                            trials,
                            multiple=self.multiple,
                            least=self.least,
                        )
                    else:
                        changes.skip(group.name, "keeps its channels: no sample reached it")
                    advance(1)
        return losses

    def _up(self, channels: int) -> int:
        """The next multiple."""
        return max(-(-channels // self.multiple) * self.multiple, self.least)

    def _why_all(self, size: int) -> str:
        if size <= self.least:
            return f"{self.least} are the least"
        return f"that is the multiple of {self.multiple} next to what was asked for"

    def _given(self, found: Dependencies) -> dict[str, float]:
        """Name of a group -> the ratio that was given for it."""
        ratios: dict[str, float] = {}
        for glob, ratio in self.ratios:
            exact = [g.name for g in found.groups if g.name == glob]
            hits = exact or [g.name for g in found.groups if _names(glob, [g.name, *g.members])]
            if not hits and glob in found.refused:
                raise RecipeError(
                    f"ratios: {glob} keeps its channels: {found.refused[glob]}",
                    fix="leave it out",
                )
            if not hits:
                names = [name for g in found.groups for name in (g.name, *g.members)]
                hint = did_you_mean(glob, names, "give a layer that puts out channels that can go")
                raise RecipeError(f"ratios: no channels of {glob!r} can be taken out", fix=hint)
            ratios |= dict.fromkeys(hits, ratio)
        return ratios

    # -------------------------------------------------------------- which channels

    def _choose(
        self,
        model: Model,
        found: Dependencies,
        groups: Sequence[Group],
        counts: Mapping[Group, int],
        losses: Mapping[Group, Loss],
        ctx: Context,
        changes: Changes,
    ) -> tuple[np.ndarray, bool]:
        """Whether each class stays, bool [classes], and whether any goes that is not dead."""
        keep = np.ones(found.count, bool)
        missed = []
        for group in groups:
            dead = group.classes[dead_classes(found, group)]
            keep[dead[: group.classes.size - counts[group]]] = False
            if keep[group.classes].sum() > counts[group]:
                missed.append(group)
        orders = ((group, losses[group].order) for group in missed if group in losses)
        unknown = [group for group in missed if group not in losses]
        for group, order in (*orders, *self._orders(model, unknown, counts, ctx, changes)):
            left = group.classes[order][keep[group.classes[order]]]
            keep[left[: int(keep[group.classes].sum()) - counts[group]]] = False
        return keep, bool(missed)

    def _orders(
        self,
        model: Model,
        groups: Sequence[Group],
        counts: Mapping[Group, int],
        ctx: Context,
        changes: Changes,
    ) -> Iterator[tuple[Group, np.ndarray]]:
        """Groups with their classes, by place, in the order in which they are missed least."""
        for part, statistics in self._measured(model, groups, ctx, self.samples):
            for group in part:
                unseen = [s.layer.name for s in group.readers if s.layer.name not in statistics]
                if self.importance == "error" and not unseen:
                    yield group, order_by_error(group, statistics, counts[group])[0]
                    continue
                if self.importance == "error":
                    changes.skip(group.name, f"by magnitude: no sample reached {unseen[0]}")
                yield group, order_by_magnitude(group)

    def _measured(
        self,
        model: Model,
        groups: Sequence[Group],
        ctx: Context,
        samples: int | Sequence[Mapping[str, np.ndarray]],
    ) -> Iterator[tuple[Sequence[Group], Mapping[str, SecondOrder]]]:
        """The groups with statistics of what reads them, as many at once as memory has room for."""
        if self.importance == "magnitude":
            yield groups, {}
            return
        for part in _batches(groups, self.memory_mb * _MB):
            names = {side.layer.name for group in part for side in group.readers}
            layers = [layer for layer in model.layers() if layer.name in names]
            statistics = moments(
                model,
                layers,
                ctx,
                rng=ctx.rng(self),
                samples=samples,
                patches=self.patches,
                halves=True,
            )
            yield part, statistics

    # -------------------------------------------------------------- what is left

    def _fit(
        self,
        model: Model,
        found: Dependencies,
        keep: np.ndarray,
        ctx: Context,
        changes: Changes,
    ) -> None:
        """Fit the layers from the first one that loses inputs on, one after the other."""
        masks = {
            name: keep[side.classes]
            for name, side in found.inputs.items()
            if not is_depthwise(side.layer) and not keep[side.classes].all()
        }
        every = model.layers()
        first = next(i for i, layer in enumerate(every) if layer.name in masks)
        layers = [x for x in every[first:] if _fits(x)]
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
        for layer in every:
            if layer.name in masks and not _fits(layer):
                changes.skip(layer.name, f"not reconstructed: {layer.weight.dtype} weights")
                read = layer.along_inputs(masks[layer.name])
                layer.set_weight(np.where(read, layer.weight, 0).astype(layer.weight.dtype))
                responses.settle(layer)
        with ctx.progress.task("reconstruct", len(layers)) as advance:
            for layer in layers:
                response = responses.response(layer)
                if response is None:
                    changes.skip(layer.name, "not reconstructed: no sample reached it")
                else:
                    response.settle(response.solution(masks.get(layer.name)))
                responses.settle(layer)
                advance(1)


def _names(glob: str, names: Sequence[str]) -> bool:
    return any(name == glob or fnmatch.fnmatchcase(name, glob) for name in names)


def _batches(groups: Sequence[Group], memory: int) -> Iterator[Sequence[Group]]:
    """Groups whose statistics memory holds together; one at least."""
    part: list[Group] = []
    taken: dict[str, int] = {}
    for group in groups:
        needed = {s.layer.name: statistics_bytes(s.layer, halves=True) for s in group.readers}
        if part and sum((taken | needed).values()) > memory:
            yield part
            part, taken = [], {}
        part.append(group)
        taken |= needed
    if part:
        yield part


def _fits(layer: Layer) -> bool:
    """Whether a layer can be fitted; one that reads channels that go can, unless in float16."""
    return (
        supports(layer)
        and layer.unscalable is None
        and layer.owns_params
        and layer.weight.dtype == np.float32
        and not layer.model.is_output(layer.weight_tensor)
    )
