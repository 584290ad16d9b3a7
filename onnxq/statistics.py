"""Statistics of tensors over calibration samples: streamed, mergeable, kept in constant memory."""

from __future__ import annotations

import difflib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from math import inf, sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from onnxq.errors import CalibrationError, ModelError, RecipeError
from onnxq.files import check_regular
from onnxq.kernels import observe as counting
from onnxq.kernels import ranges
from onnxq.readers import read_npz
from onnxq.runtime import Session, cores
from onnxq.scratch import whole_file

__all__ = [
    "Found",
    "Method",
    "Observer",
    "Statistics",
    "TensorStatistics",
    "check_method",
    "needs_histogram",
    "observe",
]

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]

# Weight of a new sample in the moving averages, as in onnxruntime's calibrator.
AVERAGING = 0.01

# Samples are run side by side as far as their tensors fit into this many bytes.
_ROOM = 1 << 31
_LARGEST = 1 << 30  # bytes of a file of statistics, unpacked

_FORMAT = "onnxq statistics 1"


@dataclass(eq=False)
class TensorStatistics:
    """What is known of one tensor's values.

    Args:
        count: Number of values.
        minimum: Least value; +inf without values.
        maximum: Greatest value; -inf without values.
        sum: Sum of the values.
        sum_squares: Sum of their squares.
        zeros: How many are exactly zero.
        batches: Number of samples.
        ema_minimum: Moving average of the samples' least values: the first sample's, then with
            each sample 0.01 of the way towards its own.
        ema_maximum: The same of the greatest values.
        bins: Histogram, int64 [n]; None if none was kept. Bin i counts the values x with
            ``floor(x / 2**exponent) == offset + i``.
        exponent: Of the bins' width.
        offset: Number of the first bin: ``floor(minimum / 2**exponent)``.
        channels: Least and greatest value of each channel (axis 1), float32 [2, C]; None if they
            were not kept.
    """

    count: int = 0
    minimum: float = inf
    maximum: float = -inf
    sum: float = 0.0
    sum_squares: float = 0.0
    zeros: int = 0
    batches: int = 0
    ema_minimum: float = inf
    ema_maximum: float = -inf
    bins: np.ndarray | None = field(default=None, repr=False)
    exponent: int = counting.MIN_EXPONENT
    offset: int = 0
    channels: np.ndarray | None = field(default=None, repr=False)

    @property
    def mean(self) -> float:
        """Mean value; 0 without values."""
        return self.sum / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Standard deviation; 0 without values."""
        if not self.count:
            return 0.0
        return sqrt(max(self.sum_squares / self.count - self.mean**2, 0.0))

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both, as if one run had seen all the values.

        Two things need a choice: moving averages, which have an order, become the wider of the two,
        and a histogram and channels are kept only where both have them.

        Raises:
            CalibrationError: The histograms differ in their number of bins.
        """
        merged = TensorStatistics(
            count=self.count + other.count,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            sum=self.sum + other.sum,
            sum_squares=self.sum_squares + other.sum_squares,
            zeros=self.zeros + other.zeros,
            batches=self.batches + other.batches,
            ema_minimum=min(self.ema_minimum, other.ema_minimum),
            ema_maximum=max(self.ema_maximum, other.ema_maximum),
            channels=_wider(self.channels, other.channels),
        )
        if self.bins is None or other.bins is None:
            return merged
        if self.bins.size != other.bins.size:
            raise CalibrationError(
                f"histograms of {self.bins.size} and {other.bins.size} bins do not merge",
                fix="observe again",
            )
        bins, grid = self.bins.copy(), self._grid
        counting.merge(bins, grid, other.bins, other._grid)
        return replace(merged, bins=bins, exponent=int(grid[2]), offset=int(grid[3]))

    def range(
        self,
        method: Method,
        *,
        bits: int = 8,
        symmetric: bool = False,
        percentile: float = 99.999,
    ) -> tuple[float, float]:
        """The range to quantize: at most 0 to at least 0, never wider than the values and 0.

        Args:
            method: ``minmax`` all values; ``moving-average`` the averages of the samples' extremes;
                ``percentile`` the middle part of the values; ``entropy`` the least divergence;
                ``mse`` the least expected squared error.
            bits: Of the quantizer, 2 or more.
            symmetric: Whether the quantizer spans [-m, m], m the larger magnitude of the two.
            percentile: How much of the values ``percentile`` keeps, in percent.

        Raises:
            RecipeError: The method or a number does not mean anything.
            CalibrationError: The method needs a histogram, and none was kept.
        """
        check_method(method, percentile)
        if bits < 2:
            raise RecipeError(f"bits {bits} means nothing", fix="take 2 bits or more")
        if method == "minmax":
            return min(self.minimum, 0.0), max(self.maximum, 0.0)
        if method == "moving-average":
            return min(self.ema_minimum, 0.0), max(self.ema_maximum, 0.0)
        histogram = self._histogram
        if method == "percentile":
            return ranges.percentile(*histogram, percentile)
        search = ranges.mse if method == "mse" else ranges.entropy
        return search(*histogram, 2**bits - symmetric, symmetric)

    def noise(self, low: float, high: float, levels: int) -> float:
        """Expected squared error of quantizing one value to `levels` points from low to high.

        Raises:
            CalibrationError: No histogram was kept.
        """
        return ranges.noise(*self._histogram, min(low, 0.0), max(high, 0.0), levels)

    @property
    def _grid(self) -> np.ndarray:
        return np.array([self.minimum, self.maximum, self.exponent, self.offset], np.float64)

    @property
    def _adds_up(self) -> bool:
        """Whether the bins are those of the extremes and of the counts, and channels theirs."""
        if self.channels is not None:
            if self.channels.ndim != 2 or len(self.channels) != 2:
                return False
            low, high = self.channels
            if (low.min(initial=inf), high.max(initial=-inf)) != (self.minimum, self.maximum):
                return False
        if self.bins is None:
            return True
        if self.bins.dtype != np.int64 or self.bins.ndim != 1 or self.bins.min(initial=0) < 0:
            return False
        if self.bins.sum() != self.count or not 0 <= self.zeros <= self.count:
            return False
        if not self.count:
            return True
        first, last = np.floor(np.ldexp([self.minimum, self.maximum], -self.exponent))
        return bool(first == self.offset and first <= last < first + self.bins.size)

    @property
    def _histogram(self) -> tuple[np.ndarray, np.ndarray, int]:
        if self.bins is None:
            raise CalibrationError("no histogram was kept", fix="observe with histogram=True")
        return self.bins, self._grid, self.zeros


