"""Samples that can be read only once, kept on disk so that they can be read again."""

from __future__ import annotations

import json
import struct
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from onnxq.errors import CalibrationError
from onnxq.feeds import as_array

__all__ = ["Spool"]

Sample = np.ndarray | dict[str, np.ndarray]
_END = object()


class Spool:
    """The samples of an iterator, each taken from it once, and found by every pass.

    A pass reads what is kept; where that ends, it takes the next sample from the source and keeps
    it. So passes may begin, break off and overlap as they like, in several threads, too. Memory
    holds one sample; the others lie one behind the other in a temporary file, which goes with the
    spool, or with the process.

    Attributes:
        count: Samples taken so far.
        finished: Whether these are all.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.count = 0
        self.finished = False
        self._source = source
        self._file: IO[bytes] | None = None
        self._end = 0  # of what is kept, in bytes
        self._whole = True  # whether every sample that was taken is kept
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Sample]:
        position = 0
        while True:
            with self._lock:
                if position == self._end and not self._take():
                    return
                sample, position = self._read(position)
            yield sample

    def _take(self) -> bool:
        """Keep the next sample of the source; False if there is none."""
        where = f"sample {self.count}"
        if not self._whole:
            raise CalibrationError(
                "the samples broke off in an earlier pass", where=where, fix="give them anew"
            )
        if self.finished:
            return False
        self._whole = False  # stays so if anything fails: a sample is not passed over in silence
        sample = next(self._source, _END)
        if sample is _END:
            self.finished = True
        else:
            self._write(_arrays(sample, where), where)
            self.count += 1
        self._whole = True
        return not self.finished

    def keep(self, sample: Any) -> None:
        """Add a sample behind those of the source, once these are taken."""
        where = f"sample {self.count}"
        with self._lock:
            self._write(_arrays(sample, where), where)
            self.count += 1

    # ---------------------------------------------------------------------- the file

    def _write(self, sample: Sample, where: str) -> None:
        """Add a sample: the length of its header, the header as JSON, the bytes of its arrays."""
        header, parts = [], list[bytes | memoryview]()
        for name, array in sample.items() if isinstance(sample, dict) else [(None, sample)]:
            text = array.ravel().tolist() if array.dtype.hasobject else None
            if array.dtype.kind == "V":  # types of other libraries, which numpy cannot name
                raise CalibrationError(
                    f"arrays of type {array.dtype} cannot be kept for the next pass",
                    where=where,
                    fix=_INSTEAD,
                )
            header.append((name, array.dtype.str, array.shape, text))
            if text is None:
                parts.append(array.reshape(-1).view(np.uint8).data)
        data = json.dumps(header).encode()
        parts[:0] = struct.pack("<Q", len(data)), data
        with _disk():
            if self._file is None:
                # without a buffer: closing it has nothing left to write, and so cannot fail
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed below
                weakref.finalize(self, self._file.close)
            self._file.seek(self._end)
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[self._file.write(rest) :]
            self._end = self._file.tell()

    def _read(self, position: int) -> tuple[Sample, int]:
        """The sample at a place in the file, and the place of the next one."""
        assert self._file is not None
        with _disk():
            self._file.seek(position)
            (length,) = struct.unpack("<Q", self._bytes(8))
            header = json.loads(self._bytes(length))
            arrays = {}
            for name, dtype, shape, text in header:
                array: np.ndarray = np.empty(shape, dtype if text is None else object)
                if text is None:
                    self._fill(array.reshape(-1).view(np.uint8).data)
                else:
                    array.reshape(-1)[:] = text
                arrays[name] = array
            return arrays.pop(None) if None in arrays else arrays, self._file.tell()

    def _bytes(self, count: int) -> bytearray:
        data = bytearray(count)
        self._fill(memoryview(data))
        return data

    def _fill(self, rest: memoryview) -> None:
        """Read on until the memory is full."""
        while rest:
            count = self._file.readinto(rest)  # type: ignore[union-attr]  # of an open file
            if not count:
                raise OSError(None, "it is cut off")
            rest = rest[count:]


_INSTEAD = "give a list, or a function that returns a fresh iterable"


def _arrays(sample: Any, where: str) -> Sample:
    if isinstance(sample, np.ndarray):
        return as_array(sample, where)
    if isinstance(sample, Mapping):
        return {str(name): as_array(a, f"{name!r} in {where}") for name, a in sample.items()}
    raise CalibrationError(
        f"wanted a dict of arrays by input name, got {type(sample).__name__}", where=where
    )


@contextmanager
def _disk() -> Iterator[None]:
    """Turn what a disk raises into one line."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"samples that can be read only once are kept in a temporary file: {error.strerror}",
            where=tempfile.tempdir,
            fix=f"point TMPDIR to a folder with more room, or {_INSTEAD}",
        ) from error
