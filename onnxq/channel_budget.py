"""How many channels each group keeps, so that a model meets a budget with the least error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxq.dependency import Group
from onnxq.errors import OnnxqError
from onnxq.model import Model
from onnxq.pruning import Costs, channels_at, order_by_error, trial
from onnxq.runtime import Session
from onnxq.second_order import SecondOrder
from onnxq.sensitivity import EXACT, output_error

__all__ = ["Loss", "Trials", "facts", "loss", "within_budget"]

# Numbers of channels that are considered: these parts of all.
_PARTS = np.arange(1, 32) / 32
# What is left of a group where its effect on the outputs is measured: at two places, since channels
# that others make up for cost less than the moments, drawn to their diagonal, tell.
_TRIED = (0.5, 0.25)


@dataclass(frozen=True)
class Loss:
    """What a group loses with its channels.

    Args:
        order: Places in its classes, in the order in which they are missed least.
        errors: Number of channels kept -> relative squared error of the layers that read them.
        effect: Squared error of the model's outputs, relative to their power, for each unit of it.
    """

    order: np.ndarray
    errors: Mapping[int, float]
    effect: float = 1.0

    def at(self, channels: int) -> float:
        """What that many channels add to the error of the outputs; all of them: nothing."""
        return self.effect * self.errors.get(channels, 0.0)


@dataclass(frozen=True)
class Trials:
    """Samples on which effects are measured: not those that statistics come from.

    Args:
        feeds: The samples.
        outputs: What the model gives for each.
        threads: Threads of onnxruntime; 0 for all cores.
    """

    feeds: Sequence[Mapping[str, np.ndarray]]
    outputs: Sequence[Mapping[str, np.ndarray]]
    threads: int


def loss(
    model: Model,
    group: Group,
    statistics: Mapping[str, SecondOrder],
    trials: Trials,
    *,
    multiple: int,
    least: int,
) -> Loss:
    """What a group loses, and what that does to the outputs: the worse of two trials.

    Args:
        model: The model.
        group: One of its groups.
        statistics: Those that `onnxq.pruning.candidates` takes.
        trials: What the effect is measured on.
        multiple: Channels kept are a multiple of this.
        least: Least number of channels kept.
    """
    size = group.classes.size
    order, errors = order_by_error(group, statistics)
    counts = {channels_at(size, part, multiple, least) for part in _PARTS} - {size}
    known = {count: float(errors[size - count - 1]) for count in counts}
    if not known:
        return Loss(order, known)
    effects = []
    for tried in {min(known, key=lambda count: abs(count - part * size)) for part in _TRIED}:
        if known[tried] > EXACT:
            copy = trial(model, group, statistics, tried, order)
            session = Session(copy.to_proto(), threads=trials.threads)
            error = output_error(session, trials.feeds, trials.outputs)
            effects.append(error / known[tried])
    return Loss(order, known, max(effects, default=1.0))


def within_budget(
    losses: Mapping[Group, Loss], costs: Costs, of: Literal["macs", "bytes"], share: float
) -> dict[Group, int]:
    """How many channels each group keeps.

    Greedy: step by step the cut that adds least error for what it saves.  What two groups save of a
    layer between them is a product, so costs are those of all cuts so far together.

    Args:
        losses: What each group may lose.
        costs: Of the model's layers.
        of: What the budget is of.
        share: Of what the model costs now, in (0, 1].

    Raises:
        OnnxqError: All cuts together do not meet it; says what they do.
    """
    place = ("macs", "bytes").index(of)
    now = {group: group.classes.size for group in losses}
    whole = costs.after({})[place]
    cost, wanted = whole, share * whole
    while cost > wanted:
        best: tuple[float, Group, int, int] | None = None
        for group, known in losses.items():
            for count in known.errors:
                if count >= now[group]:
                    continue
                after = costs.after({**now, group: count})[place]
                if after >= cost:
                    continue
                # more than is wanted is worth nothing
                rate = (known.at(count) - known.at(now[group])) / (cost - max(after, wanted))
                if best is None or rate < best[0]:
                    best = rate, group, count, after
        if best is None:
            fix = f"{cost / whole:.3f} can" if cost < whole else "no channels can be taken out"
            raise OnnxqError(f"{of}: a share of {share:g} cannot be met", fix=fix)
        _, group, now[group], cost = best
    return now


def facts(
    method: str,
    of: Literal["macs", "bytes"],
    share: float,
    costs: Costs,
    losses: Mapping[Group, Loss],
    counts: Mapping[Group, int],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """What came of a budget, as plain JSON types; costs of a group are those of its layers."""
    layers = []
    for group, count in counts.items():
        if count == group.classes.size:
            continue
        after = costs.after({group: count})
        known = [costs.layers[name] for name in dict.fromkeys((*group.shares[0], *group.shares[1]))]
        macs, nbytes = sum(m for m, _, _ in known), sum(w + b for _, w, b in known)
        layers.append(
            {
                "name": group.name,
                "method": method,
                "ratio": count / group.classes.size,
                "rank_or_channels": count,
                "error": losses[group].errors[count],
                "effect": losses[group].effect,
                "macs": {"before": macs, "after": macs - costs.macs + after[0]},
                "bytes": {"before": nbytes, "after": nbytes - costs.nbytes + after[1]},
            }
        )
    macs, nbytes = costs.after(counts)
    return {
        "budget": {"of": of, "share": share},
        "macs": {"before": costs.macs, "after": macs},
        "bytes": {"before": costs.nbytes, "after": nbytes},
        "layers": layers,
        "refused": dict(refused),
    }
