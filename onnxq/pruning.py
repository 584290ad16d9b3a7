"""What channels are worth, and what a model costs and loses with fewer of them.

All of it is arithmetic on second-order statistics of what layers read: no candidate is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from onnxq.analysis.cost import Shapes, layer_costs, tensor_shapes
from onnxq.dependency import Dependencies, Group, Side, is_depthwise
from onnxq.kernels.importance import Reader, eliminate
from onnxq.model import Model
from onnxq.patches import columns_of, rows_of, weight_of
from onnxq.second_order import SecondOrder, correct_bias, takes_bias, trusted_moment

__all__ = [
    "Candidate",
    "Costs",
    "candidates",
    "channels_at",
    "dead_classes",
    "order_by_error",
    "order_by_magnitude",
    "trial",
]


class Candidate(NamedTuple):
    """A group cut to some of its channels.

    Args:
        ratio: The share of channels that was asked for.
        channels: How many are kept.
        macs: Multiply-accumulates of the model with this group cut alone.
        nbytes: Bytes of the model's constants then.
        error: Relative squared error of the outputs of the layers that read the group, added up,
            each reconstructed.
    """

    ratio: float
    channels: int
    macs: int
    nbytes: int
    error: float


def candidates(
    model: Model,
    group: Group,
    statistics: Mapping[str, SecondOrder],
    ratios: Sequence[float],
    *,
    multiple: int = 8,
    least: int = 1,
    costs: Costs | None = None,
) -> list[Candidate]:
    """What a group would cost and lose at each ratio.

    Args:
        model: The model.
        group: One of its groups.
        statistics: Layer name -> second-order statistics of the input of each layer in
            `group.readers`, as `onnxq.second_order.collect` gives them, best in halves.
        ratios: Shares of channels kept, in (0, 1].
        multiple: Channels kept are a multiple of this.
        least: Least number of channels kept.
        costs: Of the model's layers, where they are known already.
    """
    costs = costs or Costs.of(model)
    size = group.classes.size
    counts = [channels_at(size, ratio, multiple, least) for ratio in ratios]
    _, errors = order_by_error(group, statistics, min(counts, default=size))
    found = []
    for ratio, count in zip(ratios, counts, strict=True):
        macs, nbytes = costs.after({group: count})
        error = float(errors[size - count - 1]) if count < size else 0.0
        found.append(Candidate(ratio, count, macs, nbytes, error))
    return found


def trial(
    model: Model,
    group: Group,
    statistics: Mapping[str, SecondOrder],
    channels: int,
    order: np.ndarray | None = None,
) -> Model:
    """A copy of the model that computes what it will with a group cut to so many channels.

    Nothing is cut: those that would go are read with weights of zero, and the layers that read the
    group are reconstructed.  It is there to be run, and shows what the error does further on.

    Args:
        model: The model.
        group: One of its groups.
        statistics: Those that `candidates` takes.
        channels: How many are kept.
        order: Its classes as `order_by_error` gives them, where that is known already.
    """
    copy = model.clone()
    if order is None:
        order, _ = order_by_error(group, statistics, channels)
    order = order[: group.classes.size - channels]
    twins = {layer.name: layer for layer in copy.layers()}
    for side in group.readers:
        layer, known = twins[side.layer.name], statistics[side.layer.name]
        kept = ~columns_of(layer, np.isin(side.classes, group.classes[order]))
        rows = rows_of(layer).astype(np.float64)
        found = np.zeros_like(rows)
        for g, reader in enumerate(_readers(side, group, statistics)):
            s = kept[g]
            found[g][:, s] = reader.refitted(s)
        if takes_bias(layer):
            correct_bias(layer, found, known)
        layer.set_weight(weight_of(layer, found).astype(layer.weight.dtype))
    return copy


def channels_at(size: int, ratio: float, multiple: int, least: int) -> int:
    """How many of so many channels a ratio keeps: the nearest multiple, and not too few."""
    nearest = multiple * int(ratio * size / multiple + 0.5)
    return min(size, max(nearest, multiple, least))


@dataclass(frozen=True)
class Costs:
    """What layers cost with all of their channels.

    Args:
        layers: Name -> multiply-accumulates, bytes of the weight and of the bias.
        nbytes: Bytes of all constants.
    """

    layers: Mapping[str, tuple[int, int, int]]
    nbytes: int

    @classmethod
    def of(cls, model: Model, shapes: Shapes | None = None) -> Costs:
        """The costs of a model, with shapes as `tensor_shapes` gives them."""
        known = {
            cost.name: cost.macs or 0
            for cost in layer_costs(model, tensor_shapes(model) if shapes is None else shapes)
        }
        layers = {}
        for layer in model.layers():
            bias = 0 if layer.bias is None else layer.bias.nbytes
            layers[layer.name] = known[layer.name], layer.weight.nbytes, bias
        return cls(layers, model.nbytes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers, products of activations left out."""
        return sum(macs for macs, _, _ in self.layers.values())

    def after(self, channels: Mapping[Group, int]) -> tuple[int, int]:
        """Multiply-accumulates and bytes once groups are cut to so many channels."""
        outputs: dict[str, float] = {}
        inputs: dict[str, float] = {}
        depthwise = set()
        for group, count in channels.items():
            gone = 1.0 - count / group.classes.size
            for left, shares in zip((outputs, inputs), group.shares, strict=True):
                for name, share in shares.items():
                    left[name] = left.get(name, 1.0) - share * gone
            depthwise |= {s.layer.name for s in group.inputs if is_depthwise(s.layer)}
        macs, nbytes = self.macs, self.nbytes
        for name in outputs.keys() | inputs.keys():
            whole, weight, bias = self.layers[name]
            out = outputs.get(name, 1.0)
            both = out if name in depthwise else out * inputs.get(name, 1.0)
            macs -= whole - round(whole * both)
            nbytes -= weight - round(weight * both) + bias - round(bias * out)
        return macs, nbytes


