"""Sessions of a Q/DQ model that compute in integers, or in floats between Q and DQ."""

from __future__ import annotations

from typing import Literal, get_args

from onnxq.errors import RecipeError, did_you_mean
from onnxq.model import Model
from onnxq.runtime import Level, Session
from onnxq.simulation import fold_dequantized

__all__ = ["Arithmetic", "level_of", "session"]

Arithmetic = Literal["integer", "float"]

# Floats between Q and DQ, not integer kernels.
_FLOATS = {"session.disable_quant_qdq": "1"}
# Sums in the order in which floats behind a DequantizeLinear are added, as constants need not be.
_EXACT = {"session.disable_prepacking": "1"}
# Levels at which onnxruntime makes integer kernels of Q/DQ.
_FUSING: tuple[Level, ...] = ("extended", "all")


def level_of(arithmetic: Arithmetic, level: Level | None) -> Level:
    """How far onnxruntime is to optimize.

    Raises:
        RecipeError: No such arithmetic, or one that this level does not compute in.
    """
    known = get_args(Arithmetic)
    if arithmetic not in known:
        hint = did_you_mean(arithmetic, known, f"take {' or '.join(known)}")
        raise RecipeError(f"no arithmetic {arithmetic!r}", fix=hint)
    if arithmetic == "float":
        return level or "disabled"
    if level not in (None, *_FUSING):
        raise RecipeError(
            f"at level {level!r} onnxruntime runs no integer kernels",
            fix=f"take {' or '.join(_FUSING)}, or arithmetic='float'",
        )
    return level or "all"


def session(model: Model, arithmetic: Arithmetic, level: Level, threads: int) -> Session:
    """A session of a Q/DQ model.

    Args:
        model: The Q/DQ model; for floats edited in place, weights a byte or two each.
        arithmetic: What it computes in.
        level: How far onnxruntime optimizes.
        threads: Threads for onnxruntime; 0 for all cores.
    """
    if arithmetic == "integer":
        return Session(model.to_proto(), threads=threads, level=level)
    fold_dequantized(model)
    config = _FLOATS | (_EXACT if level == "disabled" else {})
    return Session(model.to_proto(), threads=threads, level=level, config=config)
