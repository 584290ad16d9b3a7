"""What number formats do to one layer at a time, measured: by running what lies behind it.

The float model's activations wait at a cut that moves through the graph.  For each layer the cut
stands right behind it: what the layer puts out with a rounded weight, or from a rounded input, is
computed anew, and the rest of the graph runs once for each format and sample.  Nothing before the
layer runs again.

The other way round, all layers are quantized but one: the cut moves through the simulated model,
and the layer is computed in float.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from onnxq.analysis.error import LARGEST_SQNR_DB, between
from onnxq.checkpoint import Results, fingerprint
from onnxq.encoding import Encoding
from onnxq.errors import CalibrationError, OnnxqError
from onnxq.frontier import AS_WRITTEN, Frontier, peak_bytes
from onnxq.model import Layer, Model
from onnxq.patches import rows_of
from onnxq.progress import Progress, Silent
from onnxq.runtime import Session, cores
from onnxq.second_order import takes_bias

__all__ = ["Metric", "Outcome", "Trial", "all_but_one", "one_at_a_time"]

Feed = Mapping[str, np.ndarray]
# What a model is worth, from its outputs on each sample in turn; greater is better.
Metric = Callable[[Iterator[Mapping[str, np.ndarray]]], float]
_MB = 1 << 20


@dataclass(frozen=True, eq=False)
class Trial:
    """One thing to try on a layer.

    Args:
        key: What to call it.
        weight: How the weight is rounded; None: not at all.
        activation: How the input is rounded; None: not at all.
    """

    key: str
    weight: Encoding | None = None
    activation: Encoding | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Args:
        effect: Squared error of the outputs relative to their power, averaged over the outputs;
            None where it means nothing.
        metric: What the metric gave; None where there is none.
        note: Why there is no number; empty where there is.
    """

    effect: float | None
    metric: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class _Change:
    """A layer as it is tried: its weight, what is added to its output, how its input is rounded."""

    key: str
    weight: np.ndarray
    shift: np.ndarray
    activation: Encoding | None


@dataclass(frozen=True, eq=False)
class _Work:
    """All trials of one layer: what another thread, process or machine needs to run them."""

    layer: onnx.ModelProto
    rest: onnx.ModelProto | None
    inputs: tuple[str, str]  # what the layer reads: activation, weight
    result: str  # what it calls its result
    output: str  # what the rest calls it
    xs: list[np.ndarray]
    kept: list[dict[str, np.ndarray]]
    changes: list[_Change]
    outputs: list[str]
    wanted: list[dict[str, np.ndarray]] | None  # None: what the rest gives unchanged
    metric: Metric | None


def one_at_a_time(
    model: Model,
    trials: Mapping[str, Sequence[Trial]],
    samples: Sequence[Feed],
    *,
    means: Mapping[str, np.ndarray] | None = None,
    metric: Metric | None = None,
    executor: Executor | None = None,
    threads: int = 0,
    resume: Path | None = None,
    memory_mb: int = 2048,
    progress: Progress | None = None,
) -> dict[str, dict[str, Outcome]]:
    """Try formats on each layer, all else in float.

    Args:
        model: The float model.
        trials: Layer -> what to try on it.
        samples: What to run it on.
        means: Layer -> mean patch of its input, [G, K]: its bias is corrected for the rounding of
            its weight.
        metric: The caller's own measure, beside the error of the outputs; has to be picklable where
            the executor runs other processes.
        executor: Runs the layers side by side; None: threads of this process.
        threads: How many layers are run side by side; 0 for one per core.
        resume: A folder in which results of finished layers are kept, and found again.
        memory_mb: Megabytes that activations of samples may take; fewer samples are used where they
            would take more.
        progress: Where progress is shown.

    Returns:
        Layer -> key of the trial -> outcome.

    Raises:
        CalibrationError: There are no samples.
    """
    run = _Run(model, model.to_proto(), trials, samples, means or {}, metric, memory_mb)
    return run.all(executor, threads, resume, progress or Silent(), "one layer at a time")


