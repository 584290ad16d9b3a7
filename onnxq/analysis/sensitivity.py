"""What a number format does to one layer, all others left in float: expected, without running it.

Rounding a weight W to Q adds d x to what its layer puts out, d = Q - W, for patches x of its
input.  At the layer that noise has the power d H d^T, from second-order statistics.  At the model's
outputs it is what the gradient makes of it: for a random direction v there, with G the gradient of
the output along v with respect to what the layer puts out::

    E (v change)^2  =  E <d, sum over positions of G x^T>^2
                    ~  E sum over rows r of <d_r, (sum of G x^T)_r>^2

since the rows are rounded independently of each other.  A bias that is corrected takes the mean of
x out of it.  Rounding noise of the layer's input is as good as white, with a known power n, so that
it gives n times the squared gradient with respect to the input.  The gradients of all layers come
from one run per sample, whatever the number of layers and formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from onnxq.analysis.adjoint import Adjoint, Gradient
from onnxq.analysis.error import LARGEST_SQNR_DB
from onnxq.encoding import Encoding
from onnxq.layer import Layer
from onnxq.patches import PatchSource, rows_of
from onnxq.second_order import SecondOrder, takes_bias

__all__ = [
    "Effects",
    "Part",
    "Probe",
    "Sensitivity",
    "decibel",
    "expected_effects",
    "noise_of_input",
    "noise_of_weight",
    "output_power",
    "spearman",
    "weight_error",
]

Part = Literal["weights", "activations"]
# Bytes of patches that are drawn at once.
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Sensitivity:
    """What one format of one layer's weight, or of its input, costs.

    Effects are squared errors of the model's outputs relative to the power of these, averaged over
    the outputs: 0.01 is an SQNR of 20 dB.

    Args:
        part: What is rounded: the weight, or the activation that the layer reads.
        format: To what.
        layer_sqnr_db: SQNR of the layer's own output, from second-order statistics.
        effect: Expected at the model's outputs; None where it is not known.
        measured: What it was on data; None where it was not measured.
        metric: What the caller's metric gave; None where there is none.
        note: Why a number is missing, or what it leaves out; empty where there is nothing to say.
    """

    part: Part
    format: str
    layer_sqnr_db: float | None = None
    effect: float | None = None
    measured: float | None = None
    metric: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; SQNRs beside effects."""
        return {
            "part": self.part,
            "format": self.format,
            "layer_sqnr_db": self.layer_sqnr_db,
            "effect": self.effect,
            "sqnr_db": decibel(self.effect),
            "measured_effect": self.measured,
            "measured_sqnr_db": decibel(self.measured),
            "metric": self.metric,
            "note": self.note,
        }


def decibel(effect: float | None) -> float | None:
    """A share of noise as SQNR in dB, held within +-`LARGEST_SQNR_DB`."""
    if effect is None:
        return None
    if effect <= 0:
        return LARGEST_SQNR_DB
    return min(max(-10 * math.log10(effect), -LARGEST_SQNR_DB), LARGEST_SQNR_DB)


# ---------------------------------------------------------------------- at the layer


def weight_error(layer: Layer, encoding: Encoding) -> np.ndarray:
    """What rounding to nearest changes of a weight, as rows, float64 [G, R, K]."""
    rounded = rows_of(layer, encoding.fake_quantize(layer.weight))
    return np.asarray(rounded.astype(np.float64) - rows_of(layer))


def output_power(layer: Layer, statistics: SecondOrder) -> float:
    """Mean square of what a layer puts out, summed over its channels."""
    rows = _alpha(layer) * rows_of(layer).astype(np.float64)
    bias = np.zeros(rows.shape[:2])
    if layer.bias is not None:
        beta = float(layer.node.attrs.get("beta", 1.0))
        bias = beta * np.broadcast_to(layer.bias.reshape(-1), rows[..., 0].size).reshape(bias.shape)
    means = np.einsum("grk,gk->gr", rows, statistics.sampled_mean)
    return float(_quadratic(rows, statistics.covariance) + np.square(means + bias).sum())


def noise_of_weight(layer: Layer, error: np.ndarray, statistics: SecondOrder) -> float:
    """Mean square of what an error of the weight adds to the output, summed over its channels.

    About the mean where a bias makes up for it.
    """
    moment = statistics.covariance if takes_bias(layer) else statistics.moment
    return _quadratic(_alpha(layer) * error, moment)


def noise_of_input(layer: Layer, noise: float) -> float:
    """The same of white noise in the input, of this power."""
    return noise * _alpha(layer) ** 2 * float(np.square(rows_of(layer).astype(np.float64)).sum())


