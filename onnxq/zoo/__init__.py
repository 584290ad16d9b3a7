"""Real models with data, recipes and scores: `onnxq zoo` as functions."""

from __future__ import annotations

from onnxq.zoo.building import Built, build
from onnxq.zoo.catalog import LIMITS, Entry, Format, entries, entry
from onnxq.zoo.measuring import Result, Row, results
from onnxq.zoo.page import results_page
from onnxq.zoo.scripts import calibration_samples, score

__all__ = [
    "LIMITS",
    "Built",
    "Entry",
    "Format",
    "Result",
    "Row",
    "build",
    "calibration_samples",
    "entries",
    "entry",
    "results",
    "results_page",
    "score",
]
