"""Take back the shift of a layer's mean output that rounding its weight causes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.errors import RecipeError
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context
from onnxq.second_order import collect_means, correct_bias, input_session, rows_of, supports

__all__ = ["BiasCorrection"]


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Correct biases for the mean error of rounded weights.

    Rounding W to Q(W) moves the mean of the output by (Q(W) - W) E[x], which a bias can undo
    exactly, borders under zero padding included::

        b' = b + (W - Q(W)) m,     m = mean patch of the layer's input over the samples

    Before and after::

        Conv(x, W, b)          Conv(x, W, b')      once W is written in integers, means agree

    Refused: layers without a bias input (MatMul), weights without an encoding (they stay float),
    biases that are computed, ConvTranspose, Gemm that transposes its input or has its weight on
    the left.

    Args:
        limit: Use at most so many calibration samples, spread evenly; 0 uses all.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, the empirical form.
    """

    name: ClassVar[str] = "bias-correction"

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
        session = input_session(model, layers, ctx.threads)
        samples = ctx.spread(session, self.limit)
        with ctx.progress.task("correct biases", samples.length) as advance:
            means = collect_means(layers, session, samples, progress=advance)
        for layer in layers:
            if layer.name not in means:
                changes.skip(layer.name, "no sample reached it")
                continue
            encoding = model.encodings[layer.weight_tensor.name]
            rounded = rows_of(layer, encoding.fake_quantize(layer.weight))
            correct_bias(layer, rounded, means[layer.name])
        if means:
            changes.add(f"{len(means)} biases corrected")
        return changes

    def _wanted(self, layer: Layer, changes: Changes) -> bool:
        if layer.weight_encoding is None:
            return False
        if layer.op == "MatMul":
            changes.skip(layer.name, "MatMul takes no bias")
            return False
        if not supports(layer):
            changes.skip(layer.name, f"{layer.op} of this kind is not corrected")
            return False
        if layer.bias_tensor is not None and layer.bias is None:
            changes.skip(layer.name, "its bias is computed, not constant")
            return False
        return True
