"""What a number format does to one layer, all others left in float: expected, without running it.

Rounding a weight W to Q adds d x to what its layer puts out, d = Q - W, for patches x of its
input.  At the layer that noise has the power d H d^T, from second-order statistics.  At the model's
outputs it is what the gradient makes of it: for a random direction v there, with G the gradient of
the output along v with respect to what the layer puts out::

    E (v change)^2  =  E <d, sum over positions of G x^T>^2
                    ~  E sum over rows r of <d_r, (sum of G x^T)_r>^2

since the rows are rounded independently of each other; what the terms between rows add is believed
as far as it shows beyond its own scatter.  A bias that is corrected takes the mean of x out of it.
Rounding the layer's input by e gives E sum of (g e)^2 in the same way, g the gradient with respect
to it.  The gradients of all layers come from one run per sample, whatever the number of layers and
formats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper

from onnxq.analysis.adjoint import Adjoint, Gradient, draw_directions
from onnxq.analysis.error import LARGEST_SQNR_DB
from onnxq.encoding import Encoding
from onnxq.layer import Layer
from onnxq.patches import PatchSource, rows_of
from onnxq.runtime import Session
from onnxq.second_order import SecondOrder, takes_bias

__all__ = [
    "PARTS",
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
PARTS: tuple[Part, Part] = ("weights", "activations")
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
    if not effect > 0:
        return LARGEST_SQNR_DB
    if math.isinf(effect):
        return -LARGEST_SQNR_DB
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
    """A layer, and the errors whose effects are wanted.

    Args:
        layer: The layer.
        mean: The mean patch of its input, [G, K].
        errors: Key -> error of its weight, [G, R, K].
        roundings: Key -> how its input is rounded.
    """

    layer: Layer
    mean: np.ndarray
    errors: Mapping[Hashable, np.ndarray]
    roundings: Mapping[Hashable, Encoding]


def expected_effects(
    adjoint: Adjoint,
    probes: Iterable[Probe],
    samples: Sequence[Mapping[str, np.ndarray]],
    powers: Mapping[str, float],
    rng: np.random.Generator,
    *,
    directions: int = 1,
    threads: int = 1,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict[str, dict[Hashable, float]]:
    """What errors of weights and inputs are expected to do to the outputs, relative to their power.

    Args:
        adjoint: The model and its adjoint.
        probes: The layers and errors.
        samples: Samples that fit the adjoint.
        powers: Sum of the squares of each output, of the mean sample.
        rng: Draws directions.
        directions: How many, for each sample.
        threads: Samples that are run side by side.
        progress: Called with 1 after each sample.

    Returns:
        Layer -> key -> effect; layers that no output depends on are missing.
    """
    wanted = {p.layer.name: p for p in probes if p.layer.name in adjoint.layers}
    drawn = draw_directions(adjoint, powers, len(samples) * directions, rng)
    seen: dict[str, dict[Hashable, list[tuple[float, float]]]] = {
        name: {key: [] for key in (*p.errors, *p.roundings)} for name, p in wanted.items()
    }

    matmul = _matmul()

    def one(index: int) -> list[dict[str, dict[Hashable, tuple[float, float]]]]:
        found = []
        for direction in drawn[index * directions : (index + 1) * directions]:
            runs = adjoint.run(samples[index], direction)
            found.append({n: _products(wanted[n], g, matmul) for n, g in runs if n in wanted})
        return found

    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(one, range(len(samples))):
            for name, products in (item for row in found for item in row.items()):
                for key, pair in products.items():
                    seen[name][key].append(pair)
            progress(1)
    return {
        name: {key: _believed(np.array(pairs)) for key, pairs in row.items()}
        for name, row in seen.items()
    }


def _products(
    probe: Probe, gradient: Gradient, matmul: Session
) -> dict[Hashable, tuple[float, float]]:
    """Sum of squares, and square of the sum, of what the parts of each error do to the outputs."""
    found: dict[Hashable, tuple[float, float]] = {}
    pull = weight_gradient(probe, gradient, matmul)
    for key, error in probe.errors.items():
        products = np.einsum("grk,grk->gr", error, pull)
        found[key] = float(np.square(products).sum()), float(products.sum()) ** 2
    for key, encoding in probe.roundings.items():
        change = (encoding.fake_quantize(gradient.x) - gradient.x) * gradient.input
        square = float(np.square(change, dtype=np.float64).sum())
        found[key] = square, square  # terms between so many values are nothing but scatter
    return found


def _believed(pairs: np.ndarray) -> float:
    """The mean sum of squares, with the terms between its parts as far as these can be believed.

    Args:
        pairs: Sum of squares, and square of the sum, of each sample and direction, [S, 2].
    """
    alone, between = pairs[:, 0], pairs[:, 1] - pairs[:, 0]
    mean = float(between.mean())
    if len(pairs) < 2 or mean == 0:
        return float(alone.mean())
    scatter = float(between.var(ddof=1)) / len(pairs)
    return float(alone.mean()) + max(0.0, 1 - scatter / mean**2) * mean


def weight_gradient(probe: Probe, gradient: Gradient, matmul: Session) -> np.ndarray:
    """Gradient with respect to the weight as rows, [G, R, K]; of a bias that is corrected, too.

    Args:
        probe: The layer.
        gradient: On one sample.
        matmul: Multiplies its inputs `a` and `b` to `y`.
    """
    layer, g = probe.layer, gradient.output
    source = PatchSource.of(layer)
    x = np.asarray(gradient.x, np.float32)
    if source.op != "rows" and source.columns == math.prod(source.size):
        total = source.products(x, g).astype(np.float32)
        each = g.sum(axis=(0, *range(2, g.ndim)), dtype=np.float32).reshape(total.shape[:2])
        return _about_mean(probe, total, each)
    if source.op == "Conv" and source.is_pointwise(x):
        turned = np.ascontiguousarray(np.moveaxis(x, 1, -1))  # as the rows of a matrix, all at once
        x, source = turned, dataclasses.replace(source, op="rows", size=(), window=())
        g = np.moveaxis(g, 1, -1)
    elif source.op != "rows":
        g = np.moveaxis(g, 1, -1)
    g = np.ascontiguousarray(g, np.float32).reshape(source.positions(x), source.groups, -1)
    total = np.zeros((source.groups, g.shape[2], source.columns), np.float32)
    step = max(1, _CHUNK // (4 * source.groups * source.columns))
    for start in range(0, len(g), step):
        picked = np.arange(start, min(start + step, len(g)))
        patches = np.ascontiguousarray(source.draw(x, picked).transpose(1, 0, 2))
        part = np.ascontiguousarray(g[start : start + step].transpose(1, 2, 0))
        total += matmul.run_shared({"a": part, "b": patches})["y"]
    return _about_mean(probe, total, g.sum(axis=0))


def _about_mean(probe: Probe, total: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient [G, R, K] less what a corrected bias, with its gradient [G, R], makes up for."""
    if takes_bias(probe.layer):
        total -= gradient[:, :, None] * probe.mean.astype(np.float32)[:, None, :]
    return np.asarray(np.float32(_alpha(probe.layer)) * total)


def _matmul() -> Session:
    """A product of matrices on one thread: those of BLAS would get into one another's way."""
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    tensors = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None, None])
        for name in ("a", "b", "y")
    ]
    graph = helper.make_graph([node], "product", tensors[:2], tensors[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return Session(model, threads=1)


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