class Statistics(Mapping[str, TensorStatistics]):
    """Statistics of tensors by name.

    Args:
        tensors: Name -> statistics.
        metadata: Anything worth keeping with them, as strings.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorStatistics] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = dict(tensors or {})
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> TensorStatistics:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Statistics of {len(self)} tensors>"

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of two shards of the data; of metadata that differ, one's own are kept."""
        merged = dict(self._tensors)
        for name, tensor in other.items():
            merged[name] = merged[name].merge(tensor) if name in merged else tensor
        return Statistics(merged, {**other.metadata, **self.metadata})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, whole or not at all.

        Raises:
            CalibrationError: The file cannot be written.
        """
        arrays: dict[str, Any] = {
            "about": np.array(
                json.dumps({"format": _FORMAT, "names": list(self), "metadata": self.metadata})
            )
        }
        tensors = list(self.values())
        for name, kind in _NUMBERS.items():
            arrays[name] = np.array([getattr(t, name) for t in tensors], kind)
        for i, tensor in enumerate(tensors):
            if tensor.bins is not None:
                arrays[f"bins{i}"] = tensor.bins
            if tensor.channels is not None:
                arrays[f"channels{i}"] = tensor.channels
        target = Path(path)
        try:
            with whole_file(target) as part, part.open("wb") as file:
                np.savez_compressed(file, **arrays)
        except OSError as error:
            raise CalibrationError(
                f"cannot write the statistics: {error.strerror}",
                where=target,
                fix="check the folder and the space on the disk",
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            CalibrationError: No such file, or not a whole one.
        """
        try:
            check_regular(path)
            stored = read_npz(Path(path), _LARGEST)
            return cls._parse({name: array.read().copy() for name, array in stored.items()})
        except FileNotFoundError as error:
            raise CalibrationError("no such file", where=path, fix="check the path") from error
        except OSError as error:
            raise CalibrationError(f"cannot be read: {error.strerror}", where=path) from error
        except Exception as error:  # zipfile, zlib, json and numpy: all that a broken file raises
            says = error.what if isinstance(error, CalibrationError) else error
            raise CalibrationError(
                f"not a file of statistics: {says}", where=path, fix="collect the statistics again"
            ) from error

    @classmethod
    def _parse(cls, file: Mapping[str, np.ndarray]) -> Statistics:
        about = json.loads(str(file["about"]))
        if about["format"] != _FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        columns = {name: file[name].astype(kind).tolist() for name, kind in _NUMBERS.items()}
        tensors = {}
        for i, name in enumerate(about["names"]):
            tensors[name] = TensorStatistics(
                bins=file.get(f"bins{i}"),
                channels=file.get(f"channels{i}"),
                **{k: v[i] for k, v in columns.items()},
            )
            if not tensors[name]._adds_up:
                raise ValueError(f"the statistics of {name!r} do not add up")
        return cls(tensors, about["metadata"])


