"""Round weights by the error of the layer's output, and correct its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.encoding import Encoding
from onnxq.errors import RecipeError
from onnxq.kernels import rounding
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context
from onnxq.second_order import (
    SecondOrder,
    collect,
    correct_bias,
    input_session,
    rows_of,
    supports,
    weight_of,
)

__all__ = ["GPTQ"]


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Move weights onto their grid so that layer outputs change least, then correct the biases.

    Rounding to nearest minimises the error of the weight; what matters is that of the output,
    tr((Q - W) H (Q - W)^T) with H the second moment of the layer's input.  Columns are rounded one
    after the other, and the columns not yet rounded make up for each error::

        w[j] -= (w[k] - q[k]) / U[k, k] * U[k, j]   for j > k,      H^-1 = U^T U
        b    += (W - Q) m                                           m = mean patch

    Where a bias takes up the shift of the mean, H is taken about the mean.  H is drawn towards its
    diagonal by its sampling noise, and the rounding noise of the integer input, s_x^2 / 12, is
    added to its diagonal, so that few samples do no harm.

    Before and after::

        W: float                      W: values on the grid of its encoding, b moved

    Refused: layers without an encoding (they stay float), ConvTranspose, MatMul with its weight on
    the left; these are rounded to nearest.  A layer is left at nearest where that is no worse.

    Args:
        samples: Use at most so many calibration samples, spread evenly; 0 uses all.
        patches: Patches drawn per layer, about.

    Source: Frantar et al. 2022 (arXiv 2210.17323); bias: Nagel et al. 2019 (arXiv 1906.04721).
    """

    name: ClassVar[str] = "gptq"

    samples: int = 32
    patches: int = 8192

    def __post_init__(self) -> None:
        if self.samples < 0 or self.patches < 1:
            raise RecipeError(
                f"samples {self.samples}, patches {self.patches}: wanted at least 0 and 1"
            )

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Rewrite weights and biases."""
        changes = Changes()
        layers = [layer for layer in model.layers() if self._wanted(layer, changes)]
        if not layers:
            return changes
        statistics = self._collect(layers, model, ctx)
        count = 0
        with ctx.progress.task("round weights", len(layers)) as advance:
            for layer in layers:
                if layer.name in statistics:
                    count += _round(layer, statistics[layer.name], changes)
                else:
                    changes.skip(layer.name, "no sample reached it")
                advance(1)
        changes.add(f"{count} weights rounded by output error")
        return changes

    def _wanted(self, layer: Layer, changes: Changes) -> bool:
        if layer.weight_encoding is None:
            return False
        if layer.weight_encoding.block:
            changes.skip(layer.name, "scales per block are rounded to nearest")
            return False
        if not supports(layer):
            changes.skip(layer.name, f"{layer.op} of this kind is rounded to nearest")
            return False
        if not layer.owns_params:
            changes.skip(layer.name, "its weight or bias is shared; rounded to nearest")
            return False
        return True

    def _collect(self, layers: list[Layer], model: Model, ctx: Context) -> dict[str, SecondOrder]:
        session = input_session(model, layers, ctx.threads)
        samples = ctx.spread(session, self.samples)
        with ctx.progress.task("second-order statistics", samples.length) as advance:
            return collect(
                layers,
                session,
                samples,
                expected=samples.length or self.samples or 1,
                rng=ctx.rng(self),
                patches=self.patches,
                progress=advance,
            )


def _round(layer: Layer, statistics: SecondOrder, changes: Changes) -> bool:
    """Round one layer and correct its bias; False if nearest was kept."""
    encoding = layer.model.encodings[layer.weight_tensor.name]
    biased = layer.op in ("Conv", "Gemm") and (layer.bias is not None or layer.bias_tensor is None)
    gram = statistics.covariance if biased else statistics.moment
    rows = rows_of(layer).astype(np.float32)
    scale, zero = _per_row(encoding, rows.shape[0] * rows.shape[1])
    nearest = rows_of(layer, encoding.fake_quantize(layer.weight))
    noise = _input_noise(layer)
    rounded = np.empty(rows.shape, np.float32)  # in C order, as the kernel is compiled for
    kept = 0
    for g in range(rows.shape[0]):
        part = slice(g * rows.shape[1], (g + 1) * rows.shape[1])
        h = rounding.shrink(gram[g], statistics.sampled)
        damping = noise + 1e-6 * float(np.trace(h)) / len(h) + 1e-30
        try:
            factor = rounding.inverse_factor(h, damping)
        except np.linalg.LinAlgError:
            factor = np.full_like(h, np.nan, np.float32)
        rounding.gptq(
            rows[g].copy(),
            scale[part],
            zero[part],
            encoding.qmin,
            encoding.qmax,
            factor,
            rounded[g],
        )
        h += damping * np.eye(len(h))
        better = _cost(rounded[g] - rows[g], h) < _cost(nearest[g] - rows[g], h)
        rounded[g] = np.where(better[:, None], rounded[g], nearest[g])
        kept += int(better.sum())
    if biased:
        correct_bias(layer, rounded, statistics.mean)
    layer.set_weight(weight_of(layer, rounded).astype(np.float32))
    return kept > 0


def _per_row(encoding: Encoding, rows: int) -> tuple[np.ndarray, np.ndarray]:
    scale = np.broadcast_to(encoding.scale, rows) if encoding.axis is None else encoding.scale
    zero = np.broadcast_to(encoding.zero_point, rows)
    return np.ascontiguousarray(scale, np.float32), np.ascontiguousarray(zero, np.int32)


def _input_noise(layer: Layer) -> float:
    """Variance of the rounding noise of the layer's integer input."""
    encoding = layer.model.encodings.get(layer.x.name)
    return 0.0 if encoding is None else float(encoding.scale) ** 2 / 12


def _cost(error: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Expected squared output error per row."""
    wide = error.astype(np.float64)
    cost: np.ndarray = np.einsum("ok,ok->o", wide @ gram, wide)
    return cost
