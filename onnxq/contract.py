"""What a runtime's contract consists of, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from onnxq.encoding import DTYPES, Format, in_bytes
from onnxq.errors import TargetError

__all__ = ["Kernel", "Storage", "Target"]

Storage = Literal["packed", "int8"]


@dataclass(frozen=True)
class Kernel:
    """How a target runs one operator in integers.

    Args:
        role: ``layer`` multiplies by weights and carries the MACs; ``elementwise`` computes;
            ``join`` puts tensors side by side; ``move`` only moves values, and needs the same scale
            and zero point on both sides.
        float_output: Whether the operator may leave integers at its output, at no cost.
        per_channel: Whether its weight may have a scale per output channel.
        bare: Whether it is given the integers themselves, since no pattern with Q and DQ is found.
        results: (element type, scale, zero point) that its result must have, type by type.
        elsewhere: Whether the target hands the operator to ONNX Runtime's CPU provider.
    """

    role: Literal["layer", "elementwise", "join", "move"]
    float_output: bool = False
    per_channel: bool = True
    bare: bool = False
    results: tuple[tuple[str, float, int], ...] = ()
    elsewhere: bool = False


@dataclass(frozen=True)
class Target:
    """A contract: what may be written so that the runtime really executes it in integers.

    Args:
        name: Its name on the command line.
        summary: One sentence.
        kernels: Operator type -> how it runs in integers.
        activations: Element types of activations; the first is the default.
        pairs: (activation, weight) element types that have kernels.
        source: Where these facts come from.
        weights: The default format of weights, with the first type of activations.
        per_channel: Element types of weights that may have a scale per output channel.
        symmetric: Whether zero points are 0, those of activations, too.
        bias: How biases are written: ``int32`` with scale s_x * s_w, or ``float``.
        opset: The greatest operator set that it takes; None: no limit is known.
        cpu: Whether this is ONNX Runtime's CPU provider, whose graph may mix integers and floats
            at little cost, and whose Q and DQ of activations may have a scale per channel.
        whole: Whether nodes in float leave the processor, so that everything is put into integers.
        keeps_activation: Whether a Relu or Clip that quantizing takes over may stand before Q.
        fixed_sizes: Whether the sizes of inputs have to be fixed.
        arm: Whether its processor is ARM, where ONNX Runtime leaves int8 activations as they are.
        saturates: Whether pairs of uint8 * int8 are added in 16 bits, which may overflow.
        stored: How weights of 4 bits and fewer lie in the file: ``packed``, half a byte each, where
            the runtime unpacks them as it loads the model; ``int8``, a byte each.
        weight_only: Operators that multiply float activations by integer matrices.
        least_block: Fewest weights that share a scale there; more are powers of two.
        remarks: What else there is to know.
    """

    name: str
    summary: str
    kernels: Mapping[str, Kernel]
    activations: tuple[str, ...]
    pairs: frozenset[tuple[str, str]]
    source: tuple[str, ...]
    weights: str = "int8/channel"
    per_channel: frozenset[str] = frozenset({"int8"})
    symmetric: bool = False
    bias: Literal["int32", "float"] = "int32"
    opset: int | None = None
    cpu: bool = False
    whole: bool = False
    keeps_activation: bool = True
    fixed_sizes: bool = False
    arm: bool = False
    saturates: bool = False
    stored: Storage = "int8"
    weight_only: frozenset[str] = frozenset()
    least_block: int = 16
    remarks: tuple[str, ...] = ()

    @property
    def any_width(self) -> Target:
        """The same operators with integers of every width, to simulate what has no kernels."""
        rest = (t for t in DTYPES if t != "int32")
        types = tuple(dict.fromkeys([*self.activations, *rest]))  # the first is the default
        return replace(
            self,
            activations=types,
            pairs=frozenset(product(types, map(in_bytes, types))),
            per_channel=frozenset(types),
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
                fix=f"use --activations {_nearest(activations.dtype, self.activations)}",
            )
        legal = self.weight_types(activations.dtype)
        if weights.dtype not in legal:
            near = [w for w in legal if DTYPES[w][0] == weights.bits]
            near = near or [w for w in legal if DTYPES[w][0] == 8]
            raise TargetError(
                f"{self.name} has no integer kernels for {weights} weights"
                f" with {activations} activations",
                fix=f"use {option}{' or '.join(near)}",
            )
        if weights.granularity == "block":
            fix = f"use {option}{weights.dtype}/channel"
            if self.weight_only:
                fix += ", or --activations float"
            raise TargetError(f"{self.name} has no integer kernels for blocks of weights", fix=fix)
        if weights.granularity == "channel" and in_bytes(weights.dtype) not in self.per_channel:
            fix = f"use {option}{weights.dtype}/tensor"
            signed = [w for w in legal if w in self.per_channel]
            if signed:
                fix += f" or {option}{signed[0]}/channel"
            raise TargetError(
                f"{self.name} has one scale per tensor of {weights.dtype} weights", fix=fix
            )

    def weights_with(self, activations: Format) -> Format:
        """The default format of weights with a format of activations."""
        default, legal = Format.parse(self.weights), self.weight_types(activations.dtype)
        if default.dtype in legal or not legal:
            return default
        return Format(next(w for w in legal if DTYPES[w][0] == 8))

    def check_opset(self, opset: int) -> None:
        """Refuse an operator set that the target does not know.

        Raises:
            TargetError: Names the greatest that it knows.
        """
        if self.opset is not None and opset > self.opset:
            raise TargetError(
                f"{self.name} takes operator sets up to {self.opset}, not {opset}",
                fix=f"export the model with opset {self.opset} or older",
            )

    def weight_types(self, activation: str) -> list[str]:
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
        if weights.dtype not in self.weight_types("float"):
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


def _nearest(dtype: str, known: tuple[str, ...]) -> str:
    """The element type that is most like another: in sign, then in bits."""
    bits, signed = DTYPES[dtype]
    return min(known, key=lambda k: (abs(DTYPES[k][0] - bits), DTYPES[k][1] != signed))