_NUMBERS = {
    f.name: np.int64 if f.type == "int" else np.float64
    for f in fields(TensorStatistics)
    if f.name not in ("bins", "channels")
}

_Counts = dict[str, tuple[np.ndarray, np.ndarray]]  # tensor -> bins and grid


def needs_histogram(method: Method) -> bool:
    """Whether the method chooses ranges by more than extremes."""
    return method in ("percentile", "entropy", "mse")


def check_method(method: str, percentile: float) -> None:
    """Refuse what `TensorStatistics.range` could not do.

    Raises:
        RecipeError: The method or the percentile does not mean anything.
    """
    if method not in get_args(Method):
        known = ", ".join(get_args(Method))
        near = difflib.get_close_matches(str(method), get_args(Method), n=1)
        fix = f"did you mean {near[0]!r}? The methods are {known}" if near else f"take {known}"
        raise RecipeError(f"no method {method!r} for ranges", fix=fix)
    if not 0 < percentile <= 100:
        raise RecipeError(
            f"percentile {percentile} means nothing", fix="take more than 0, up to 100 percent"
        )


def observe(
    session: Session,
    names: Sequence[str],
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    histogram: bool = True,
    channels: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> Statistics:
    """Run a model over samples and collect statistics of its tensors.

    A few samples are in flight at a time, each run and observed by one thread: memory does not grow
    with their number. The result does not depend on the number of threads or on their timing. It is
    fastest with a session of one thread, since several samples at once need no waiting for one
    another, as the threads of an operator do.

    Args:
        session: Puts out the tensors that are to be observed.
        names: Tensors: inputs or outputs of the session. Those that are not floating-point are
            left out of the result.
        samples: One feed each; iterated in the calling thread, and copied, so that a reader may
            use its arrays again.
        histogram: Whether to keep histograms, which the methods percentile, entropy and mse need.
        channels: Those of the tensors whose channels' extremes are kept, too.
        progress: Called in the calling thread with 1 after each sample.
        threads: Samples in flight; None takes what the session's threads leave of the cores, as far
            as memory is not strained.

    Raises:
        CalibrationError: No samples, samples that do not fit, or values that are not finite.
        ModelError: The session has no tensor of a name, or fails; a tensor has no channels, or not
            always as many.
    """
    known = {spec.name for spec in (*session.inputs, *session.outputs)}
    for name in names:
        if name not in known:
            raise ModelError(f"the session does not put out {name!r}", fix="make it an output")
    observer = Observer(session, tuple(dict.fromkeys(names)), histogram, frozenset(channels))
    streams = threads or _streams(session)
    pool = ThreadPoolExecutor(streams, thread_name_prefix="onnxq-observe")
    pending: deque[Future[Found]] = deque()
    room = 0  # the first sample runs alone, and tells how much memory a sample takes

    def finish() -> None:
        nonlocal room
        found = pending.popleft().result()
        observer.include(found)
        room = min(streams, max(1, _ROOM // max(found.bytes, 1))) if threads is None else streams
        if progress is not None:
            progress(1)

    try:
        for index, sample in enumerate(samples):
            feed = {name: np.array(array) for name, array in sample.items()}
            pending.append(pool.submit(observer.run, index, feed))
            while len(pending) > room:
                finish()
        while pending:
            finish()
    finally:
        pool.shutdown(cancel_futures=True)
    return observer.statistics()


def _channels(name: str, array: np.ndarray) -> np.ndarray:
    """Least and greatest value of each channel, float32 [2, C]."""
    if array.ndim < 2:
        raise ModelError("it has no channels", where=f"tensor {name}")
    values = array.reshape(*array.shape[:2], int(np.prod(array.shape[2:])))
    low = np.minimum.reduce(values, axis=(0, 2), initial=inf)
    return np.stack([low, np.maximum.reduce(values, axis=(0, 2), initial=-inf)]).astype(np.float32)


def _wider(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    """The extremes of both; None if they are not of the same channels."""
    if a is None or b is None or a.shape != b.shape:
        return None
    return np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])


def _streams(session: Session) -> int:
    """How many samples at a time keep the cores busy."""
    if session.threads:
        return max(1, cores() // session.threads)
    return min(2, cores())  # one runs on all cores, one is observed


@dataclass
class Found:
    """What one sample told: moments and channels of its tensors, and how many bytes they were."""

    moments: dict[str, counting.Moments]
    channels: dict[str, np.ndarray]
    bytes: int


class Observer:
    """Collects what the samples of one run tell.

    Args:
        session: Puts out the tensors.
        names: Those that are observed.
        histogram: Whether histograms are kept.
        channels: Those of the tensors whose channels' extremes are kept, too.
    """

    def __init__(
        self, session: Session, names: tuple[str, ...], histogram: bool, channels: frozenset[str]
    ) -> None:
        self.session = session
        self.names = names
        self.histogram = histogram
        self.channels = channels
        self.inputs = {spec.name for spec in session.inputs}
        self.tensors: dict[str, TensorStatistics] = {}
        # Histograms of the threads that are between samples: a thread takes one for a sample, so
        # nothing is ever shared. Counts add up to the same in any order.
        self.counts: list[_Counts] = []

    def run(self, index: int, feed: Mapping[str, np.ndarray]) -> Found:
        """Run one sample and observe its tensors; called by many threads at once."""
        return self.look(index, feed, self.session.run_shared(feed))

    def look(
        self, index: int, feed: Mapping[str, np.ndarray], arrays: dict[str, np.ndarray]
    ) -> Found:
        """Observe the tensors of a sample, which leave the arrays one by one.

        Raises:
            CalibrationError: Values that are not finite.
        """
        try:
            counts = self.counts.pop()
        except IndexError:
            counts = {}
        found = Found({}, {}, 0)
        for name in self.names:
            array = feed[name] if name in self.inputs else arrays.pop(name, None)
            if array is None or array.dtype not in (np.float16, np.float32, np.float64):
                continue
            found.bytes += array.nbytes
            if self.histogram:
                if name not in counts:
                    counts[name] = np.zeros(counting.BINS, np.int64), counting.empty_grid()
                moments = counting.observe(array, *counts[name])
            else:
                moments = counting.moments(array)
            if moments.strange:
                raise CalibrationError(
                    f"{moments.strange} of {moments.size} values are NaN or infinite",
                    where=f"tensor {name}, sample {index}",
                    fix="check the sample's values and preprocessing, then the model",
                )
            found.moments[name] = moments
            if name in self.channels:
                found.channels[name] = _channels(name, array)
        self.counts.append(counts)
        return found

    def include(self, found: Found) -> None:
        """Add the moments of the next sample in order: sums and averages depend on it."""
        for name, m in found.moments.items():
            t = self.tensors.setdefault(name, TensorStatistics())
            if m.size and not t.count:
                t.ema_minimum, t.ema_maximum = m.minimum, m.maximum
            elif m.size:
                t.ema_minimum += AVERAGING * (m.minimum - t.ema_minimum)
                t.ema_maximum += AVERAGING * (m.maximum - t.ema_maximum)
            t.count += m.size
            t.minimum = min(t.minimum, m.minimum)
            t.maximum = max(t.maximum, m.maximum)
            t.sum += m.total
            t.sum_squares += m.squares
            t.zeros += m.zeros
            t.batches += 1
            if name in found.channels:
                seen = found.channels[name]
                t.channels = seen if t.batches == 1 else _wider(t.channels, seen)
                if t.channels is None:
                    raise ModelError("the number of its channels varies", where=f"tensor {name}")

    def statistics(self) -> Statistics:
        """Everything included, once all samples are done."""
        if not self.tensors and not self.counts:
            raise CalibrationError("no samples", fix="give at least one")
        for name, tensor in self.tensors.items():
            if self.histogram:
                bins, grid = np.zeros(counting.BINS, np.int64), counting.empty_grid()
                for counts in self.counts:
                    if name in counts:
                        counting.merge(bins, grid, *counts[name])
                tensor.bins, tensor.exponent, tensor.offset = bins, int(grid[2]), int(grid[3])
        return Statistics(self.tensors)
