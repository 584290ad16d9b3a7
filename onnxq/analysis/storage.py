"""How the weights of a Q/DQ model lie in its file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.cost import element_type, mac_nodes
from onnxq.model import Model, producer

__all__ = ["Storage", "storage"]


@dataclass(frozen=True)
class Storage:
    """Weights that are stored in the same way.

    Args:
        stored: Their element type in the file.
        unpacked: What a Cast makes of them when the model is loaded; empty where there is none.
        block: How many share a scale; 0: all of a channel, or of the tensor.
        bits: Bits that their values take, of whatever type they are.
        weights: How many there are.
        values: How many values they hold.
    """

    stored: str
    unpacked: str
    block: int
    bits: int
    weights: int
    values: int

    def __str__(self) -> str:
        what = f"{self.weights} of {self.values:,} values, {self.bits}-bit"
        if self.block:
            what += f" in blocks of {self.block}"
        packed = self.stored in ("int4", "uint4")
        what += ", packed in the file" if packed else f", {self.stored} in the file"
        if self.unpacked:
            what += f", unpacked to {self.unpacked} when the model is loaded"
        return what

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, and the same in words."""
        return {**dataclasses.asdict(self), "text": str(self)}


def storage(model: Model) -> list[Storage]:
    """How the integer weights of a model lie in its file, each counted once.

    Args:
        model: A Q/DQ model, as any tool writes it.
    """
    found: dict[tuple[str, str, int], dict[str, gs.Constant]] = {}
    for node in mac_nodes(model):
        for tensor in node.inputs[:2]:
            dequantize = producer(tensor)
            if dequantize is None or dequantize.op != "DequantizeLinear":
                continue
            source, unpacked = dequantize.inputs[0], ""
            cast = producer(source)
            if cast is not None and cast.op == "Cast":
                unpacked, source = element_type(cast.attrs["to"]), cast.inputs[0]
            if isinstance(source, gs.Constant):
                block = int(dequantize.attrs.get("block_size", 0))
                key = element_type(source.dtype), unpacked, block
                found.setdefault(key, {})[source.name] = source
    return [
        Storage(
            *key,
            bits=max(_bits(model.array(t)) for t in constants.values()),
            weights=len(constants),
            values=sum(int(np.prod(t.shape)) for t in constants.values()),
        )
        for key, constants in found.items()
    ]


def _bits(values: np.ndarray) -> int:
    """Bits of the narrowest integers that hold the values."""
    if not values.size:
        return 0
    low, high = int(values.min()), int(values.max())
    if low >= 0 and element_type(values.dtype).startswith("u"):
        return high.bit_length()
    return max((-1 - min(low, -1)).bit_length(), max(high, 0).bit_length()) + 1