# ---------------------------------------------------------------------- importance


def dead_classes(found: Dependencies, group: Group) -> np.ndarray:
    """Which classes of a group are read with weights of zero alone, bool."""
    dead = np.ones(found.count, bool)
    for side in group.readers:
        dead[side.classes[_squares(side, reads=True) > 0]] = False
    return np.asarray(dead[group.classes])


def order_by_magnitude(group: Group) -> np.ndarray:
    """Classes of a group, by their place in it, from the smallest weights to the largest.

    Of each class count the squares of all weights that put it out or read it, as shares of the mean
    of each layer.

    Source: the group norm of Fang et al. 2023 (arXiv 2301.12900).
    """
    total = np.zeros(group.classes.size)
    for reads, sides in ((False, group.outputs), (True, group.inputs)):
        for side in sides:
            squares = _squares(side, reads=reads)
            own = np.array([squares[side.classes == c].sum() for c in group.classes])
            total += own / max(float(own.mean()), 1e-30)
    return np.argsort(total, kind="stable")


def _squares(side: Side, *, reads: bool) -> np.ndarray:
    """The sum of the squared weights of each channel of a side."""
    layer = side.layer
    squares = np.square(layer.weight.astype(np.float64))
    if not reads:
        return layer.sum_over_inputs(squares)
    columns = rows_of(layer, squares).sum(axis=1)
    return np.asarray(columns.reshape(layer.input_channels, -1).sum(axis=1))


def order_by_error(
    group: Group, statistics: Mapping[str, SecondOrder], stop: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Classes of a group in the order in which they are missed least, and what that costs.

    Args:
        group: The group.
        statistics: Layer name -> statistics of its input, for each of `group.readers`.
        stop: How many classes need no order, because they stay.

    Returns:
        Places in `group.classes`, and the relative error with all up to each one gone.
    """
    readers = [r for side in group.readers for r in _readers(side, group, statistics)]
    if not readers:
        return np.arange(group.classes.size - stop), np.zeros(group.classes.size - stop)
    return eliminate(readers, stop)


def _readers(side: Side, group: Group, statistics: Mapping[str, SecondOrder]) -> Iterator[Reader]:
    layer, known = side.layer, statistics[side.layer.name]
    rows = rows_of(layer).astype(np.float64)
    moment = trusted_moment(layer, known)
    power = float(np.sum((rows @ moment) * rows))
    for g, columns in enumerate(columns_of(layer, side.classes)):
        blocks = np.array([np.flatnonzero(columns == c) for c in group.classes])
        yield Reader(rows[g], moment[g], blocks, power)
