"""Dynamic sizes of a model made fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxq.analysis import cost
from onnxq.errors import ModelError
from onnxq.model import Model

__all__ = ["fix_shapes"]


def fix_shapes(model: Model, given: Mapping[str, Sequence[int]]) -> None:
    """Give inputs fixed sizes, and everything that shares a symbol with them; in place.

    Args:
        model: The model.
        given: Input name -> all of its sizes.

    Raises:
        ModelError: No such input, sizes that do not fit it, or two sizes for one symbol.
    """
    if not given:
        return
    sizes = cost.input_shapes(model, given)
    symbols: dict[str, int] = {}
    for tensor in model.graph.inputs:
        if tensor.name not in given:
            continue
        for symbol, size in zip(tensor.shape or (), sizes[tensor.name], strict=False):
            if isinstance(symbol, str) and symbols.setdefault(symbol, size) != size:
                raise ModelError(
                    f"{symbol!r} would be {symbols[symbol]} and {size}",
                    where=f"input {tensor.name}",
                    fix="give both the same size",
                )
        tensor.shape = list(sizes[tensor.name])
    for tensor in (*model.tensors().values(), *model.graph.outputs):
        if isinstance(tensor.shape, (list, tuple)) and any(d in symbols for d in tensor.shape):
            tensor.shape = [symbols.get(d, d) for d in tensor.shape]
    model.infer()
