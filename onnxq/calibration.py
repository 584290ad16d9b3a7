"""Where calibration samples come from: files, arrays, iterables."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import CalibrationError, UnreadableError
from onnxq.feeds import Feed, Signature, as_array
from onnxq.pictures import PRESETS, Preprocess
from onnxq.readers import KINDS, Stored, find, read_npy, read_npz, read_pb, spread
from onnxq.signature import TensorSpec
from onnxq.spool import Spool
from onnxq.synthetic import Synthetic

__all__ = ["Calibration", "Samples"]


@dataclass(frozen=True)
class _Reader:
    """What reads a source from its start: (where, arrays by name or one array) per sample."""

    read: Callable[[], Iterator[tuple[str, Any]]]
    length: int | None
    dropped: int = 0
    rows: int = 0


class Calibration:
    """Samples for a model, read one at a time.

    Args:
        source: A folder of .npz files (arrays by input name, batch dimension included), of .npy
            files (for one input), of pictures, or of ``test_data_set_*/input_*.pb``; a .npz or .npy
            file of samples stacked along axis 0; a dict of stacked arrays, or one such array; an
            iterable of dicts; an object with ``get_next()``; a function that returns a fresh
            iterable. What can be read only once (a generator, a reader without ``rewind()``) is
            kept in a temporary file on its first reading, for as long as this object lives.
        limit: Use so many samples, a sample being one run of the model: of files, evenly spread
            over the folder in natural order; of anything else, the first.
        preprocess: For pictures: the name of a preset, a TOML file, or a `Preprocess`.
        strict: Whether a file of a folder that cannot be read is an error. Else it is left out, and
            counted in `skipped`.

    Attributes:
        skipped: Files that were left out, with the reason, as far as they have been come to.

    Raises:
        CalibrationError: There is nothing at the path, or the source is nothing of the kind.
        RecipeError: The preprocessing means nothing.
    """

    def __init__(
        self,
        source: Any,
        *,
        limit: int | None = None,
        preprocess: str | os.PathLike[str] | Preprocess | None = None,
        strict: bool = False,
    ) -> None:
        if limit is not None and (type(limit) is not int or limit < 1):
            raise CalibrationError(f"limit: wanted at least 1 sample, got {limit!r}")
        self.source = source
        self.limit = limit
        self.strict = strict
        self.skipped: dict[str, str] = {}
        self.preprocess = None if preprocess is None else Preprocess.of(preprocess)
        self._stream = _Stream(source)
        if isinstance(source, (str, os.PathLike)):
            if not os.path.exists(source):
                raise CalibrationError("no such file or folder", where=source, fix="check the path")
            return
        if preprocess is not None:
            raise CalibrationError("preprocessing is for files of pictures, not for arrays")
        if not (isinstance(source, Iterable) or callable(source) or hasattr(source, "get_next")):
            raise CalibrationError(
                f"samples cannot come from {type(source).__name__}",
                fix="give a path, arrays by input name, or an iterable of such dicts",
            )

    def __repr__(self) -> str:
        is_path = isinstance(self.source, (str, os.PathLike))
        source = os.fspath(self.source) if is_path else type(self.source).__name__
        return f"Calibration({source!r}, limit={self.limit}, preprocess={self.preprocess!r})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed to make the samples; empty unless they are synthetic."""
        return self.source.notes if isinstance(self.source, Synthetic) else ()

    @property
    def skip_note(self) -> str | None:
        """What the user should know of files that were left out; None if none were."""
        if not self.skipped:
            return None
        count, (where, why) = len(self.skipped), next(iter(self.skipped.items()))
        files = "sample skipped, which" if count == 1 else "samples skipped, which"
        more = "" if count == 1 else f"; and {count - 1} more"
        return f"{count} {files} cannot be read: {where}: {why}{more}"

    @property
    def is_synthetic(self) -> bool:
        """Whether the samples were made up by `onnxq.synthetic`."""
        return isinstance(self.source, Synthetic)

    def limited(self, limit: int) -> Calibration:
        """The same samples, at most `limit` of them."""
        other = copy.copy(self)
        other.limit = limit if self.limit is None else min(limit, self.limit)
        return other

    def bind(self, inputs: Sequence[TensorSpec], optional: Sequence[TensorSpec] = ()) -> Samples:
        """The samples for a model with these inputs.

        Args:
            inputs: What every sample has to give.
            optional: What it may give, too: inputs with a default.

        Raises:
            CalibrationError: The source as a whole does not fit. Single samples are checked when
                they are read.
        """
        if not inputs:
            raise CalibrationError("the model has no inputs, so nothing can be fed")
        signature = Signature(tuple(inputs), tuple(optional))
        if isinstance(self.source, (str, os.PathLike)):
            reader = self._files(Path(self.source), signature)
        elif isinstance(self.source, (Mapping, np.ndarray)):
            arrays = self.source
            if isinstance(arrays, Mapping):
                arrays = {n: as_array(a, f"{n!r} of the dict") for n, a in arrays.items()}
            reader = _stack(arrays, "the arrays", signature, self.limit)
        else:
            reader = _Reader(self._numbered, self._stream.length(self.limit))
        return Samples(signature, reader)

    # ---------------------------------------------------------------------- files

    def _files(self, path: Path, signature: Signature) -> _Reader:
        if path.is_dir():
            kind, files = find(path, pictures=self.preprocess is not None)
        elif path.suffix.lower() in KINDS:
            kind, files = KINDS[path.suffix.lower()], [path]
        else:
            raise CalibrationError(
                "the file is neither .npz nor .npy nor a picture", where=path, fix="give a folder"
            )
        if kind == "pictures":
            return self._pictures(path, files, signature)
        if self.preprocess is not None:
            raise CalibrationError(
                f"preprocessing is for pictures, got {kind}", where=path, fix="leave it out"
            )
        if path.is_dir():
            files = self._unskipped(spread(files, self.limit))
            if kind == ".npy":
                signature.only(path)
            by_kind: dict[str, Callable[[Path], Any]] = {
                ".npz": _npz,
                ".npy": _npy,
                ".pb": partial(read_pb, names=list(signature.specs)),
            }
            read = by_kind[kind]
            return _Reader(lambda: self._readable(files, read), len(files))
        arrays = _unnamed(read_npz(path)) if kind == ".npz" else read_npy(path)
        return _stack(arrays, os.fspath(path), signature, self.limit)

    def _pictures(self, path: Path, files: Sequence[Path], signature: Signature) -> _Reader:
        preprocess = self.preprocess
        if preprocess is None:
            raise CalibrationError(
                "nothing says how pictures become inputs",
                where=path,
                fix="name what the model was trained with: --preprocess"
                f" {'|'.join(PRESETS)}, or a TOML file",
            )
        spec = signature.only(path)
        rows = _batch(spec)
        files = self._unskipped(spread(files, None if self.limit is None else self.limit * rows))
        count, rest = _batches(len(files), spec, path)

        def read() -> Iterator[tuple[str, np.ndarray]]:
            pictures = self._readable(files, lambda f: preprocess.apply(f, spec))
            while len(batch := [*islice(pictures, rows)]) == rows:
                where, group = batch[0][0], [picture for _, picture in batch]
                if len({p.shape for p in group}) > 1:
                    raise CalibrationError(
                        f"pictures differ in size, and the model takes {rows} at once",
                        where=where,
                        fix="give a size in the preprocessing",
                    )
                yield where, np.concatenate(group)

        return _Reader(read, count, rest, len(files))

    def _unskipped(self, files: Sequence[Path]) -> list[Path]:
        """Without those that an earlier pass could not read, so that the number is right."""
        return [f for f in files if os.fspath(f) not in self.skipped]

    def _readable(
        self, files: Sequence[Path], read: Callable[[Path], Any]
    ) -> Iterator[tuple[str, Any]]:
        """What is in files; those that cannot be read are left out, unless that is an error."""
        first: UnreadableError | None = None
        some = False
        for file in files:
            where = os.fspath(file)
            try:
                found = read(file)
            except UnreadableError as error:
                if self.strict:
                    raise
                self.skipped[where] = error.what
                first = first or error
            else:
                some = True
                yield where, found
        if first is not None and not some:
            raise first

    # ---------------------------------------------------------------------- iterables

    def _numbered(self) -> Iterator[tuple[str, Any]]:
        for index, sample in enumerate(islice(self._stream, self.limit)):
            yield f"sample {index}", sample


