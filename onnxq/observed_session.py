"""A session whose caller gets its outputs, while statistics of what is inside add up."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from onnxq.blocked import any_order
from onnxq.model import Model
from onnxq.statistics import Found, Observer, Statistics

__all__ = ["ObservedSession"]


class ObservedSession:
    """Runs a model for its outputs, and observes other tensors on the way.

    While the caller goes on to its next sample, a thread observes the last one: memory holds two at
    most.  Runs may overlap.  The values are those that `onnxq.statistics.observe` sees.

    Attributes:
        inputs: What is to be fed.
        outputs: What `run` gives.
        count: Samples so far.

    Args:
        model: The model.
        names: The tensors that are observed, inputs or of any node.
        histogram: Whether to keep histograms.
        threads: Threads within an operator; 0 for all cores.
    """

    def __init__(
        self, model: Model, names: Sequence[str], *, histogram: bool = True, threads: int = 0
    ) -> None:
        outputs = model.outputs
        made = [name for name in names if name not in model.inputs]
        self._session = any_order(model.to_proto(made), {*made} - {*outputs}, threads=threads)
        self._observer = Observer(self._session, tuple(names), histogram, frozenset())
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="onnxq-observe")
        self._pending: Future[Found] | None = None
        self._lock = threading.Lock()
        self.inputs = self._session.inputs
        self.outputs = [spec for spec in self._session.outputs if spec.name in outputs]
        self.count = 0

    def __enter__(self) -> ObservedSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one sample; the arrays are the caller's, to keep or to overwrite.

        Raises:
            CalibrationError: The feed does not fit, or the sample before had values that are not
                finite.
        """
        arrays = self._session.run_shared(feed)
        given = {s.name: arrays[s.name].copy() for s in self.outputs if s.name in arrays}
        kept = {name: np.array(array) for name, array in feed.items()}
        with self._lock:
            self._settle()
            self._pending = self._pool.submit(self._observer.look, self.count, kept, arrays)
            self.count += 1
        return given

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._observer.include(pending.result())

    def statistics(self) -> Statistics:
        """Of everything that was run.

        Raises:
            CalibrationError: Nothing was, or values are not finite.
        """
        self._settle()
        return self._observer.statistics()
