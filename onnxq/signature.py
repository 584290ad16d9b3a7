"""What a model takes and gives: name, element type and shape of each input and output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Args:
        name: Tensor name.
        dtype: Element type; None where numpy has none (strings, sequences, maps).
        shape: One entry per axis: a size, a symbolic name, or None (unknown); None if the rank is
            unknown.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        kind = "?" if self.dtype is None else self.dtype.name
        if self.shape is None:
            return f"{self.name}: {kind}, any shape"
        dims = " x ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {kind} [{dims}]"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits, symbolic and unknown axes taking any size."""
        if self.shape is None:
            return True
        if len(shape) != len(self.shape):
            return False
        return all(not isinstance(w, int) or w == g for w, g in zip(self.shape, shape, strict=True))
