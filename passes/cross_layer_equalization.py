"""Even out the channels of neighbouring layers without changing the function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxq.analysis.distribution import propagate
from onnxq.coupling import Coupling, Side, couple
from onnxq.kernels import equalize as kernels
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context
from onnxq.rescale import rescale

__all__ = ["CrossLayerEqualization"]

# Without samples, a channel is taken to stay within so many standard deviations of its mean.
DEVIATIONS = 6.0


@dataclass(frozen=True, kw_only=True)
class CrossLayerEqualization:
    r"""Scale channels so that the weights of the layers on both sides have equal ranges.

    Relu and its like let a positive factor through, f(s x) = s f(x), so a channel may be divided
    by s where it is put out and multiplied by s where it is read::

        Conv(W1, b1) -> Relu -> Conv(W2)   =   Conv(W1 / s, b1 / s) -> Relu -> Conv(W2 s)

        s_i = sqrt(max |W1[i, :]| / max |W2[:, i]|),   over and over until nothing moves

    Each magnitude counts as a share of the largest of its layer.  What hangs together is scaled
    together: depthwise convolutions take a scale in and give one out, residual additions tie the
    channels of everything that they add, Concat and Split pass each channel on, and constants that
    are added are scaled along.  Channels go through Relu, LeakyRelu, PRelu, pooling, padding with
    zeros, Resize, Flatten and reductions over positions.

    A Clip from 0 to a bound (ReLU6) is kept exactly::

        Clip(0, 6)   =>   Relu -> Min(6 / s)         a bound per channel
        Clip(0, 6)   =>   Relu                       where no channel reaches the bound

    Refused, with the reason: channels that something else reads (Sigmoid, an output of the model,
    a subgraph), shared or computed weights.

    Args:
        balance: What counts as the size of a channel where it is put out: "weights" is the paper's
            rule; "activations" the largest magnitude on the samples, for weights that have a scale
            per channel anyhow; "both" the larger share of the two, for one scale per tensor.
        ceilings: What becomes of Clip(0, bound): "exact" as above; "keep" leaves it and the
            channels that go through it alone.
        sweeps: At most so many rounds over the layers.
        tolerance: Stop when no scale moves by more than this, as |log s|.
        largest: Scales stay between 1 / largest and largest, which bounds those of channels that
            are nearly dead.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1.
    """

    name: ClassVar[str] = "cross-layer-equalization"

    balance: Literal["weights", "activations", "both"] = "weights"
    ceilings: Literal["exact", "keep"] = "exact"
    sweeps: int = 1000
    tolerance: float = 1e-3
    largest: float = 1e4

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Scale weights, biases, bounds and what is known of the channels."""
        changes = Changes()
        coupling = couple(model)
        if self.ceilings == "keep":
            for ceiling in coupling.ceilings:
                why = f"it goes through {ceiling.node.name} ({ceiling.node.op})"
                coupling.fixed.update(dict.fromkeys(ceiling.classes.tolist(), why))
        ranges = self._ranges(model, coupling, ctx)
        scale, sweeps = self._solve(coupling, ranges)
        moved = np.abs(np.log(scale)) > self.tolerance
        for name, why in coupling.refused.items():
            changes.skip(name, why)
        for side in coupling.outputs:
            if why := coupling.reason(side.classes):
                changes.skip(side.layer.name, why)
        if not moved.any():
            return changes
        rescale(model, coupling, np.where(moved, scale, 1.0), ranges, changes)
        pairs = sum(bool(moved[s.classes].any()) for s in coupling.outputs)
        changes.add(f"channels of {pairs} layers scaled, {sweeps} sweeps")
        return changes

    def _ranges(
        self, model: Model, coupling: Coupling, ctx: Context
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Least and greatest value of each channel, by tensor.

        Of what layers read, if that is to be balanced, and of what comes before each Clip: on the
        samples, or by batch normalization where there are none but made-up ones.
        """
        names = [c.node.inputs[0].name for c in coupling.ceilings]
        if self.balance != "weights":
            for side in coupling.inputs:
                x = side.layer.x  # channels along axis 1
                if side.layer.op == "Conv" or (x.shape is not None and len(x.shape) == 2):
                    names.append(x.name)
        names = list(dict.fromkeys(names))
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if ctx.data is None or ctx.is_synthetic:
            known, _ = propagate(model)
            for name in names:
                if name in known and not known[name].estimated:
                    found[name] = known[name].extremes(DEVIATIONS)
        if ctx.data is not None:
            found |= ctx.channel_ranges(model, [n for n in names if n not in found])
        return found

    def _solve(
        self, coupling: Coupling, ranges: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, int]:
        activations = {n: np.maximum(-low, high) for n, (low, high) in ranges.items()}
        if self.balance == "weights":
            activations = {}
        scale = np.ones(coupling.count)
        packed = _Packed.of(coupling, activations)
        if packed is None:
            return scale, 0
        sweeps = kernels.equalize(
            packed.weights,
            packed.layers,
            packed.classes,
            packed.members,
            packed.sites,
            packed.tops,
            coupling.is_fixed(np.arange(coupling.count)),
            scale,
            self.balance != "activations",
            self.sweeps,
            self.tolerance,
            self.largest,
        )
        return scale, sweeps


@dataclass(frozen=True, eq=False)
class _Packed:
    """The layers as the kernel takes them."""

    weights: np.ndarray
    layers: np.ndarray
    classes: np.ndarray
    members: np.ndarray
    sites: np.ndarray
    tops: np.ndarray

    @classmethod
    def of(cls, coupling: Coupling, activations: dict[str, np.ndarray]) -> _Packed | None:
        """Pack the layers; None if there is no class that one puts out and another reads."""
        sites = _sites(coupling)
        if not sites:
            return None
        nodes: dict[int, Layer] = {}
        for side in (*coupling.outputs, *coupling.inputs):
            nodes.setdefault(id(side.layer.node), side.layer)
        index = {key: i for i, key in enumerate(nodes)}
        table = np.full((len(nodes), 6), -1, np.int64)
        weights, classes, tops, start, offset = [], [], [], 0, 0
        for i, layer in enumerate(nodes.values()):
            matrix = layer.magnitudes
            per_group = layer.output_channels // layer.group
            table[i, :4] = start, *matrix.shape, per_group
            weights.append(np.ascontiguousarray(matrix).reshape(-1))
            start += matrix.size
        for column, sides in ((4, coupling.outputs), (5, coupling.inputs)):
            for side in sides:
                table[index[id(side.layer.node)], column] = offset
                classes.append(side.classes)
                top = activations.get(side.layer.x.name) if column == 5 else None
                tops.append(np.zeros(side.classes.size) if top is None else top)
                offset += side.classes.size
        members = [(index[id(s.layer.node)], role) for site in sites for s, role in site]
        ends = np.cumsum([0, *map(len, sites)])
        return cls(
            np.concatenate(weights),
            table,
            np.concatenate(classes).astype(np.int64),
            np.array(members, np.int64),
            ends.astype(np.int64),
            np.concatenate(tops).astype(np.float64),
        )


def _sites(coupling: Coupling) -> list[list[tuple[Side, int]]]:
    """Sides that share a class, put together; those without both roles left out."""
    sides = [*((s, 0) for s in coupling.outputs), *((s, 1) for s in coupling.inputs)]
    parent = [*range(coupling.count)]

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for side, _ in sides:
        first = root(int(side.classes[0])) if side.classes.size else 0
        for c in side.classes.tolist():
            parent[root(c)] = first
    found: dict[int, list[tuple[Side, int]]] = {}
    for side, role in sides:
        if side.classes.size:
            found.setdefault(root(int(side.classes[0])), []).append((side, role))
    return [site for site in found.values() if len({role for _, role in site}) == 2]
