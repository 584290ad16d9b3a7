"""What a number format does to one layer, all others left in float."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from onnxq.analysis.error import LARGEST_SQNR_DB

__all__ = ["Part", "Sensitivity", "decibel"]

Part = Literal["weights", "activations"]


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
        note: Why a number is missing; empty where none is.
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
    """An effect as SQNR in dB, held within +-`LARGEST_SQNR_DB`."""
    if effect is None:
        return None
    if effect <= 0:
        return LARGEST_SQNR_DB
    return min(max(-10 * math.log10(effect), -LARGEST_SQNR_DB), LARGEST_SQNR_DB)