def all_but_one(
    model: Model,
    simulated: Model,
    layers: Sequence[str],
    samples: Sequence[Feed],
    *,
    metric: Metric | None = None,
    executor: Executor | None = None,
    threads: int = 0,
    resume: Path | None = None,
    memory_mb: int = 2048,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Leave one layer at a time in float, its input too, all else quantized.

    Beside `simulated`, what `onnxq.simulation.simulated` makes of the model, and the names of the
    layers, the arguments are those of `one_at_a_time`.

    Returns:
        Layer -> outcome: the error against the float model that is left.
    """
    trials = {name: [Trial("float")] for name in layers}
    proto = simulated.to_proto()
    run = _Run(model, proto, trials, samples, {}, metric, memory_mb)
    session = Session(model.to_proto(), threads=threads)
    run.wanted = [session.run(feed) for feed in run.samples]
    found = run.all(executor, threads, resume, progress or Silent(), "all but one layer")
    return {name: outcomes["float"] for name, outcomes in found.items()}


class _Run:
    """Layers in graph order, each with its trials.

    Args:
        model: The float model, which has the weights.
        proto: What the cut moves through.
        trials: Layer -> what to try.
        samples: The samples.
        means: Mean patches of layers whose bias is corrected.
        metric: The caller's measure.
        memory_mb: Megabytes that activations may take.
    """

    def __init__(
        self,
        model: Model,
        proto: onnx.ModelProto,
        trials: Mapping[str, Sequence[Trial]],
        samples: Sequence[Feed],
        means: Mapping[str, np.ndarray],
        metric: Metric | None,
        memory_mb: int,
    ) -> None:
        if not samples:
            raise CalibrationError("there are no samples to try on", fix="give some (--calib PATH)")
        self.model, self.proto = model, proto
        self.layers = [layer for layer in model.layers() if layer.name in trials]
        self.trials, self.means, self.metric = trials, means, metric
        ends = [layer.x.name for layer in self.layers]
        each = max(peak_bytes(proto, samples[:1], ends), 1)
        self.samples = samples[: max(1, memory_mb * _MB // each)]
        self.wanted: list[dict[str, np.ndarray]] | None = None

    def all(
        self,
        executor: Executor | None,
        threads: int,
        resume: Path | None,
        progress: Progress,
        what: str,
    ) -> dict[str, dict[str, Outcome]]:
        kept = None if resume is None else Results(resume, self._key(what))
        found: dict[str, dict[str, Outcome]] = {}
        if kept is not None:
            for index, layer in enumerate(self.layers):
                if (known := kept.restore(index)) is not None:
                    outcomes = _outcomes(known)
                    keys = {trial.key for trial in self.trials[layer.name]}
                    if outcomes is None or outcomes.keys() != keys:
                        raise kept.refuse(index)
                    found[layer.name] = outcomes
        threads = min(threads, cores()) or cores()
        pool = ThreadPoolExecutor(threads) if executor is None else executor
        pending: deque[tuple[int, Future[dict[str, Outcome]]]] = deque()

        def finish(advance: Callable[[int], None]) -> None:
            index, future = pending.popleft()
            name, outcomes = self.layers[index].name, future.result()
            if kept is not None:
                kept.keep(index, {k: asdict(o) for k, o in outcomes.items()})
            found[name] = outcomes
            advance(1)

        try:
            with progress.task(what, len(self.layers)) as advance:
                advance(len(found))
                for index, work in self._works(threads, found):
                    pending.append((index, pool.submit(_tried, work)))
                    while len(pending) > threads:
                        finish(advance)
                while pending:
                    finish(advance)
        finally:
            if executor is None:
                pool.shutdown(cancel_futures=True)
        return {layer.name: found[layer.name] for layer in self.layers}

    def _key(self, what: str) -> str:
        tried = [
            (name, [(t.key, _told(t.weight), _told(t.activation)) for t in trials])
            for name, trials in self.trials.items()
        ]
        means = {name: mean.tobytes() for name, mean in self.means.items()}
        feeds = [{n: (a.shape, a.tobytes()) for n, a in s.items()} for s in self.samples]
        metric = getattr(self.metric, "__qualname__", type(self.metric).__name__)
        digest = fingerprint(self.model, what, tried, sorted(means.items()), feeds, metric)
        return digest

    def _works(self, threads: int, done: Mapping[str, object]) -> Iterator[tuple[int, _Work]]:
        """The trials of each layer that is not done, the cut moving on from one to the next."""
        frontier = Frontier(self.proto, self.samples, threads=threads)
        nodes = {node.name: node for node in self.proto.graph.node}
        plain = self.model.to_proto()  # whose biases are not corrected for rounding
        outputs = [o.name for o in self.proto.graph.output]
        for index, layer in enumerate(self.layers):
            if layer.name in done:
                continue
            frontier.advance(layer.x.name)
            xs = [*frontier.values(layer.x.name)]
            output = nodes[layer.name].output[0]  # in a simulated model of another name, perhaps
            frontier.advance(output)
            yield (
                index,
                _Work(
                    layer=_alone(plain, layer),
                    rest=frontier.rest(),
                    inputs=(layer.x.name, layer.weight_tensor.name),
                    result=layer.y.name,
                    output=output,
                    xs=xs,
                    kept=frontier.kept,
                    changes=[
                        _change(layer, t, self.means.get(layer.name)) for t in self._of(layer)
                    ],
                    outputs=outputs,
                    wanted=self.wanted,
                    metric=self.metric,
                ),
            )

    def _of(self, layer: Layer) -> Sequence[Trial]:
        return self.trials[layer.name]


def _outcomes(known: object) -> dict[str, Outcome] | None:
    """What was kept of a layer; None if it is anything else."""
    if not isinstance(known, dict) or not all(isinstance(v, dict) for v in known.values()):
        return None
    numbers = (int, float, type(None))
    try:
        found = {key: Outcome(**fields) for key, fields in known.items()}
    except TypeError:
        return None
    fits = all(
        isinstance(o.effect, numbers) and isinstance(o.metric, numbers) and isinstance(o.note, str)
        for o in found.values()
    )
    return found if fits else None


def _told(encoding: Encoding | None) -> object:
    if encoding is None:
        return None
    return encoding.dtype, encoding.axis, encoding.scale.tobytes(), encoding.zero_point.tobytes()


def _alone(proto: onnx.ModelProto, layer: Layer) -> onnx.ModelProto:
    """The node of a layer as a model that is fed its activation and its weight."""
    node = next(node for node in proto.graph.node if node.name == layer.name)
    single = onnx.NodeProto()
    single.CopyFrom(node)
    names = [layer.x.name, layer.weight_tensor.name]
    single.input[1 - layer.side], single.input[layer.side] = names
    constants = [t for t in proto.graph.initializer if t.name in single.input[2:]]
    kind = helper.np_dtype_to_tensor_dtype(layer.weight.dtype)
    inputs = [helper.make_tensor_value_info(name, kind, None) for name in names]
    outputs = [onnx.ValueInfoProto(name=node.output[0])]
    model = helper.make_model(helper.make_graph([single], "layer", inputs, outputs, constants))
    model.ir_version = proto.ir_version
    del model.opset_import[:]
    model.opset_import.extend(proto.opset_import)
    return model


def _change(layer: Layer, trial: Trial, mean: np.ndarray | None) -> _Change:
    weight, shift = layer.weight, np.zeros(1, np.float32)
    if trial.weight is not None:
        weight = trial.weight.fake_quantize(layer.weight)
        if mean is not None and takes_bias(layer):
            error = rows_of(layer, weight).astype(np.float64) - rows_of(layer)
            alpha = float(layer.node.attrs.get("alpha", 1.0))
            shift = -alpha * np.einsum("grk,gk->gr", error, mean).reshape(-1).astype(np.float32)
    if "Conv" in layer.op:
        shift = shift.reshape(-1, *[1] * (layer.weight.ndim - 2))
    return _Change(trial.key, weight, shift, trial.activation)


# ---------------------------------------------------------------------- wherever it runs


def _tried(work: _Work) -> dict[str, Outcome]:
    layer = Session(work.layer, outputs=[work.result], threads=1)
    rest = None
    if work.rest is not None:
        names = [o.name for o in work.rest.graph.output]
        rest = Session(work.rest, outputs=names, threads=1, config=AS_WRITTEN)

    def outputs(y: np.ndarray | None, index: int) -> dict[str, np.ndarray]:
        """What the rest makes of a sample, given what the layer puts out; None as it was."""
        kept = work.kept[index]
        values = kept if y is None else {**kept, work.output: y}
        found = {n: values[n] for n in work.outputs if n in values}
        if rest is not None:
            found |= rest.run({spec.name: values[spec.name] for spec in rest.inputs})
        return found

    samples = range(len(work.kept))
    wanted = work.wanted or [outputs(None, i) for i in samples]
    names = [n for n in work.outputs if n in wanted[0]]
    found = {}
    for change in work.changes:

        def results(change: _Change = change) -> Iterator[dict[str, np.ndarray]]:
            for index in samples:
                x = work.xs[index]
                if change.activation is not None:
                    x = change.activation.fake_quantize(x)
                feed = dict(zip(work.inputs, (x, change.weight), strict=True))
                yield outputs(layer.run(feed)[work.result] + change.shift, index)

        found[change.key] = _judged(wanted, [*results()], names, work)
    return found


def _judged(
    wanted: Sequence[Feed], got: Sequence[Feed], names: Sequence[str], work: _Work
) -> Outcome:
    metric = None if work.metric is None else float(work.metric(iter(got)))
    try:
        errors = between(zip(wanted, got, strict=True), names)
    except OnnxqError as error:  # NaN that the float model does not give
        return Outcome(None, metric, error.what)
    known = [e.sqnr_db for e in errors if e.sqnr_db is not None]
    if not known:
        return Outcome(None, metric, "no output is in floating point")
    shares = [0.0 if db >= LARGEST_SQNR_DB else 10 ** (-db / 10) for db in known]
    floats = len(work.outputs) - (len(errors) - len(known))
    return Outcome(sum(shares) / floats, metric)  # what the layer does not reach is as it was