class _Stream:
    """An iterable, a reader or a function: each pass finds its samples from the first one on."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.started = False
        self.gave = False
        self.spool: Spool | None = None

    def length(self, limit: int | None) -> int | None:
        """How many samples a pass gives; None if that is not known."""
        if self.spool is not None:
            if limit is not None and limit <= self.spool.count:
                return limit
            if self.spool.finished:
                return self.spool.count
        try:
            length = len(self.source)
        except (TypeError, NotImplementedError):
            return None
        return length if limit is None else min(length, limit)

    def __iter__(self) -> Iterator[Any]:
        source = self.source
        if hasattr(source, "get_next"):
            if not hasattr(source, "rewind"):
                return self._kept(iter(source.get_next, None))
            if self.started:
                source.rewind()
            self.started = True
            return iter(source.get_next, None)
        if isinstance(source, Iterator):
            return self._kept(source)
        fresh = source if isinstance(source, Iterable) else source()
        if not isinstance(fresh, Iterable):
            raise CalibrationError(
                f"the function returned {type(fresh).__name__}, wanted an iterable of dicts"
            )
        return self._anew(fresh)

    def _kept(self, source: Iterator[Any]) -> Iterator[Any]:
        if self.spool is None:
            self.spool = Spool(source)
        return iter(self.spool)

    def _anew(self, fresh: Iterable[Any]) -> Iterator[Any]:
        empty = True
        for sample in fresh:
            empty, self.gave = False, True
            yield sample
        if empty and self.gave:
            raise CalibrationError(
                "the samples can be read only once, and are needed again",
                where=type(self.source).__name__,
                fix="give the iterator itself, or a function that returns a fresh one each time",
            )


class Samples:
    """Samples that fit a model: each pass over it gives one feed per run, from the first on.

    Attributes:
        length: How many there are; None if that is not known.
        dropped: Rows or pictures at the end that do not fill a batch of the model's fixed size.
        note: What the user should know of that; None if nothing is dropped.
    """

    def __init__(self, signature: Signature, reader: _Reader) -> None:
        self._signature = signature
        self._reader = reader
        self.length = reader.length
        self.dropped = reader.dropped
        self.note: str | None = None
        if reader.dropped:
            batch = (reader.rows - reader.dropped) // len(self)
            self.note = (
                f"{reader.dropped} of {reader.rows} samples dropped:"
                f" the model takes batches of {batch}"
            )

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of samples is not known")
        return self.length

    def __iter__(self) -> Iterator[Feed]:
        empty = True
        for where, sample in self._reader.read():
            empty = False
            yield self._signature.feed(sample, where)
        if empty:
            raise CalibrationError("there are no samples", fix="give at least one")


# ---------------------------------------------------------------------- arrays


def _stack(arrays: Any, where: str, signature: Signature, limit: int | None) -> _Reader:
    """Samples stacked along axis 0, in memory or in a file.

    An array of the input's rank is cut into batches: of one row, or of the model's fixed size. One
    of a rank higher holds whole inputs. A scalar serves every sample.
    """
    if not isinstance(arrays, Mapping):
        arrays = {signature.only(where).name: arrays}
    signature.check_names(arrays, where)
    counts: dict[str, int] = {}
    starts: dict[str, Callable[[], Iterator[np.ndarray]]] = {}
    dropped, total = 0, 0
    for name, array in arrays.items():
        spec = signature.specs[name]
        above = 0 if spec.shape is None else len(array.shape) - len(spec.shape)
        if above not in (0, 1):
            got = TensorSpec(name, array.dtype, array.shape)
            raise CalibrationError(f"wanted stacked samples of {spec}, got {got}", where=where)
        if not array.shape:
            starts[name] = partial(repeat, _whole(array))
        elif above:
            counts[name] = array.shape[0]
            starts[name] = partial(_rows, array)
        else:
            counts[name], rest = _batches(array.shape[0], spec, where)
            starts[name] = partial(_blocks, array, _batch(spec))
            dropped, total = max((dropped, total), (rest, array.shape[0]))
    if len(set(counts.values())) > 1:
        says = ", ".join(f"{n} of {name!r}" for name, n in counts.items())
        raise CalibrationError(f"wanted as many samples of each input, got {says}", where=where)
    length = min([*counts.values()] or [1])
    if length == 0:
        raise CalibrationError("there are no samples", where=where, fix="give at least one")
    if limit is not None and limit <= length:
        length, dropped = limit, 0  # the rest is not wanted

    def read() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        streams = {name: start() for name, start in starts.items()}
        for index in range(length):
            yield f"{where}, sample {index}", {name: next(s) for name, s in streams.items()}

    return _Reader(read, length, dropped, total)


def _batch(spec: TensorSpec) -> int:
    """Rows per run of the model: its batch where that is fixed, else 1."""
    return max(1, spec.shape[0]) if spec.shape and isinstance(spec.shape[0], int) else 1


def _batches(rows: int, spec: TensorSpec, where: object) -> tuple[int, int]:
    """How many batches there are, and how many rows are left."""
    count, rest = divmod(rows, _batch(spec))
    if rest and not count:
        raise CalibrationError(
            f"wanted {spec}, got only {rest} rows", where=where, fix="give a whole batch"
        )
    return count, rest


def _blocks(array: np.ndarray | Stored, rows: int) -> Iterator[np.ndarray]:
    if isinstance(array, Stored):
        return array.blocks(rows)
    return (array[i : i + rows] for i in range(0, len(array) - rows + 1, rows))


def _rows(array: np.ndarray | Stored) -> Iterator[np.ndarray]:
    return (np.asarray(block[0]) for block in _blocks(array, 1))


def _whole(array: np.ndarray | Stored) -> np.ndarray:
    return array.read() if isinstance(array, Stored) else array


def _npz(path: Path) -> Any:
    arrays = _unnamed(read_npz(path))
    return arrays.read() if isinstance(arrays, Stored) else arrays


def _npy(path: Path) -> np.ndarray:
    return read_npy(path).read()


def _unnamed(arrays: dict[str, Any]) -> Any:
    """What np.savez was given without a name is taken as the array of the only input."""
    return arrays["arr_0"] if list(arrays) == ["arr_0"] else arrays
