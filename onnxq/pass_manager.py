"""Pass, Context, Changes, PassManager: the four words in which onnxq is written."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import onnx

from onnxq import reductions
from onnxq.blocked import any_order
from onnxq.calibration import Calibration, Samples
from onnxq.errors import CalibrationError, OnnxqError, PassError, RecipeError
from onnxq.kernels._jit import announced
from onnxq.model import Model, load
from onnxq.progress import Progress, Silent
from onnxq.report import Changes, PassRecord, Report
from onnxq.runtime import Session, cores
from onnxq.statistics import Statistics, observe
from onnxq.targets import Target, target_named

__all__ = ["Changes", "Context", "Pass", "PassManager", "options"]

# More is a mistake: each thread takes memory, and samples are in flight for each.
MOST_THREADS = 1024

After = Callable[["Pass", Model, Changes], None]


@runtime_checkable
class Pass(Protocol):
    """A rewrite of a model: a frozen, keyword-only dataclass whose fields are its options.

    The docstring of a pass holds its paper, formula, a before/after drawing and what it refuses.
    """

    name: ClassVar[str]

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Edit the model in place; say what was done and what was declined."""


def options(step: Pass) -> dict[str, Any]:
    """The options of a pass by name, as plain values."""
    if not dataclasses.is_dataclass(step):
        return {}
    return {f.name: _plain(getattr(step, f.name)) for f in dataclasses.fields(step)}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return {"pass": value.name, **options(value)} if isinstance(value, Pass) else str(value)


