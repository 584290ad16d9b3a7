"""What `onnxq analyze` finds out about a model: plain values, ready for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxq.analysis.sensitivity import Part, Sensitivity

__all__ = [
    "SPARED",
    "ActivationFindings",
    "Advice",
    "Agreement",
    "Analysis",
    "Compression",
    "Histogram",
    "LayerFindings",
    "Outlier",
    "TensorFindings",
    "WeightFindings",
]

# Error of the outputs at which a layer counts as cheap to compress: 20 dB.
SPARED = 0.01


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width.

    Args:
        low: Where the first bin begins.
        high: Where the last bin ends.
        counts: How many values each bin holds.
    """

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Outlier:
    """A channel that is much larger than the others.

    Args:
        channel: Its index.
        times: Its largest magnitude over that of the median channel.
    """

    channel: int
    times: float


@dataclass(frozen=True)
class WeightFindings:
    """A layer's weight.

    Args:
        shape: Its shape.
        low: Least value per output channel.
        high: Greatest value per output channel.
        histogram: Of all its values; None where some are not finite.
        spread: Largest magnitude of a channel over that of the median one; None if that is zero.
        crest: Per output channel the largest magnitude over the root of the mean square: how few
            values set the scale.  The median over channels.
        outliers: Output channels that are much larger than the median one.
    """

    shape: tuple[int, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    histogram: Histogram | None
    spread: float | None
    crest: float | None
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True)
class ActivationFindings:
    """The activation that a layer reads, over the samples.

    Args:
        tensor: Its name.
        is_input: Whether it is an input of the model.
        low: Its least value.
        high: Its greatest value.
        histogram: Of its values.
        clip_low: Where the range that was chosen begins.
        clip_high: Where it ends.
        clipped: Share of the values outside of it.
        zeros: Share of values that are exactly zero.
        rms: Root of the mean square.
        channel_low: Least value per channel; empty where channels are not told apart.
        channel_high: Greatest value per channel.
        outliers: Channels that are much larger than the median one.
    """

    tensor: str
    is_input: bool
    low: float
    high: float
    histogram: Histogram | None
    clip_low: float
    clip_high: float
    clipped: float
    zeros: float
    rms: float
    channel_low: tuple[float, ...]
    channel_high: tuple[float, ...]
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True)
class Advice:
    """What would help a layer.

    Args:
        text: What to do, one sentence.
        command: The command to run.
        removes: Share of the whole expected noise that goes away; None where it is not estimated.
    """

    text: str
    command: str
    removes: float | None


@dataclass(frozen=True)
class Compression:
    """What a layer may become by compression, alone or with layers that it is tied to.

    Args:
        method: Name of the pass that makes it.
        layers: The layers that change; costs are theirs together.
        ratio: The share that is kept, of weights or of channels, as the pass takes it.
        macs: Multiply-accumulates a sample afterwards.
        whole_macs: Multiply-accumulates a sample as the layers are.
        bytes: Bytes of the parameters afterwards.
        error: Expected squared error of the outputs of the layers, or of those that read them,
            relative to their power.
        effect: The same of the model's outputs, as a trial on held-out samples tells.
    """

    method: str
    layers: tuple[str, ...]
    ratio: float
    macs: int
    whole_macs: int
    bytes: int
    error: float
    effect: float

    @property
    def kept(self) -> float:
        """The share of the multiply-accumulates that is left."""
        return self.macs / self.whole_macs if self.whole_macs else 1.0

    @property
    def saved(self) -> int:
        """Multiply-accumulates a sample that are spared."""
        return self.whole_macs - self.macs


