"""How sensitive a model is to what its layers may become: cost, error and effect of each candidate.

Errors come from second-order statistics of the float model's inputs, without a run; what a layer's
error does to the outputs is measured once for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.analysis.cost import Shapes, layer_costs, mac_nodes, tensor_shapes
from onnxq.curvature import Curvature, curvatures
from onnxq.layer_inputs import moments
from onnxq.model import Layer, Model
from onnxq.pass_manager import Context
from onnxq.patches import rows_of, weight_of
from onnxq.runtime import Session
from onnxq.second_order import (
    SecondOrder,
    correct_bias,
    takes_bias,
    trusted_moment,
)
from onnxq.selection import Choice, Sensitivities
from onnxq.splits import Split

__all__ = ["EXACT", "apart", "measure", "output_error"]

Feed = Mapping[str, np.ndarray]

# The share of its cost at which a layer's effect on the outputs is measured.
_TRIED = 0.5
# Relative errors that are no more than rounding.
EXACT = 1e-9


def measure(
    model: Model,
    ctx: Context,
    splits: Sequence[Split],
    *,
    options: str,
    rng: np.random.Generator,
    samples: int = 64,
    tried: int = 8,
    patches: int = 8192,
    statistics: Mapping[str, SecondOrder] | None = None,
    points: int = 0,
) -> Sensitivities:
    """What each layer of a model may become, and what that does.

    Args:
        model: A float model.
        ctx: Where samples come from.
        splits: The ways that layers may be split.
        options: What to call all that this depends on, see `Sensitivities`.
        rng: Draws the positions of patches.
        samples: Samples for the statistics, spread evenly; 0 uses all.
        tried: How many of them, an eighth at most, are left out of the statistics: the effect of
            each layer's error is measured on these.
        patches: Patches drawn per layer, about.
        statistics: Second-order statistics by layer, where they are known already: of the same
            samples less those that are left out, in halves.
        points: Ranks that are looked at of each layer and way, about; 0 for all.
    """
    plain = Session(model.to_proto(), threads=ctx.threads)
    known_by, feeds = apart([*ctx.spread(plain, samples)], tried)
    shapes = tensor_shapes(model, feeds[0])
    costs = {cost.name: cost for cost in layer_costs(model, shapes)}
    varying = _varying(model, feeds, shapes)
    layers = {layer.name: layer for layer in model.layers()}
    ways: dict[str, list[Split]] = {}
    refused: dict[str, str] = {}
    for node in mac_nodes(model):
        layer = layers.get(node.name)
        if layer is None:
            refused[node.name] = "its weight is computed"
            continue
        reasons = [split.why_not(layer) for split in splits]
        if costs[node.name].macs is None or not varying.isdisjoint({layer.x.name, layer.y.name}):
            refused[node.name] = "its shapes depend on the data"
        elif all(reasons):
            refused[node.name] = "; ".join(dict.fromkeys(why for why in reasons if why))
        else:
            ways[node.name] = [s for s, why in zip(splits, reasons, strict=True) if why is None]
    wanted = [layers[name] for name in ways]
    if statistics is None and wanted:
        statistics = moments(
            model, wanted, ctx, rng=rng, samples=known_by, patches=patches, halves=True
        )
    curved, _ = curvatures(model, wanted, ctx, rng) if wanted else ({}, {})
    choices: list[Choice] = []
    outputs = [plain.run(feed) for feed in feeds]
    with ctx.progress.task("sensitivity of layers", len(ways)) as advance:
        for name, possible in ways.items():
            if statistics is None or name not in statistics:
                refused[name] = "no sample reached it"
                continue
            layer, known, macs = layers[name], statistics[name], costs[name].macs or 0
            widening = _widening(layer, shapes)
            curvature = curved.get(name)
            each = [
                (s, c)
                for s in possible
                for c in s.candidates(layer, known, macs, widening, curvature, points)
            ]
            split, tried_on = min(each, key=lambda pair: abs(pair[1].macs - _TRIED * macs))
            trial = _trial(model, layer, known, split, tried_on.rank_or_channels, curvature)
            effect = output_error(Session(trial.to_proto(), threads=ctx.threads), feeds, outputs)
            choices.append(
                Choice(
                    name=name,
                    covers=(name,),
                    macs=macs,
                    bytes=costs[name].nbytes,
                    candidates=tuple(candidate for _, candidate in each),
                    effect=effect / tried_on.error if tried_on.error > EXACT else 1.0,
                )
            )
            advance(1)
    return Sensitivities(
        model=model.digest(),
        options=options,
        macs=sum(cost.macs or 0 for cost in costs.values()),
        bytes=model.nbytes,
        choices=tuple(choices),
        refused=refused,
    )


def _varying(model: Model, feeds: Sequence[Feed], shapes: Shapes) -> set[str]:
    """Tensors whose shapes are others for another sample of the same shape."""
    first, last = feeds[0], feeds[-1]
    if any(first[name].shape != last[name].shape for name in first):
        return set()  # it would be no wonder
    others = tensor_shapes(model, last)
    return {name for name, shape in shapes.items() if others.get(name) != shape}


def apart(feeds: Sequence[Feed], count: int) -> tuple[list[Feed], list[Feed]]:
    """Samples to learn from, and others to try what was learned on: fits look well on their own."""
    if len(feeds) == 1:
        return [*feeds], [*feeds]
    count = max(1, min(count, len(feeds) // 8))
    tried = {*np.linspace(0, len(feeds) - 1, count).astype(int).tolist()}
    rest = [feed for index, feed in enumerate(feeds) if index not in tried]
    return rest, [feeds[index] for index in sorted(tried)]


def _widening(layer: Layer, shapes: Shapes) -> float:
    """Columns of a convolution's input for each column of its output; 1 where there are none."""
    read, made = shapes.get(layer.x.name), shapes.get(layer.y.name)
    if layer.op != "Conv" or not read or not made or not made[-1]:
        return 1.0
    return read[-1] / made[-1]


def _trial(
    model: Model,
    layer: Layer,
    known: SecondOrder,
    split: Split,
    rank: int,
    curvature: Curvature | None,
) -> Model:
    """The model with one layer of that rank, not yet written as two."""
    trial = model.clone()
    twin = next(other for other in trial.layers() if other.name == layer.name)
    wide = rows_of(layer)[0].astype(np.float64)
    rows = split.nearest(layer, wide, trusted_moment(layer, known)[0], rank, curvature)[None]
    if takes_bias(twin):
        correct_bias(twin, rows, known)
    twin.set_weight(weight_of(twin, rows).astype(np.float32))
    return trial


def output_error(session: Session, feeds: Sequence[Feed], outputs: Sequence[Feed]) -> float:
    """Squared error of the outputs relative to their power, the mean over those that are floats."""
    noise: dict[str, float] = {}
    power: dict[str, float] = {}
    for feed, wanted in zip(feeds, outputs, strict=True):
        for name, got in session.run_shared(feed).items():
            if got.dtype.kind != "f":
                continue
            exact, made = wanted[name].astype(np.float64), got.astype(np.float64)
            both = np.isfinite(exact) & np.isfinite(made)
            missed = exact[both] - made[both]
            noise[name] = noise.get(name, 0.0) + float(missed @ missed)
            power[name] = power.get(name, 0.0) + float(exact[both] @ exact[both])
    shares = [noise[name] / power[name] for name in noise if power[name] > 0]
    return float(np.mean(shares)) if shares else 0.0
