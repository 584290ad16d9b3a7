"""How sensitive a model is to what its layers may become: cost, error and effect of each candidate.

Errors come from second-order statistics of the float model's inputs, without a run; what a layer's
error does to the outputs is measured once for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.analysis.cost import Shapes, layer_costs, mac_nodes, tensor_shapes
from onnxq.model import Layer, Model
from onnxq.pass_manager import Context
from onnxq.patches import rows_of, weight_of
from onnxq.runtime import Session
from onnxq.second_order import SecondOrder, collect, correct_bias, input_session, takes_bias
from onnxq.selection import Choice, Sensitivities
from onnxq.splits import Split

__all__ = ["measure"]

Feed = Mapping[str, np.ndarray]

# The share of its cost at which a layer's effect on the outputs is measured.
_TRIED = 0.5
# Relative errors that are no more than rounding.
_EXACT = 1e-9


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
) -> Sensitivities:
    """What each layer of a model may become, and what that does.

    Args:
        model: A float model.
        ctx: Where samples come from.
        splits: The ways that layers may be split.
        options: What to call all that this depends on, see `Sensitivities`.
        rng: Draws the positions of patches.
        samples: Samples for the statistics, spread evenly; 0 uses all.
        tried: Samples on which the effect of each layer's error is measured.
        patches: Patches drawn per layer, about.
    """
    plain = Session(model.to_proto(), threads=ctx.threads)
    feeds = [*ctx.spread(plain, tried)]
    shapes = tensor_shapes(model, feeds[0])
    costs = {cost.name: cost for cost in layer_costs(model, shapes)}
    layers = {layer.name: layer for layer in model.layers()}
    ways: dict[str, list[Split]] = {}
    refused: dict[str, str] = {}
    for node in mac_nodes(model):
        layer = layers.get(node.name)
        if layer is None:
            refused[node.name] = "its weight is computed"
            continue
        reasons = [split.why_not(layer) for split in splits]
        if costs[node.name].macs is None:
            refused[node.name] = "its shapes depend on the data"
        elif all(reasons):
            refused[node.name] = "; ".join(dict.fromkeys(why for why in reasons if why))
        else:
            ways[node.name] = [s for s, why in zip(splits, reasons, strict=True) if why is None]
    wanted = [layers[name] for name in ways]
    statistics = _statistics(model, wanted, ctx, rng, samples, patches) if wanted else {}
    choices: list[Choice] = []
    outputs = [plain.run(feed) for feed in feeds]
    with ctx.progress.task("sensitivity of layers", len(ways)) as advance:
        for name, possible in ways.items():
            if name not in statistics:
                refused[name] = "no sample reached it"
                continue
            layer, known, macs = layers[name], statistics[name], costs[name].macs or 0
            widening = _widening(layer, shapes)
            each = [(s, c) for s in possible for c in s.candidates(layer, known, macs, widening)]
            split, tried_on = min(each, key=lambda pair: abs(pair[1].macs - _TRIED * macs))
            trial = _trial(model, layer, known, split, tried_on.rank_or_channels)
            effect = _error(Session(trial.to_proto(), threads=ctx.threads), feeds, outputs)
            choices.append(
                Choice(
                    name=name,
                    covers=(name,),
                    macs=macs,
                    bytes=costs[name].nbytes,
                    candidates=tuple(candidate for _, candidate in each),
                    effect=effect / tried_on.error if tried_on.error > _EXACT else 1.0,
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


def _statistics(
    model: Model,
    layers: Sequence[Layer],
    ctx: Context,
    rng: np.random.Generator,
    samples: int,
    patches: int,
) -> dict[str, SecondOrder]:
    session = input_session(model, layers, ctx.threads)
    given = ctx.spread(session, samples)
    with ctx.progress.task("second-order statistics", given.length) as advance:
        return collect(
            layers,
            session,
            given,
            expected=given.length or samples or 1,
            rng=rng,
            patches=patches,
            progress=advance,
        )


def _widening(layer: Layer, shapes: Shapes) -> float:
    """Columns of a convolution's input for each column of its output; 1 where there are none."""
    read, made = shapes.get(layer.x.name), shapes.get(layer.y.name)
    if layer.op != "Conv" or not read or not made or not made[-1]:
        return 1.0
    return read[-1] / made[-1]


def _trial(model: Model, layer: Layer, known: SecondOrder, split: Split, rank: int) -> Model:
    """The model with one layer of that rank, not yet written as two."""
    trial = model.clone()
    twin = next(other for other in trial.layers() if other.name == layer.name)
    moment = (known.covariance if takes_bias(layer) else known.moment)[0]
    rows = split.nearest(layer, rows_of(layer)[0].astype(np.float64), moment, rank)[None]
    if takes_bias(twin):
        correct_bias(twin, rows, known)
    twin.set_weight(weight_of(twin, rows).astype(np.float32))
    return trial


def _error(session: Session, feeds: Sequence[Feed], outputs: Sequence[Feed]) -> float:
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