@dataclass(frozen=True)
class LayerFindings:
    """One layer.

    Args:
        name: Its node.
        op: Its operator.
        input_shape: Shape of the activation that it reads; None where not known.
        output_shape: Shape of its output.
        parameters: Values of weight and bias.
        bytes: Their bytes, as stored in float.
        macs: Multiply-accumulates a sample; None where not known.
        bit_operations: MACs times the bits of both factors, in the formats that are ranked.
        activation_bytes: Bytes of its output a sample, in float.
        executed: Whether any sample reached it.
        weights: Its weight.
        activation: What it reads; None where that is not known.
        sensitivities: What formats cost.
        gain: Squared error of the model's outputs, relative to their power, for each unit of
            squared error of its own output, relative to its power; None where not known.
        share: Of the noise expected of all layers in the formats that are ranked; None where not
            known.
        fragility: Its place among the layers, 1 the most fragile; None where share is None.
        left_in_float: What is left of the error where this layer alone stays in float, and all else
            is quantized, relative to the power of the outputs; None where that was not measured.
        left_in_float_metric: What the caller's metric gave then.
        compressions: What it may become by compression.
        whole: Method of compression -> why the layer stays whole.
        reason: Why it is fragile, or why that is not known; one sentence.
        advice: What would help; empty where nothing needs to.
    """

    name: str
    op: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    parameters: int
    bytes: int
    macs: int | None
    bit_operations: int | None
    activation_bytes: int | None
    executed: bool
    weights: WeightFindings
    activation: ActivationFindings | None
    sensitivities: tuple[Sensitivity, ...] = ()
    gain: float | None = None
    share: float | None = None
    fragility: int | None = None
    left_in_float: float | None = None
    left_in_float_metric: float | None = None
    compressions: tuple[Compression, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    advice: tuple[Advice, ...] = ()

    def sensitivity(self, part: Part, written: str) -> Sensitivity | None:
        """What a format of one part costs; None where that was not asked."""
        found = (s for s in self.sensitivities if (s.part, s.format) == (part, written))
        return next(found, None)

    def spared(self, method: str | None = None) -> Compression | None:
        """What spares most multiply-accumulates at no more than `SPARED` error of the outputs."""
        found = (
            c
            for c in self.compressions
            if c.effect <= SPARED and c.saved > 0 and method in (None, c.method)
        )
        return max(found, key=lambda c: c.saved, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; sensitivities as {part: {format: ...}}."""
        plain = dataclasses.asdict(self)
        parts: dict[Part, dict[str, Any]] = {"weights": {}, "activations": {}}
        plain["sensitivities"] = parts
        for s in self.sensitivities:
            parts[s.part][s.format] = {
                k: v for k, v in s.to_dict().items() if k not in ("part", "format")
            }
        return plain


@dataclass(frozen=True)
class TensorFindings:
    """How far one tensor of the quantized model is from the float one.

    Args:
        name: The tensor.
        node: The node that puts it out; empty for an input of the model.
        op: Its operator.
        sqnr_db: As it is computed, from inputs that are quantized.
        written_sqnr_db: As its readers find it; None where it is not written in integers.
        inherited_sqnr_db: The least SQNR of what the node reads; None where it reads nothing known.
        note: Why there is no number; empty where there is.
    """

    name: str
    node: str
    op: str
    sqnr_db: float | None
    written_sqnr_db: float | None = None
    inherited_sqnr_db: float | None = None
    note: str = ""

    @property
    def drop_db(self) -> float | None:
        """How much of the SQNR is lost in the node; None where that is not known."""
        if self.sqnr_db is None or self.inherited_sqnr_db is None:
            return None
        return self.inherited_sqnr_db - self.sqnr_db

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self) | {"drop_db": self.drop_db}


@dataclass(frozen=True)
class Agreement:
    """How alike the expected effects of a format rank the layers as the measured ones.

    Args:
        part: What is rounded.
        format: To what.
        layers: How many layers have both.
        spearman: Rank correlation; None for fewer than three layers, or where all are equal.
    """

    part: Part
    format: str
    layers: int
    spearman: float | None


@dataclass(frozen=True)
class Analysis:
    """What is known of a model and of what formats do to it.

    Args:
        model: name, opset, inputs, outputs, output_names, operators, bytes and sha256.
        versions: Of onnxq, Python and the libraries that decide about results.
        recipe: The passes that led to the model that was looked at, as TOML.
        weights: Format of weights by which layers are ranked.
        activations: Format of activations by which layers are ranked.
        samples: How many samples were used for each part.
        layers: In graph order.
        tensors: SQNR along the graph, in graph order.
        totals: Sums over the layers.
        agreement: Where effects were measured, how well the expected ones rank them.
        seconds: Wall time of each part.
        notes: What was changed, given up or not known, one sentence each.
    """

    model: Mapping[str, Any]
    versions: Mapping[str, str]
    recipe: str
    weights: str
    activations: str
    samples: Mapping[str, int]
    layers: Sequence[LayerFindings]
    tensors: Sequence[TensorFindings] = ()
    totals: Mapping[str, Any] = field(default_factory=dict)
    agreement: Sequence[Agreement] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def fragile(self) -> list[LayerFindings]:
        """The layers whose effect is known, the most fragile first."""
        known = [layer for layer in self.layers if layer.fragility is not None]
        return sorted(known, key=lambda layer: layer.fragility or 0)

    @property
    def cheap(self) -> list[Compression]:
        """What spares most at no more than `SPARED` error, each layer or group of them once."""
        found = {(c.method, c.layers): c for x in self.layers if (c := x.spared()) is not None}
        return sorted(found.values(), key=lambda c: -c.saved)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "model": dict(self.model),
            "versions": dict(self.versions),
            "recipe": self.recipe,
            "formats": {"weights": self.weights, "activations": self.activations},
            "samples": dict(self.samples),
            "totals": dict(self.totals),
            "layers": [layer.to_dict() for layer in self.layers],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "agreement": [dataclasses.asdict(a) for a in self.agreement],
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
        }
