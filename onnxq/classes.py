"""Channels that hang together, in classes: what is true of one is true of all of its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.channels import ChannelWalk
from onnxq.model import Layer, Model

__all__ = ["ClassWalk", "Side"]


@dataclass(frozen=True, eq=False)
class Side:
    """The output or input channels of one layer.

    Args:
        layer: The layer.
        classes: Class of each of its channels, int64 [channels].
    """

    layer: Layer
    classes: np.ndarray


class ClassWalk(ChannelWalk):
    """A walk that finds classes of channels: what is joined anywhere is of one class.

    Attributes:
        parent: Of each channel, in the forest of classes.
        why: Channel -> why something else makes of it what is not known.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.parent: list[int] = []
        self.why: dict[int, str] = {}

    def numbered(self) -> tuple[np.ndarray, int, dict[int, str]]:
        """The class of each channel, how many there are, and why some are fixed."""
        roots = np.array([self._root(i) for i in range(len(self.parent))], np.int64)
        kept, number = np.unique(roots, return_inverse=True)
        fixed: dict[int, str] = {}
        for i, why in sorted(self.why.items()):
            fixed.setdefault(int(number[i]), why)
        return number, kept.size, fixed

    def new(self, count: int) -> np.ndarray:
        """So many channels, each a class of its own."""
        first = len(self.parent)
        self.parent += range(first, first + count)
        return np.arange(first, first + count)

    def zeros(self, count: int) -> np.ndarray:
        """Zeros are channels like others."""
        return self.new(count)

    def foreign(self, count: int, why: str) -> np.ndarray:
        """So many channels that are fixed."""
        ids = self.new(count)
        self.why.update(dict.fromkeys(ids.tolist(), why))
        return ids

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Make one class of the channels at each place."""
        for part in parts[1:]:
            for i, j in zip(part.tolist(), parts[0].tolist(), strict=True):
                first, second = sorted((self._root(i), self._root(j)))
                self.parent[second] = first
        return parts[0]

    def end(self, tensor: gs.Tensor, why: str) -> None:
        """Fix the channels of a tensor."""
        flow = self.flows.get(id(tensor))
        if flow is not None:
            for i in flow.ids.tolist():
                self.why.setdefault(i, why)

    def _root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i
