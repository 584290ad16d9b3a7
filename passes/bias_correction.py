"""Take back the shift of a layer's mean output that rounding its weight causes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from onnxq.kernels.patches import add_patch_sums
from onnxq.model import Layer, Model
from onnxq.ops import conv_window
from onnxq.pass_manager import Changes, Context
from onnxq.runtime import Session

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
    biases that are computed.

    Args:
        limit: Use at most so many calibration samples, spread evenly; 0 uses all.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, the empirical form.
    """

    name: ClassVar[str] = "bias-correction"

    limit: int = 32

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Rewrite biases."""
        changes = Changes()
        means = [m for layer in model.layers() if (m := self._mean(layer, changes)) is not None]
        if not means:
            return changes
        _observe(means, model, ctx, self.limit)
        for mean in means:
            shift = mean.output_shift()
            mean.layer.set_bias((mean.bias() + shift).astype(np.float32))
        changes.add(f"{len(means)} biases corrected")
        return changes

    def _mean(self, layer: Layer, changes: Changes) -> _MeanPatch | None:
        if layer.name in layer.model.encodings.float_nodes:
            return None
        if layer.weight_tensor.name not in layer.model.encodings:
            return None
        if layer.op not in ("Conv", "Gemm") or layer.node.attrs.get("transA", 0):
            changes.skip(layer.name, f"{layer.op} takes no bias")
            return None
        if layer.bias_tensor is not None and layer.bias is None:
            changes.skip(layer.name, "its bias is computed, not constant")
            return None
        return _MeanPatch(layer)


@dataclass
class _MeanPatch:
    """The mean of everything that one layer multiplies its weight by."""

    layer: Layer
    total: np.ndarray | None = None
    count: int = field(default=0)

    def add(self, x: np.ndarray) -> None:
        if self.layer.op == "Gemm":
            part = x.reshape(-1, x.shape[-1]).sum(axis=0, dtype=np.float64)
            self.count += x.size // x.shape[-1]
            self.total = part if self.total is None else self.total + part
            return
        window = conv_window(self.layer.node.attrs, x.shape[2:], self.layer.weight.shape[2:])
        if self.total is None:
            self.total = np.zeros((x.shape[1], *_three(window.size, 1)))
        add_patch_sums(
            np.ascontiguousarray(x.reshape(*x.shape[:2], *_three(x.shape[2:], 1))),
            _three(window.size, 1),
            _three(window.strides, 1),
            _three(window.begin, 0),
            _three(window.dilations, 1),
            _three(window.positions, 1),
            self.total,
        )
        self.count += x.shape[0] * int(np.prod(window.positions))

    def output_shift(self) -> np.ndarray:
        """(W - Q(W)) m, one value per output channel."""
        weight = self.layer.weight
        encoding = self.layer.model.encodings[self.layer.weight_tensor.name]
        error = weight.astype(np.float64) - encoding.fake_quantize(weight)
        assert self.total is not None
        mean = self.total / max(self.count, 1)
        if self.layer.op == "Gemm":
            rows = error if self.layer.node.attrs.get("transB", 0) else error.T
            return np.asarray(rows @ mean) * float(self.layer.node.attrs.get("alpha", 1.0))
        groups = self.layer.group
        rows = error.reshape(groups, weight.shape[0] // groups, -1)
        patches = mean.reshape(groups, -1)
        return np.asarray(np.einsum("gok,gk->go", rows, patches)).reshape(-1)

    def bias(self) -> np.ndarray:
        if self.layer.bias is not None:
            return np.asarray(self.layer.bias, np.float64)
        return np.zeros(self.output_shift().shape)


def _observe(means: list[_MeanPatch], model: Model, ctx: Context, limit: int) -> None:
    names = list(dict.fromkeys(m.layer.x.name for m in means))
    inner = [n for n in names if n not in model.inputs]
    session = Session(model.to_proto(inner), outputs=inner, threads=ctx.threads)
    samples = ctx.spread(session, limit)
    with ctx.progress.task("correct biases", samples.length) as advance:
        for feed in samples:
            values = {**feed, **session.run_shared(feed)}
            for mean in means:
                mean.add(np.asarray(values[mean.layer.x.name], np.float32))
            advance(1)


def _three(sizes: tuple[int, ...], fill: int) -> tuple[int, int, int]:
    """Sizes of up to three spatial axes, leading axes filled."""
    padded = (*[fill] * (3 - len(sizes)), *sizes)
    return padded[0], padded[1], padded[2]
