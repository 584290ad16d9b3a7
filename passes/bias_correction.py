"""Take back the shift of a layer's mean output that rounding its weight causes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxq.analysis.distribution import patch_mean, propagate, shapes_of
from onnxq.errors import RecipeError
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context
from onnxq.second_order import collect_means, correct_bias, input_session, rows_of, supports

__all__ = ["BiasCorrection"]


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Correct biases for the mean error of rounded weights.

    Rounding W to Q(W) moves the mean of the output by (Q(W) - W) E[x], which a bias can undo::

        b' = b + (W - Q(W)) m

        empirical   m = mean patch of the layer's input over the samples
        analytic    m from batch normalization: behind BatchNorm and Relu, say, a clipped normal,
                    E[x] = gamma N(-beta / gamma) + beta (1 - P(-beta / gamma))

    N and P are density and distribution of the standard normal; `onnxq.analysis.distribution` has
    the rest.  Both take the border under zero padding for what it is: the empirical mean exactly,
    the analytic one as if the input were alike everywhere.

    Before and after::

        Conv(x, W, b)          Conv(x, W, b')      once W is written in integers, means agree

    Refused: layers without a bias input (MatMul), weights without an encoding (they stay float),
    biases that are computed, ConvTranspose, Gemm that transposes its input or has its weight on
    the left; by the analytic method layers of whose input nothing is known.

    Args:
        method: "empirical", "analytic", or "auto": empirical where there are samples; where those
            are made up, analytic as far as batch normalization tells the mean.
        limit: Use at most so many calibration samples, spread evenly; 0 uses all.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2.
    """

    name: ClassVar[str] = "bias-correction"

    method: Literal["auto", "empirical", "analytic"] = "auto"
    limit: int = 32

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise RecipeError(f"limit: wanted 0 or more samples, got {self.limit}")

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Rewrite biases."""
        changes = Changes()
        layers = [layer for layer in model.layers() if self._wanted(layer, changes)]
        if not layers:
            return changes
        means: dict[str, np.ndarray] = {}
        estimates = 0
        samples = self.method != "analytic" and ctx.data is not None
        if self.method == "analytic" or (self.method == "auto" and not samples):
            means, estimates = self._expected(model, layers, changes)
        elif self.method == "auto" and ctx.is_synthetic:
            means, _ = self._expected(model, layers, Changes(), estimates=False)
        if samples or self.method == "empirical":
            open_ = [layer for layer in layers if layer.name not in means]
            means |= self._observed(model, open_, ctx, changes)
        for layer in layers:
            if layer.name in means:
                encoding = model.encodings[layer.weight_tensor.name]
                rounded = rows_of(layer, encoding.fake_quantize(layer.weight))
                correct_bias(layer, rounded, means[layer.name])
        if means:
            how = f", {estimates} of them by estimated means" if estimates else ""
            changes.add(f"{len(means)} biases corrected{how}")
        return changes

    def _observed(
        self, model: Model, layers: Sequence[Layer], ctx: Context, changes: Changes
    ) -> dict[str, np.ndarray]:
        """The mean patch of each layer over the samples."""
        if not layers:
            return {}
        session = input_session(model, layers, ctx.threads)
        samples = ctx.spread(session, self.limit)
        with ctx.progress.task("correct biases", samples.length) as advance:
            means = collect_means(layers, session, samples, progress=advance)
        for layer in layers:
            if layer.name not in means:
                changes.skip(layer.name, "no sample reached it")
        return means

    def _expected(
        self, model: Model, layers: Sequence[Layer], changes: Changes, *, estimates: bool = True
    ) -> tuple[dict[str, np.ndarray], int]:
        """The mean patch of each layer from batch normalization; how many are estimates."""
        known, unknown = propagate(model)
        shapes = shapes_of(model)
        means: dict[str, np.ndarray] = {}
        count = 0
        for layer in layers:
            x = known.get(layer.x.name)
            if x is not None and x.estimated and not estimates:
                continue
            if x is None:
                changes.skip(layer.name, f"its input is not known: {unknown[layer.x.name]}")
                continue
            mean = patch_mean(layer, x, shapes)
            if isinstance(mean, str):
                changes.skip(layer.name, mean)
                continue
            means[layer.name] = mean
            count += x.estimated
        return means, count

    def _wanted(self, layer: Layer, changes: Changes) -> bool:
        if layer.weight_encoding is None:
            return False
        if layer.op == "MatMul":
            changes.skip(layer.name, "MatMul takes no bias")
            return False
        if layer.op == "ConvTranspose" or not supports(layer):
            changes.skip(layer.name, f"{layer.op} of this kind is not corrected")
            return False
        if layer.bias_tensor is not None and layer.bias is None:
            changes.skip(layer.name, "its bias is computed, not constant")
            return False
        return True
