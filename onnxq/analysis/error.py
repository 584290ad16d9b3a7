"""How far the outputs of two models are apart, over samples, in constant memory."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.errors import CalibrationError, ModelError
from onnxq.runtime import Session
from onnxq.signature import TensorSpec

__all__ = ["LARGEST_SQNR_DB", "OutputError", "between", "compare"]

Pair = tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]

# What stands for infinity, so that every result is plain JSON: float64 sums resolve about 160 dB.
LARGEST_SQNR_DB = 200.0
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class OutputError:
    """How far one output of a model is from that of its reference.

    Measures that mean nothing for the output are None: all but `equal` for integers and booleans,
    `equal` for floats, all of them for what is no tensor (sequences, maps).

    Args:
        name: Name of the output.
        samples: Feeds compared.
        sqnr_db: Signal to quantization noise, 10 log10(sum ref^2 / sum (ref - out)^2), in dB, held
            within +-`LARGEST_SQNR_DB`; equal outputs have the largest.
        cosine: Cosine of the angle between all values of the two; 1 if both are zero.
        max_abs_error: The largest difference of one value.
        top1_agreement: Share of positions at which the largest class is the same one.  The classes
            lie along the last axis of [N, C] and [N, T, C], and along axis 1 of [N, C, H, W] and
            beyond; None for fewer axes or a single class.
        equal: Share of equal values.
        left_out: Values that are NaN or infinite in both, and left out of the other measures.
    """

    name: str
    samples: int
    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    top1_agreement: float | None = None
    equal: float | None = None
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def compare(
    reference: Session,
    other: Session,
    samples: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> list[OutputError]:
    """Run two models on the same samples and compare their outputs, matched by name.

    _Sums are float64.  Infinities and NaN that both models give in the same places are left out,
    and counted.

    Args:
        reference: The model that is right.
        other: The model that is judged.
        samples: Feeds, input name -> array.
        progress: Called with 1 after each feed.

    Returns:
        One result per output, in the order of the reference.

    Raises:
        ModelError: The inputs, outputs or shapes of the two differ, or one of them gives NaN or
            infinities where the other gives numbers.
        CalibrationError: There are no samples, or they do not fit the models.
    """
    _match("inputs", reference.inputs, other.inputs)
    _match("outputs", reference.outputs, other.outputs)
    names = [spec.name for spec in reference.outputs]

    def pairs() -> Iterator[Pair]:
        for feed in samples:
            yield reference.run_shared(feed), other.run_shared(feed)
            if progress is not None:
                progress(1)

    found = between(pairs(), names)
    if not found and names:
        raise CalibrationError("there are no samples to compare on", fix="give some (--data PATH)")
    return found


def between(pairs: Iterable[Pair], names: Sequence[str]) -> list[OutputError]:
    """How far arrays are from those that they should be, name by name.

    Args:
        pairs: For each sample the arrays that are right, and those that are judged.
        names: Which of them to compare; those that a pair lacks are passed over.

    Returns:
        One result per name, in their order; none at all where there are no pairs.

    Raises:
        ModelError: Shapes differ, or one side has NaN or infinities where the other has numbers.
    """
    sums = {name: _Sums(name) for name in names}
    count = 0
    for count, (wanted, got) in enumerate(pairs, 1):
        for name in names:
            if name in wanted and name in got:
                sums[name].add(wanted[name], got[name], count)
    return [s.result(count) for s in sums.values()] if count else []


def _match(what: str, wanted: list[TensorSpec], got: list[TensorSpec]) -> None:
    """Refuse other names or element types; sizes are checked when they are known."""
    types = [{spec.name: spec.dtype for spec in specs} for specs in (wanted, got)]
    if types[0] != types[1]:
        says = [", ".join(map(str, specs)) for specs in (wanted, got)]
        raise ModelError(
            f"the models have different {what}: wanted {says[0]}; got {says[1]}",
            fix="compare a model with a version of itself",
        )


@dataclass
class _Sums:
    """What the measures of one output need: sums, no samples."""

    name: str
    signal: float = 0.0
    power: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    max_abs_error: float = 0.0
    same_top: int = 0
    positions: int = 0
    equal: int = 0
    values: int = 0
    left_out: int = 0
    floats: bool = False

    def add(self, ref: np.ndarray, out: np.ndarray, sample: int) -> None:
        if ref.shape != out.shape:
            wanted, got = (" x ".join(map(str, a.shape)) or "a scalar" for a in (ref, out))
            raise ModelError(
                f"output {self.name}: wanted {wanted}, got {got}", where=f"sample {sample}"
            )
        self.values += ref.size
        if not np.issubdtype(ref.dtype, np.floating):
            self.equal += int(np.count_nonzero(ref == out))
            return
        self.floats = True
        self._add_top(ref, out)
        x, y = ref.astype(np.float64).reshape(-1), out.astype(np.float64).reshape(-1)
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            odd = ~finite
            if not np.array_equal(x[odd], y[odd], equal_nan=True):
                raise ModelError(
                    f"output {self.name}: NaN or infinite in one model and not in the other",
                    where=f"sample {sample}",
                )
            x, y = x[finite], y[finite]
            self.left_out += int(odd.sum())
        error = x - y
        with np.errstate(over="ignore"):  # squares of what float64 barely holds
            self.signal = min(self.signal + float(x @ x), _LARGEST)
            self.power = min(self.power + float(y @ y), _LARGEST)
            self.product = min(max(self.product + float(x @ y), -_LARGEST), _LARGEST)
            self.noise = min(self.noise + float(error @ error), _LARGEST)
        self.max_abs_error = max(self.max_abs_error, float(np.abs(error).max(initial=0.0)))

    def _add_top(self, ref: np.ndarray, out: np.ndarray) -> None:
        axis = class_axis(ref.shape)
        if axis is not None and ref.size:
            same = ref.argmax(axis) == out.argmax(axis)
            self.same_top += int(np.count_nonzero(same))
            self.positions += same.size

    def result(self, samples: int) -> OutputError:
        if not self.values:  # no tensor, or without any value
            return OutputError(self.name, samples)
        if not self.floats:
            return OutputError(self.name, samples, equal=self.equal / self.values)
        if self.left_out == self.values:
            return OutputError(self.name, samples, left_out=self.left_out)
        return OutputError(
            self.name,
            samples,
            left_out=self.left_out,
            sqnr_db=_decibel(self.signal, self.noise),
            cosine=self._cosine(),
            max_abs_error=self.max_abs_error,
            top1_agreement=self.same_top / self.positions if self.positions else None,
        )

    def _cosine(self) -> float:
        if self.signal == self.power == 0:
            return 1.0
        if self.signal == 0 or self.power == 0:
            return 0.0
        cosine = self.product / math.sqrt(self.signal) / math.sqrt(self.power)
        return min(max(cosine, -1.0), 1.0)  # rounding may leave the range by a hair


def class_axis(shape: tuple[int, ...]) -> int | None:
    """The axis along which the classes of an output lie; None if there are none."""
    if len(shape) < 2:
        return None
    axis = 1 if len(shape) > 3 else len(shape) - 1
    return axis if shape[axis] > 1 else None


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return LARGEST_SQNR_DB
    if signal == 0:
        return -LARGEST_SQNR_DB
    ratio = 10 * (math.log10(signal) - math.log10(noise))
    return min(max(ratio, -LARGEST_SQNR_DB), LARGEST_SQNR_DB)