class Context:
    """What a pass may need and must not make: data, statistics, randomness, progress, the target.

    Args:
        data: Calibration samples in any form that `Calibration` takes; None for data-free work.
        seed: Seed of every random choice.
        target: What the model is to run on.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.
        statistics: Statistics of an earlier run on the same model and data, to be reused.
        budget_s: Seconds from now on that searches may take, as far as passes can choose.
        resume: A folder where long passes keep what is finished, and take it up again.

    Raises:
        RecipeError: A seed, a number of threads or a budget that means nothing.
        TargetError: No target has that name.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        seed: int = 0,
        target: str | Target = "ort-cpu",
        threads: int = 0,
        progress: Progress | None = None,
        statistics: Statistics | None = None,
        budget_s: float | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> None:
        given = data is None or isinstance(data, Calibration)
        self.data: Calibration | None = data if given else Calibration(data)
        if seed < 0:
            raise RecipeError(f"seed: wanted 0 or more, got {seed}")
        if not 0 <= threads <= MOST_THREADS:
            raise RecipeError(f"threads: wanted 0 (all cores) to {MOST_THREADS}, got {threads}")
        if budget_s is not None and not budget_s > 0:
            raise RecipeError(f"budget: wanted more than 0 seconds, got {budget_s:g}")
        self.seed = seed
        self.deadline = None if budget_s is None else time.monotonic() + budget_s
        self.resume = None if resume is None else Path(resume)
        self.target = target_named(target)
        self.threads = threads
        self.progress: Progress = progress or Silent()
        self.report = Report(notes=[] if self.data is None else [*self.data.notes])
        self._statistics = statistics
        self._observed: tuple[int, bool, Statistics] | None = None
        # the samples of a model's revision: checking them against it opens a session
        self._bound: tuple[Model, int, Samples] | None = None

    @property
    def is_synthetic(self) -> bool:
        """Whether the samples were made up, so that they do not show all that data would."""
        return self.data is not None and self.data.is_synthetic

    def finish(self) -> Report:
        """The report, with what reading the samples has shown."""
        note = None if self.data is None else self.data.skip_note
        if note is not None and note not in self.report.notes:
            self.report.notes.append(note)
        return self.report

    def rng(self, step: Pass) -> np.random.Generator:
        """A generator that depends on the run's seed and the pass's name alone."""
        return np.random.default_rng([self.seed, *step.name.encode()])

    def samples(self, model: Model) -> Samples:
        """The calibration samples, checked against the model's inputs.

        Raises:
            CalibrationError: There are none, or they do not fit.
        """
        if self._bound is not None:
            bound, revision, samples = self._bound
            if bound is model and revision == model.revision:
                return samples
        return self._bind(Session(model.to_proto(), threads=1, level="disabled"))

    def channel_ranges(
        self, model: Model, names: Sequence[str], limit: int = 64
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Least and greatest value per channel (axis 1) of tensors, over the samples.

        The reductions run inside onnxruntime; tensors of unknown rank, or without a channel axis,
        are left out.

        Args:
            model: The model, shapes inferred.
            names: The tensors.
            limit: Use at most so many samples.

        Returns:
            Name -> (least, greatest), each of shape [C].
        """
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        ranks = reductions.ranks(model, names)
        for values in self._per_sample(reductions.with_ranges, model, ranks, limit):
            for name in ranks:
                low, high = values[f"{name}/min"], values[f"{name}/max"]
                old = found.get(name, (low, high))
                found[name] = np.minimum(low, old[0]), np.maximum(high, old[1])
        return found

    def channel_moments(
        self, model: Model, names: Sequence[str], limit: int = 64
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and standard deviation per channel (axis 1) of tensors, over the samples.

        The reductions run inside onnxruntime, about the mean of each sample, so that float32 does
        not lose a small deviation beside a large mean; tensors of unknown rank, or without a
        channel axis, are left out.

        Args:
            model: The model, shapes inferred.
            names: The tensors.
            limit: Use at most so many samples.

        Returns:
            Name -> (mean, standard deviation), each float64 [C].
        """
        total: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
        ranks = reductions.ranks(model, names)
        for values in self._per_sample(reductions.with_moments, model, ranks, limit):
            for name in ranks:
                parts = (values[f"{name}/{part}"] for part in ("mean", "squares"))
                mean, squares = (part.astype(np.float64).reshape(-1) for part in parts)
                count = float(values[f"{name}/size"]) / max(mean.size, 1)
                old = total.get(name, (0.0, np.zeros_like(mean), np.zeros_like(mean)))
                total[name] = reductions.pooled(old, (count, mean, squares))
        return {n: (mean, np.sqrt(squares / count)) for n, (count, mean, squares) in total.items()}

    def _per_sample(
        self,
        reduced: Callable[[Model, Mapping[str, int]], onnx.ModelProto],
        model: Model,
        ranks: Mapping[str, int],
        limit: int,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Run what reduces tensors on each sample."""
        if not ranks:
            return
        session = Session(reduced(model, ranks), threads=self.threads)
        samples = self.spread(session, limit)
        with self.progress.task("channels", samples.length) as advance:
            for feed in samples:
                yield session.run(feed)
                advance(1)

    @property
    def observed(self) -> Statistics | None:
        """The statistics that the run collected; None if it needed none."""
        return None if self._observed is None else self._observed[2]

    def spread(self, session: Session, limit: int) -> Samples:
        """At most `limit` of the samples, evenly spread where they are files; 0 gives all."""
        return self._bind(session, limit)

    def _bind(self, session: Session, limit: int = 0) -> Samples:
        if self.data is None:
            raise CalibrationError("this needs calibration samples", fix="give data (--calib PATH)")
        data = self.data if not limit else self.data.limited(limit)
        samples = data.bind(session.inputs)
        if samples.note is not None and samples.note not in self.report.notes:
            self.report.notes.append(samples.note)
        return samples

    def has_statistics(self, names: Collection[str], channels: Collection[str] = ()) -> bool:
        """Whether there are samples, or statistics of an earlier run with all that."""
        given = self._statistics
        return self.data is not None or (given is not None and _holds(given, names, channels))

    def statistics(
        self,
        model: Model,
        names: Sequence[str],
        *,
        histogram: bool = True,
        channels: Collection[str] = (),
    ) -> Statistics:
        """Statistics of tensors over the calibration samples, from one pass over the data.

        Kept until the model changes; statistics handed to the context are used where they have
        everything asked for.

        Args:
            model: The model.
            names: The tensors.
            histogram: Whether to keep histograms.
            channels: Those of the tensors whose channels' extremes are kept, too.

        Raises:
            CalibrationError: No samples, samples that do not fit, or values that are not finite.
        """
        given = self._statistics
        if given is not None and _holds(given, names, channels):
            return given
        if self._observed is not None:
            revision, with_histogram, statistics = self._observed
            fresh = revision == model.revision and (with_histogram or not histogram)
            if fresh and _holds(statistics, names, channels):
                return statistics
        # one thread a session: whole samples side by side beat threads inside of operators
        free = {*names} - {*channels}
        session = any_order(model.to_proto(names), free, threads=1)
        samples = self._bind(session)
        self._bound = (model, model.revision, samples)
        with self.progress.task("calibrate", samples.length) as advance:
            statistics = observe(
                session,
                names,
                samples,
                histogram=histogram,
                channels=channels,
                progress=advance,
                threads=min(self.threads, cores()) or None,  # more would only take memory
            )
        self._observed = (model.revision, histogram, statistics)
        return statistics


def _holds(known: Statistics, names: Collection[str], channels: Collection[str]) -> bool:
    """Whether all tensors of these names are there, and the channels of those."""
    with_channels = (n for n, t in known.items() if t.channels is not None)
    return known.keys() >= {*names} and {*with_channels} >= {*channels}


class PassManager:
    """Runs passes in order; itself a pass, so it nests.

    Calling it clones the model once, and passes edit the clone.  After each pass the model is
    checked, its revision raised (which retires stale statistics), and seconds, bytes and changes
    are recorded.

    Args:
        *passes: What to run.
        after: Called as `after(pass, model, changes)` after each pass, for dumps, plots and tests.
    """

    name: ClassVar[str] = "pass-manager"

    def __init__(self, *passes: Pass, after: After | None = None) -> None:
        self.passes = passes
        self.after = after

    def __repr__(self) -> str:
        return f"PassManager({', '.join(map(repr, self.passes))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassManager) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __add__(self, other: PassManager) -> PassManager:
        return PassManager(*self.passes, *other.passes, after=self.after or other.after)

    def __call__(
        self, model: Model | str | os.PathLike[str], data: Any = None, **context: Any
    ) -> tuple[Model, Report]:
        """Run on a copy of the model.

        Args:
            model: A model, a file, or a ModelProto; never changed.
            data: Calibration samples, in any form that `Calibration` takes.
            **context: Further arguments of `Context` (seed, target, threads, progress).

        Returns:
            The new model and the report of the run.

        Raises:
            OnnxqError: A known error, as the pass raised it.
            PassError: A pass failed in an unforeseen way; the cause is chained.
        """
        ctx = Context(data, **context)
        copy = load(model)
        with announced(ctx.progress.say):
            self.apply(copy, ctx)
        ctx.report.notes[:0] = copy.notes
        return copy, ctx.finish()

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Run the passes on the model itself."""
        total = Changes()
        for step in self.passes:
            start = time.perf_counter()
            try:
                changes = step.apply(model, ctx)
                if changes and not isinstance(step, PassManager):
                    model.check()
                    model.revision += 1
            except (OnnxqError, MemoryError):
                raise
            except Exception as error:
                done = tuple(p.name for p in ctx.report.passes)
                raise PassError(step.name, done, error) from error
            if not isinstance(step, PassManager):
                seconds = time.perf_counter() - start
                record = PassRecord(step.name, options(step), seconds, model.nbytes, changes)
                ctx.report.passes.append(record)
            if self.after is not None:
                self.after(step, model, changes)
            total.extend(changes)
        return total
