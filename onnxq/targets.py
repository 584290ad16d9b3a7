"""What each runtime executes in integers: operators, number formats, rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from onnxq.encoding import DTYPES, Format, in_bytes
from onnxq.errors import TargetError, did_you_mean

__all__ = ["TARGETS", "Kernel", "Storage", "Target"]

Storage = Literal["packed", "int8"]


@dataclass(frozen=True)
class Kernel:
    """How a target runs one operator in integers.

    Args:
        role: ``layer`` multiplies by weights and carries the MACs; ``elementwise`` computes;
            ``join`` puts tensors side by side; ``move`` only moves values, and needs the same scale
            and zero point on both sides.
        float_output: Whether the operator may leave integers at its output, at no cost.
    """

    role: Literal["layer", "elementwise", "join", "move"]
    float_output: bool = False


@dataclass(frozen=True)
class Target:
    """A contract: what may be written so that the runtime really executes it in integers.

    Args:
        name: Its name on the command line.
        summary: One sentence.
        kernels: Operator type -> how it runs in integers.
        activations: Element types of activations.
        pairs: (activation, weight) element types that have kernels.
        source: Where these facts come from.
        stored: How weights of 4 bits and fewer lie in the file: ``packed``, half a byte each, where
            the runtime unpacks them as it loads the model; ``int8``, a byte each.
        weight_only: Operators that multiply float activations by integer matrices.
        least_block: Fewest weights that share a scale there; more are powers of two.
    """

    name: str
    summary: str
    kernels: Mapping[str, Kernel]
    activations: tuple[str, ...]
    pairs: frozenset[tuple[str, str]]
    source: str
    stored: Storage = "int8"
    weight_only: frozenset[str] = frozenset()
    least_block: int = 16

    @classmethod
    def named(cls, name: str | Target) -> Target:
        """The target of a name.

        Raises:
            TargetError: No target has that name.
        """
        if isinstance(name, Target):
            return name
        if name in TARGETS:
            return TARGETS[name]
        hint = did_you_mean(name, TARGETS, f"targets are {', '.join(TARGETS)}")
        raise TargetError(f"no target {name!r}", fix=hint)

    @property
    def any_width(self) -> Target:
        """The same operators with integers of every width, to simulate what has no kernels."""
        types = tuple(t for t in DTYPES if t != "int32")
        return replace(
            self, activations=types, pairs=frozenset(product(types, map(in_bytes, types)))
        )

    def check(self, weights: Format, activations: Format, option: str = "--weights ") -> None:
        """Refuse formats for which the target has no integer kernels.

        Args:
            weights: Format of weights.
            activations: Format of activations.
            option: How the weights' format is given, up to the format, for the advice.

        Raises:
            TargetError: Names the rule and the nearest legal choice.
        """
        if activations.dtype == "float":
            self._check_weight_only(weights, option)
            return
        if activations.granularity != "tensor":
            raise TargetError(
                f"{self.name} has one scale per activation tensor, not {activations}",
                fix=f"use --activations {activations.dtype}",
            )
        if activations.dtype not in self.activations:
            raise TargetError(
                f"{self.name} computes in {' or '.join(self.activations)}, not {activations}",
                fix=f"use --activations {self.activations[0]}",
            )
        if weights.dtype not in self.weights(activations.dtype):
            bits = min(weights.bits, 8)
            legal = [w for w in self.weights(activations.dtype) if DTYPES[w][0] == bits]
            raise TargetError(
                f"{self.name} has no integer kernels for {weights} weights"
                f" with {activations} activations",
                fix=f"use {option}{' or '.join(legal)}",
            )
        if weights.granularity == "block":
            fix = f"use {option}{weights.dtype}/channel"
            if self.weight_only:
                fix += ", or --activations float"
            raise TargetError(f"{self.name} has no integer kernels for blocks of weights", fix=fix)

    def weights(self, activation: str) -> list[str]:
        """Element types of weights that meet an activation type in integers.

        Fewer than 8 bits are computed in 8: what they save is bytes.
        """
        if activation == "float":
            return [w for w, (bits, _) in DTYPES.items() if self.weight_only and bits <= 8]
        return [w for w in DTYPES if (activation, in_bytes(w)) in self.pairs]

    def _check_weight_only(self, weights: Format, option: str) -> None:
        """Refuse weights that the target does not multiply by float activations."""
        if not self.weight_only:
            raise TargetError(
                f"{self.name} has no kernels for integer weights with float activations",
                fix=f"use --activations {self.activations[0]}",
            )
        if weights.dtype == "float":
            raise TargetError(
                "float weights and float activations leave nothing to quantize",
                fix=f"use {option}int4/block=32, or --activations {self.activations[0]}",
            )
        if weights.dtype not in self.weights("float"):
            raise TargetError(
                f"{self.name} has no kernels for {weights} weights with float activations",
                fix=f"use {option}int8/channel or int4/block=32",
            )
        if weights.block and (weights.block < self.least_block or weights.block.bit_count() > 1):
            near = max(self.least_block, 1 << round(math.log2(weights.block)))
            raise TargetError(
                f"{self.name} has kernels for blocks of {self.least_block} and more, powers of two,"
                f" not of {weights.block}",
                fix=f"use {option}{weights.dtype}/block={near}",
            )


_LAYER = Kernel("layer")
_ELEMENTWISE = Kernel("elementwise")
_MOVE = Kernel("move")

# onnxruntime's CPU provider: probed on 1.32 at level EXTENDED, see docs/architecture.md.
_ORT_KERNELS = {
    "Conv": _LAYER,
    "Gemm": Kernel("layer", float_output=True),
    "MatMul": Kernel("layer", float_output=True),
    "Add": _ELEMENTWISE,
    "Mul": _ELEMENTWISE,
    "AveragePool": _ELEMENTWISE,
    "GlobalAveragePool": _ELEMENTWISE,
    "LeakyRelu": _ELEMENTWISE,
    "Sigmoid": _ELEMENTWISE,
    "Softmax": _ELEMENTWISE,
    "Concat": Kernel("join"),
    "DepthToSpace": _MOVE,
    "Expand": _MOVE,
    "Flatten": _MOVE,
    "Gather": _MOVE,
    "MaxPool": _MOVE,
    "Pad": _MOVE,
    "Reshape": _MOVE,
    "Resize": _MOVE,
    "Slice": _MOVE,
    "Split": _MOVE,
    "Squeeze": _MOVE,
    "Tile": _MOVE,
    "Transpose": _MOVE,
    "Unsqueeze": _MOVE,
}

TARGETS = {
    "ort-cpu": Target(
        name="ort-cpu",
        summary="ONNX Runtime's CPU execution provider, desktop, server and mobile",
        kernels=_ORT_KERNELS,
        activations=("uint8", "int8"),
        pairs=frozenset(
            {("uint8", "int4"), ("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")}
        ),
        source="onnxruntime 1.32, qdq_selectors.cc and probes of its optimized graphs",
        stored="packed",
        weight_only=frozenset({"MatMul", "Gemm"}),
    ),
}