def _quadratic(rows: np.ndarray, moment: np.ndarray) -> float:
    return max(float(np.einsum("grk,grk->", np.matmul(rows, moment), rows)), 0.0)


def _alpha(layer: Layer) -> float:
    return float(layer.node.attrs.get("alpha", 1.0))  # of a Gemm


# ---------------------------------------------------------------------- at the outputs


@dataclass(frozen=True, eq=False)
class Probe:
    """A layer, and the errors of its weight whose effects are wanted.

    Args:
        layer: The layer.
        mean: The mean patch of its input, [G, K].
        errors: Key -> error, [G, R, K].
    """

    layer: Layer
    mean: np.ndarray
    errors: Mapping[Hashable, np.ndarray]


@dataclass(eq=False)
class Effects:
    """Effects at the model's outputs, relative to their power.

    Args:
        weights: Layer -> key -> effect.
        inputs: Layer -> effect of white noise of power 1 in what it reads.
        samples: How many samples they are over.
    """

    weights: dict[str, dict[Hashable, float]] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)
    samples: int = 0


def expected_effects(
    adjoint: Adjoint,
    probes: Iterable[Probe],
    samples: Iterable[Mapping[str, np.ndarray]],
    powers: Mapping[str, float],
    rng: np.random.Generator,
    progress: Callable[[int], object] = lambda steps: None,
) -> Effects:
    """What errors of weights, and noise in inputs, are expected to do to the outputs.

    Args:
        adjoint: The model and its adjoint.
        probes: The layers and errors.
        samples: Samples; those that do not fit the adjoint are left out.
        powers: Sum of the squares of each output, of the mean sample.
        rng: Draws directions.
        progress: Called with 1 after each sample.
    """
    wanted = {p.layer.name: p for p in probes if p.layer.name in adjoint.layers}
    found = Effects({n: dict.fromkeys(p.errors, 0.0) for n, p in wanted.items()})
    found.inputs = dict.fromkeys(wanted, 0.0)
    alive = {n: s for n, s in adjoint.outputs.items() if powers.get(n, 0.0) > 0}
    scales = {n: 1 / math.sqrt(powers[n] * len(alive)) for n in alive}
    for feed in samples:
        progress(1)
        if not adjoint.fits(feed):
            continue
        found.samples += 1
        direction = {
            n: rng.choice(np.array([-1.0, 1.0], np.float32), s) * np.float32(scales[n])
            if n in alive
            else np.zeros(s, np.float32)
            for n, s in adjoint.outputs.items()
        }
        for name, gradient in adjoint.run(feed, direction):
            if name in wanted:
                found.inputs[name] += gradient.input_energy
                pull = weight_gradient(wanted[name], gradient)
                for key, error in wanted[name].errors.items():
                    products = np.einsum("grk,grk->gr", error, pull)
                    found.weights[name][key] += float(np.square(products).sum())
    count = max(found.samples, 1)
    found.inputs = {n: e / count for n, e in found.inputs.items()}
    found.weights = {
        n: {k: e / count for k, e in effects.items()} for n, effects in found.weights.items()
    }
    return found


def weight_gradient(probe: Probe, gradient: Gradient) -> np.ndarray:
    """Gradient with respect to the weight as rows, [G, R, K]; of a bias that is corrected, too."""
    layer, g = probe.layer, gradient.output
    source = PatchSource.of(layer)
    if source.op != "rows":
        g = np.moveaxis(g, 1, -1)
    x = np.asarray(gradient.x, np.float32)
    g = np.ascontiguousarray(g, np.float32).reshape(source.positions(x), source.groups, -1)
    total = np.zeros((source.groups, g.shape[2], source.columns))
    step = max(1, _CHUNK // (4 * source.groups * source.columns))
    for start in range(0, len(g), step):
        picked = np.arange(start, min(start + step, len(g)))
        patches = source.draw(x, picked).transpose(1, 0, 2)
        total += np.matmul(g[picked].transpose(1, 2, 0), patches)
    if takes_bias(layer):
        total -= g.sum(axis=0, dtype=np.float64)[:, :, None] * probe.mean[:, None, :]
    return _alpha(layer) * total


# ---------------------------------------------------------------------- how alike


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; equal values share their mean rank.

    None for fewer than three values, or where one side is all equal.
    """
    if len(a) < 3:
        return None
    ranks = np.array([_ranks(np.asarray(v, np.float64)) for v in (a, b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = float(np.sqrt(np.square(ranks).sum(axis=1).prod()))
    return float(ranks[0] @ ranks[1]) / spread if spread > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[places])
