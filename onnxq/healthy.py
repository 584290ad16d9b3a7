"""Constants that no model should hold: NaN, and infinities in what is to be integers."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import ModelError
from onnxq.model import Model

__all__ = ["check_constants", "finite"]

_FLOATS = (np.float16, np.float32, np.float64)


def check_constants(model: Model, nodes: Container[str]) -> None:
    """Name a constant that is NaN before it shows in every activation.

    Args:
        model: The model.
        nodes: Names of nodes whose constants may not be infinite either; elsewhere, a mask of -inf
            means something.

    Raises:
        ModelError: A constant is not healthy.
    """
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.dtype in _FLOATS:
                if node.name in nodes:
                    finite(model, tensor)
                elif bad := int(np.isnan(values := model.array(tensor)).sum()):
                    raise _unhealthy(f"{bad} of {values.size} values are NaN", tensor)


def finite(model: Model, tensor: gs.Tensor) -> np.ndarray:
    """The values of a constant.

    Raises:
        ModelError: A value is NaN or infinite.
    """
    values = model.array(tensor)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise _unhealthy(f"{bad} of {values.size} values are NaN or infinite", tensor)
    return values


def _unhealthy(what: str, tensor: gs.Tensor) -> ModelError:
    return ModelError(
        what,
        where=f"weight {tensor.name}",
        fix="export the model again from a healthy checkpoint",
    )
