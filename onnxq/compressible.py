"""What compression would do to each layer: cost, error and effect of every method and ratio.

No layer is fitted anew for it: errors follow from second-order statistics of the float model, and
what they do to the outputs is measured on a trial or two of each layer, or group of channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxq.analysis.cost import tensor_shapes
from onnxq.analysis.findings import Compression, LayerFindings
from onnxq.channel_budget import Trials, loss
from onnxq.dependency import Group, find_groups
from onnxq.layer_inputs import moments, statistics_bytes
from onnxq.model import Layer, Model
from onnxq.pass_manager import Context
from onnxq.patches import supports
from onnxq.pruning import Costs
from onnxq.runtime import Session
from onnxq.second_order import SecondOrder
from onnxq.selection import Choice
from onnxq.sensitivity import apart, measure
from onnxq.splits import Rows, Spatial

__all__ = ["Compressible", "compressible"]

# Samples, those of them that effects are measured on, patches a layer, and points of a curve.
SAMPLES, TRIED, PATCHES, POINTS = 32, 4, 4096, 12
# Ranks and channels are multiples of this.
MULTIPLE = 8
MEMORY_MB = 2048
PRUNING = "channel-pruning"


@dataclass(eq=False)
class Compressible:
    """What the layers of a model may become.

    Attributes:
        found: Layer -> what it may become.
        whole: Layer -> method -> why it stays whole.
        samples: How many samples there were, for each part.
    """

    found: dict[str, list[Compression]] = field(default_factory=dict)
    whole: dict[str, dict[str, str]] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def put(self, layers: Sequence[LayerFindings]) -> list[LayerFindings]:
        """The layers with what they may become."""
        return [
            dataclasses.replace(
                layer,
                compressions=tuple(self.found.get(layer.name, ())),
                whole=self.whole.get(layer.name, {}),
            )
            for layer in layers
        ]


def compressible(model: Model, ctx: Context, unfit: Mapping[str, str], seed: int) -> Compressible:
    """Find out what the layers of a model may become, and what that does to its outputs.

    Args:
        model: The float model; stays as it is.
        ctx: Where samples come from.
        unfit: Layers of which nothing can be told -> why.
        seed: Of the positions of patches.
    """
    found, model = Compressible(), model.clone()
    layers = [x for x in model.layers() if x.name not in unfit and supports(x)]
    if not layers:
        return found
    plain = Session(model.to_proto(), threads=ctx.threads)
    known_by, feeds = apart([*ctx.spread(plain, SAMPLES)], TRIED)
    held = _held(layers)
    rng = np.random.default_rng([seed, len(layers)])
    statistics = moments(model, held, ctx, rng=rng, samples=known_by, patches=PATCHES, halves=True)
    found.samples = {"compression": len(known_by), "effects of compression": len(feeds)}
    too_large = {x.name for x in layers} - {x.name for x in held}
    why = dict.fromkeys(too_large, f"its second moments do not fit into {MEMORY_MB} MB")
    why |= unfit
    splits = [Spatial(MULTIPLE), Rows(MULTIPLE)]
    table = measure(
        model,
        ctx,
        splits,
        options="",
        rng=rng,
        samples=SAMPLES,
        tried=TRIED,
        statistics=statistics,
        points=POINTS,
    )
    for choice in table.choices:
        found.found[choice.name] = [*_splits(choice)]
    for layer in model.layers():
        reason = why.get(layer.name) or table.refused.get(layer.name)
        reasons = {s.method: why.get(layer.name) or s.why_not(layer) or reason for s in splits}
        found.whole[layer.name] = {method: w for method, w in reasons.items() if w}
    trials = Trials(feeds, [plain.run(feed) for feed in feeds], ctx.threads)
    _channels(model, ctx, statistics, trials, why, found)
    return found


def _held(layers: Sequence[Layer]) -> list[Layer]:
    """The layers whose statistics memory holds together: as many as it can."""
    needed = {layer.name: statistics_bytes(layer, halves=True) for layer in layers}
    room, names = MEMORY_MB << 20, set()
    for name in sorted(needed, key=lambda name: needed[name]):
        if needed[name] <= room:
            room -= needed[name]
            names.add(name)
    return [layer for layer in layers if layer.name in names]


def _splits(choice: Choice) -> Iterator[Compression]:
    for c in choice.candidates:
        yield Compression(
            method=c.method,
            layers=choice.covers,
            ratio=c.ratio,
            macs=c.macs,
            whole_macs=choice.macs,
            bytes=c.bytes,
            error=c.error,
            effect=choice.loss(c),
        )


def _channels(
    model: Model,
    ctx: Context,
    statistics: Mapping[str, SecondOrder],
    trials: Trials,
    why: Mapping[str, str],
    found: Compressible,
) -> None:
    """Curves of the groups of channels, for each layer that puts them out."""
    dependencies = find_groups(model)
    for name, refused in dependencies.refused.items():
        found.whole.setdefault(name, {})[PRUNING] = refused
    costs = Costs.of(model, tensor_shapes(model, trials.feeds[0]))
    groups = dependencies.groups
    with ctx.progress.task("effect of channels", len(groups)) as advance:
        for group in groups:
            reason = _why_not(group, statistics, why)
            curve = [] if reason else [*_pruned(model, group, statistics, trials, costs)]
            for name in group.members:
                found.found.setdefault(name, []).extend(curve)
                if not curve:
                    few = f"{group.classes.size} channels are too few"
                    found.whole.setdefault(name, {})[PRUNING] = reason or few
            advance(1)


def _why_not(group: Group, statistics: Collection[str], why: Mapping[str, str]) -> str | None:
    """Why nothing is known of a group; None if it is."""
    if not group.readers:
        return "no layer reads its channels"
    unseen = [s.layer.name for s in group.readers if s.layer.name not in statistics]
    if not unseen:
        return None
    return f"{unseen[0]} reads it: {why.get(unseen[0], 'no sample reached it')}"


def _pruned(
    model: Model,
    group: Group,
    statistics: Mapping[str, SecondOrder],
    trials: Trials,
    costs: Costs,
) -> Iterator[Compression]:
    lost = loss(model, group, statistics, trials, multiple=MULTIPLE, least=1)
    names = tuple(dict.fromkeys((*group.shares[0], *group.shares[1])))
    known = [costs.layers[name] for name in names]
    macs, nbytes = sum(m for m, _, _ in known), sum(w + b for _, w, b in known)
    counts = sorted(lost.errors)
    for count in counts[:: max(1, -(-len(counts) // POINTS))]:
        after = costs.after({group: count})
        yield Compression(
            method=PRUNING,
            layers=names,
            ratio=count / group.classes.size,
            macs=macs - costs.macs + after[0],
            whole_macs=macs,
            bytes=nbytes - costs.nbytes + after[1],
            error=lost.errors[count],
            effect=lost.at(count),
        )
