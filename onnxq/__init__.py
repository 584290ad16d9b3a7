"""onnxq: model compression as passes over ONNX graphs.

>>> import onnxq
>>> onnxq.quantize("in.onnx", "out.onnx", "data/")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onnxq.version import __version__

if TYPE_CHECKING:
    from onnxq import zoo
    from onnxq.analysis.findings import Analysis
    from onnxq.analyzing import analyze
    from onnxq.api import equalize_model, quantize, run
    from onnxq.calibration import Calibration
    from onnxq.comparison import compare
    from onnxq.compression import compress
    from onnxq.deployment import deploy
    from onnxq.encoding import Encoding, Encodings, Format
    from onnxq.errors import OnnxqError
    from onnxq.examination import doctor
    from onnxq.inspection import inspect
    from onnxq.model import Model, load
    from onnxq.pass_manager import Changes, Context, Pass, PassManager
    from onnxq.pictures import Preprocess
    from onnxq.quantsim import QuantizationSimModel
    from onnxq.recipe import Recipe
    from onnxq.report import Report
    from onnxq.statistics import Statistics

__all__ = [
    "Analysis",
    "Calibration",
    "Changes",
    "Context",
    "Encoding",
    "Encodings",
    "Format",
    "Model",
    "OnnxqError",
    "Pass",
    "PassManager",
    "Preprocess",
    "QuantizationSimModel",
    "Recipe",
    "Report",
    "Statistics",
    "__version__",
    "analyze",
    "compare",
    "compress",
    "deploy",
    "doctor",
    "equalize_model",
    "inspect",
    "load",
    "quantize",
    "run",
    "zoo",
]

# Loaded at first use: `onnxq --help` must not wait for onnxruntime and numba.
_HOMES = {
    "Analysis": "onnxq.analysis.findings",
    "Calibration": "onnxq.calibration",
    "Changes": "onnxq.pass_manager",
    "Context": "onnxq.pass_manager",
    "Encoding": "onnxq.encoding",
    "Encodings": "onnxq.encoding",
    "Format": "onnxq.encoding",
    "Model": "onnxq.model",
    "OnnxqError": "onnxq.errors",
    "Pass": "onnxq.pass_manager",
    "PassManager": "onnxq.pass_manager",
    "Preprocess": "onnxq.pictures",
    "QuantizationSimModel": "onnxq.quantsim",
    "Recipe": "onnxq.recipe",
    "Report": "onnxq.report",
    "Statistics": "onnxq.statistics",
    "analyze": "onnxq.analyzing",
    "compare": "onnxq.comparison",
    "deploy": "onnxq.deployment",
    "doctor": "onnxq.examination",
    "compress": "onnxq.compression",
    "equalize_model": "onnxq.api",
    "inspect": "onnxq.inspection",
    "load": "onnxq.model",
    "quantize": "onnxq.api",
    "run": "onnxq.api",
}


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return importlib.import_module("onnxq.zoo")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'onnxq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
