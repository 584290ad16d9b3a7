"""Weights of 7 bits where 8-bit products overflow on processors without VNNI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from onnxq.analysis.saturation import Saturation, saturation
from onnxq.encoding import Encoding
from onnxq.errors import RecipeError
from onnxq.model import Model
from onnxq.pass_manager import Changes, Context
from onnxq.runtime import Session
from onnxq.simulation import simulated

__all__ = ["ReduceRange"]

# By how many steps rounding may still move a weight.
SLACK = 1
# What rounding by output error leaves of the error of rounding to nearest: a quarter to a half.
LEAST = 0.25


@dataclass(frozen=True, kw_only=True)
class ReduceRange:
    """Take 7 bits for the weights of the layers whose sums of products overflow.

    x86-64 without VNNI adds two neighbouring products of uint8 and int8 in 16 bits, saturating::

        x[k] w[k] + x[k+1] w[k+1]        up to 255 * 127 * 2 = 64,770, where 32,767 is the end

    With weights in [-63, 63] nothing can overflow.  That is a bit of precision, so it is taken from
    no layer that does not need it: which sums a layer reaches is known from its weights and from
    the integers that the samples bring to it.  The model that is looked at has its activations
    rounded, and its weights rounded to nearest; as rounding by output error may move a weight by a
    step, sums are taken with each weight a step larger.

    Before and after::

        W: int8/channel in [-127, 127]      W: int7/channel in [-63, 63], stored as int8

    Nothing is done for targets whose sums do not saturate.  Refused, with the reason: layers whose
    sums stay within 16 bits or leave it too seldom to matter, depthwise convolutions and weights of
    type uint8, which onnxruntime multiplies exactly.

    Args:
        where: "error": layers where what the samples overflow by is a greater error than that of
            a bit less; "samples": where any sum overflows on the samples; "ranges": where one does
            for some inputs that are each within what the samples showed for it; "all": all that
            may.
        samples: Look at so many samples, spread evenly; 0 looks at all.
        patches: Look at most at so many positions of a layer and sample.

    Source: `reduce_range` of onnxruntime.quantization, which does it to every layer; Intel SDM,
    VPMADDUBSW.
    """

    name: ClassVar[str] = "reduce-range"

    where: Literal["error", "samples", "ranges", "all"] = "error"
    samples: int = 32
    patches: int = 4096

    def __post_init__(self) -> None:
        if self.samples < 0 or self.patches < 1:
            raise RecipeError(
                f"samples {self.samples}, patches {self.patches}: wanted at least 0 and 1"
            )

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Change the encodings of weights."""
        changes = Changes()
        if not ctx.target.saturates or not model.encodings:
            return changes
        ready = simulated(model, ctx.target)

        def feeds(session: Session) -> Iterator[Mapping[str, np.ndarray]]:
            return iter(ctx.spread(session, self.samples)) if ctx.data is not None else iter(())

        found = saturation(
            ready,
            feeds,
            rng=ctx.rng(self),
            patches=self.patches,
            slack=SLACK,
            threads=ctx.threads,
        )
        layers, done = {layer.name: layer for layer in model.layers()}, set()
        for layer in found:
            weight = layers[layer.name].weight_tensor.name
            encoding = model.encodings[weight]
            if encoding.dtype == "int8" and self._overflows(layer):
                model.encodings[weight] = _reduced(encoding)
                changes.add(f"{layer.name}: 7 bits, {layer}")
            elif encoding.dtype != "int7" or weight not in done:  # shared with a layer before
                changes.skip(layer.name, str(layer))
            done.add(weight)
        return changes

    def _overflows(self, layer: Saturation) -> bool:
        if layer.exact or self.where == "all":
            return not layer.exact
        if self.where == "error":
            return layer.noise > LEAST
        return bool(layer.possible if self.where == "ranges" else layer.overflows)


def _reduced(encoding: Encoding) -> Encoding:
    """The same range in [-63, 63]."""
    scale = encoding.scale.astype(np.float64) * (127 / 63)
    return replace(encoding, dtype="int7", scale=scale.astype(np.float32))
