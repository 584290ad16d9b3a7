"""Arrays by input name, checked against what a model takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.errors import CalibrationError
from onnxq.readers import Stored
from onnxq.signature import TensorSpec

__all__ = ["Feed", "Signature", "as_array"]

# The arrays of one run of a model, by input name, batch dimension included.
Feed = dict[str, np.ndarray]

_LOOSE = frozenset({"?", "None", "-1"})  # symbols by which exporters mean an unknown size


@dataclass(frozen=True)
class Signature:
    """The inputs of a model.

    Args:
        inputs: What every sample has to give.
        optional: What it may give, too.
    """

    inputs: tuple[TensorSpec, ...]
    optional: tuple[TensorSpec, ...] = ()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All inputs by name."""
        return {s.name: s for s in (*self.inputs, *self.optional)}

    def only(self, where: object) -> TensorSpec:
        """The input that an array without a name is for.

        Raises:
            CalibrationError: There are several.
        """
        if len(self.inputs) > 1:
            raise CalibrationError(
                f"wanted arrays by name for {len(self.inputs)} inputs, got one without a name",
                where=where,
                fix=f"give .npz or dicts with {_listed(self.inputs)}",
            )
        return self.inputs[0]

    def check_names(self, given: Iterable[str], where: str) -> None:
        """Refuse names that are missing, and names that the model does not know.

        Raises:
            CalibrationError: Names what is wanted and what is there.
        """
        given, known = [str(name) for name in given], self.specs
        missing = [s.name for s in self.inputs if s.name not in given]
        unknown = [name for name in given if name not in known]
        takes = f"the model takes {_listed(known.values())}"
        if missing:
            near = difflib.get_close_matches(missing[0], unknown, 1)
            raise CalibrationError(
                f"wanted input {missing[0]!r}, got {', '.join(map(repr, given)) or 'no arrays'}",
                where=where,
                fix=f"rename {near[0]!r} to {missing[0]!r}" if near else takes,
            )
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, 1)
            raise CalibrationError(
                f"the model has no input {unknown[0]!r}",
                where=where,
                fix=f"did you mean {near[0]!r}?" if near else f"leave it out: {takes}",
            )

    def feed(self, sample: Any, where: str) -> Feed:
        """A sample as the model takes it, in the order of its inputs.

        Args:
            sample: Arrays by name; or the array of the only input, the batch dimension of which may
                be missing.
            where: The file or the number of the sample, for errors.

        Raises:
            CalibrationError: It does not fit; says what was wanted and what there is.
        """
        if isinstance(sample, np.ndarray):
            spec = self.only(where)
            if spec.shape is not None and sample.ndim == len(spec.shape) - 1:
                sample = sample[None]
            sample = {spec.name: sample}
        if not isinstance(sample, Mapping):
            raise CalibrationError(
                f"wanted a dict of arrays by input name, got {type(sample).__name__}",
                where=where,
                fix="give {" + ", ".join(f"{s.name!r}: array" for s in self.inputs) + "}",
            )
        self.check_names(sample, where)
        specs = {name: spec for name, spec in self.specs.items() if name in sample}
        feed = {name: _fitted(sample[name], spec, where) for name, spec in specs.items()}
        _check_symbols(feed, specs, where)
        return feed


def as_array(value: Any, where: str) -> np.ndarray:
    """Anything array-like, as an array in C order.

    Raises:
        CalibrationError: It is ragged, or holds Python objects other than text.
    """
    try:
        array = np.asarray(value, order="C")
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a GPU
        raise CalibrationError(f"is not an array: {error}", where=where) from error
    if array.dtype.hasobject and not all(isinstance(v, str) for v in array.flat):
        raise CalibrationError("wanted an array of numbers, got Python objects", where=where)
    return array


def _fitted(value: Any, spec: TensorSpec, where: str) -> np.ndarray:
    place = f"{spec.name!r} in {where}"
    given = value if isinstance(value, Stored) else as_array(value, place)
    got = TensorSpec(spec.name, given.dtype, given.shape)
    if not spec.accepts(given.shape):
        raise CalibrationError(
            f"wanted {spec}, got {got}", where=where, fix=_advice(given.shape, spec)
        )
    array = as_array(given.read(), place) if isinstance(given, Stored) else given
    if array.size == 0:
        raise CalibrationError(f"the array is empty: {got}", where=where)
    if spec.dtype is not None and array.dtype != spec.dtype:
        array = _cast(array, spec.dtype, place)
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        what = "NaN" if np.isnan(array).any() else "an infinite value"
        raise CalibrationError(f"the array holds {what}", where=place, fix="mend the sample")
    return array


def _cast(array: np.ndarray, dtype: np.dtype, place: str) -> np.ndarray:
    """The values in another type of the same kind, if it can hold them."""
    fix = f"save it as {dtype.name}"
    if array.dtype.kind == dtype.kind == "f":
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        if np.array_equal(np.isinf(array), np.isinf(result)):
            return result
        fix = f"its largest value is {np.abs(array).max():.6g}"
    elif array.dtype.kind in "iu" and dtype.kind in "iu":
        low, high, limits = int(array.min()), int(array.max()), np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return array.astype(dtype)
        fix = f"its values are {low} to {high}"
    elif array.dtype.kind in "iu" and dtype.kind == "f":
        fix = "convert and scale it as in training"
    raise CalibrationError(f"wanted {dtype.name}, got {array.dtype.name}", where=place, fix=fix)


def _check_symbols(feed: Feed, specs: Mapping[str, TensorSpec], where: str) -> None:
    """A symbolic size is one size within a sample."""
    seen: dict[str, tuple[int, str]] = {}
    for name, array in feed.items():
        for symbol, size in zip(specs[name].shape or (), array.shape, strict=False):
            if isinstance(symbol, str) and symbol not in _LOOSE:
                first, other = seen.setdefault(symbol, (size, name))
                if first != size:
                    raise CalibrationError(
                        f"{symbol!r} is {first} in input {other!r}, but {size} in {name!r}",
                        where=where,
                        fix="give both the same size",
                    )


def _advice(shape: tuple[int, ...], spec: TensorSpec) -> str | None:
    """What is usual behind a wrong shape."""
    if spec.accepts((1, *shape)):
        return "add the batch dimension: array[None]"
    for axes in ((0, 3, 1, 2), (0, 2, 3, 1)):
        if len(shape) == 4 and spec.accepts(tuple(shape[a] for a in axes)):
            return f"move the channels: array.transpose{axes}"
    return None


def _listed(specs: Iterable[TensorSpec]) -> str:
    return "; ".join(map(str, specs))
