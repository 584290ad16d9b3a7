"""`analyze`: what quantization would do to a model, layer by layer, and why."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from onnxq import api, recipe
from onnxq.analysis.error_flow import error_flow
from onnxq.analysis.findings import Analysis, LayerFindings, TensorFindings
from onnxq.analysis.sensitivity import PARTS, decibel
from onnxq.calibrated import calibrate
from onnxq.compressible import Compressible, compressible
from onnxq.encoding import Format
from onnxq.errors import ModelError, RecipeError
from onnxq.expected import Expected, Key, expect
from onnxq.formats import LayerFormat
from onnxq.fragility import explained, with_shares
from onnxq.kernels._jit import announced
from onnxq.layer_findings import agreement, layer_findings, measured, totals
from onnxq.model import Model, load
from onnxq.pass_manager import Context
from onnxq.passes import Calibrate
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.runtime import Session, cores, versions
from onnxq.second_order import correct_bias, rows_of, takes_bias
from onnxq.simulation import simulated
from onnxq.targets import Target
from onnxq.trials import Metric, Trial, all_but_one, one_at_a_time
from onnxq.version import __version__

__all__ = ["Measured", "analyze"]

Measured = Literal["one-at-a-time", "all-but-one"]
# Formats that every layer is tried in, beside those by which layers are ranked.
WEIGHTS = ("int8/tensor", "int8/channel", "int4/channel", "int16/channel")
ACTIVATIONS = ("uint8", "uint16")
# Samples on which formats are measured, and the error along the graph.
TRIAL_SAMPLES, FLOW_SAMPLES = 16, 16


def analyze(
    source: str | os.PathLike[str] | Model,
    calib: Any,
    *,
    weights: str = "int8/channel",
    activations: str = "uint8",
    exclude: Sequence[str] = (),
    target: str | Target | None = None,
    measure: Measured | None = None,
    metric: Metric | None = None,
    trial_samples: int = TRIAL_SAMPLES,
    executor: Executor | None = None,
    compression: bool = True,
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Find out what quantization does to a model: which layers are fragile, why, what would help.

    Args:
        source: The float model; never changed.
        calib: Calibration samples in any form that `Calibration` takes.
        weights: Format of weights by which layers are ranked.
        activations: Format of activations by which layers are ranked.
        exclude: Globs on node names and operator types that stay in float.
        target: What the model is to run on; None: ort-cpu.
        measure: Measure on data, too: formats of one layer at a time, all else in float, or one
            layer at a time in float, all else quantized.
        metric: A measure of one's own beside the error of the outputs: a function of an iterator
            over the outputs of each sample, greater is better.
        trial_samples: Measure on at most so many samples.
        executor: Runs what is measured side by side; None: threads.
        compression: Tell of each layer what it may become by compression, too, and what that does
            to the outputs.
        limit: Use at most so many samples.
        preprocess: Preset or TOML file that turns pictures into inputs.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        resume: A folder where what is measured of finished layers is kept, and taken up again.
        seed: Seed of every random choice.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Raises:
        OnnxqError: Anything that the user can mend.
    """
    weights, activations = _canonical(weights, activations)
    if metric is not None and measure is None:
        raise RecipeError("a metric is given, and nothing is measured", fix="say what: measure=")
    before = load(source)
    if api.is_quantized(before):
        raise ModelError(
            "the model is quantized already", where=before.path, fix="give the float model"
        )
    session = api.check_loads(before)
    ctx = Context(
        api.calibration(calib, limit, preprocess, strict),
        seed=seed,
        target=target or "ort-cpu",
        threads=threads,
        progress=progress,
        resume=resume,
    )
    clock = _Clock()
    step = Calibrate(weights=weights, activations=activations, exclude=tuple(exclude))
    model = before.clone()
    with announced(ctx.progress.say):
        with clock("calibration"):
            known = calibrate(model, ctx, step)
        with clock("expected effects"):
            every = _with(weights, WEIGHTS), _with(activations, ACTIVATIONS)
            expected = expect(known, ctx, *every, seed)
        feeds = [*ctx.spread(session, max(trial_samples, FLOW_SAMPLES))]
        written = simulated(_corrected(model, expected), ctx.target)
        with clock("error along the graph"):
            flow = _flow(model, written, feeds[:FLOW_SAMPLES], ctx)
        layers = layer_findings(known, expected, feeds[0], ctx.progress, (weights, activations))
        if measure is not None and expected.encodings:
            with clock("measured"):
                trials = _Trials(model, expected, feeds[:trial_samples], ctx, metric, executor)
                if measure == "one-at-a-time":
                    layers = trials.one_at_a_time(layers)
                else:
                    layers = trials.all_but_one(layers, written)
        smaller = Compressible()
        if compression:
            with clock("compression"):
                smaller = compressible(model, ctx, expected.unfit, seed)
            layers = smaller.put(layers)
    layers = explained(
        with_shares(layers, weights, activations),
        weights,
        activations,
        depthwise=LayerFormat("depthwise", Format.parse(weights)).layers(model),
        unknown=expected.unknown,
        command=_command(before, calib, weights, activations, exclude),
    )
    gone = {n.name for n in before.graph.nodes} - {n.name for n in model.graph.nodes}
    lost = [x.name for x in before.layers() if x.name in gone]
    notes = [*before.notes, *ctx.finish().notes, *expected.notes]
    if lost:
        notes.append(f"no output needs them: {', '.join(lost)}")
    notes += [f"tensor {name}: {what}" for name, what in known.broken.items()]
    samples = expected.samples | {"error along the graph": len(feeds[:FLOW_SAMPLES])}
    samples |= smaller.samples
    if measure is not None:
        samples["measured"] = len(feeds[:trial_samples])
    return Analysis(
        model=_facts(before, session),
        versions={"onnxq": __version__, **versions()},
        recipe=recipe.dumps(Recipe(name="analyze", target=ctx.target.name, passes=known.passes)),
        weights=weights,
        activations=activations,
        samples=samples,
        layers=layers,
        tensors=flow,
        totals=totals(layers) | _expected_error(layers, weights, activations),
        agreement=agreement(layers),
        seconds=clock.seconds,
        notes=list(dict.fromkeys(notes)),
    )


def _canonical(weights: str, activations: str) -> tuple[str, str]:
    """The formats by which layers are ranked, as the table names them."""
    formats = [Format.parse(text) for text in (weights, activations)]
    for what, wanted in zip(("weights", "activations"), formats, strict=True):
        if wanted.dtype == "float" or wanted.granularity == "block":
            raise RecipeError(
                f"{what}: layers are not ranked by {wanted}",
                fix="take int8/channel or the like for weights, uint8 for activations",
            )
    return f"{formats[0].dtype}/{formats[0].granularity}", str(formats[1])


def _with(own: str, others: Sequence[str]) -> list[str]:
    """Formats, one's own in front."""
    return list(dict.fromkeys((own, *others)))


class _Clock:
    """Wall time of the parts of a run, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - start, 3)


class _Trials:
    """What is measured of the layers whose rounding is known.

    Args:
        model: The model, encodings in place.
        expected: How layers are rounded.
        feeds: What to run it on.
        ctx: Threads, progress, and where finished layers are kept.
        metric: The caller's measure.
        executor: Runs layers side by side.
    """

    def __init__(
        self,
        model: Model,
        expected: Expected,
        feeds: Sequence[Mapping[str, np.ndarray]],
        ctx: Context,
        metric: Metric | None,
        executor: Executor | None,
    ) -> None:
        self._model, self._expected, self._feeds = model, expected, feeds
        self._given: dict[str, Any] = {
            "metric": metric,
            "executor": executor,
            "threads": ctx.threads,
            "resume": ctx.resume,
            "progress": ctx.progress,
        }

    def one_at_a_time(self, layers: Sequence[LayerFindings]) -> list[LayerFindings]:
        """The layers with what each format does to the outputs."""
        names: dict[str, Key] = {}
        trials: dict[str, list[Trial]] = {}
        for layer, encodings in self._expected.encodings.items():
            for key, encoding in encodings.items():
                name = " ".join(key)
                names[name] = key
                weight, activation = (encoding if key[0] == p else None for p in PARTS)
                trials.setdefault(layer, []).append(Trial(name, weight, activation))
        means = self._expected.means
        found = one_at_a_time(self._model, trials, self._feeds, means=means, **self._given)
        outcomes = {n: {names[k]: o for k, o in row.items()} for n, row in found.items()}
        return measured(layers, outcomes)

    def all_but_one(self, layers: Sequence[LayerFindings], written: Model) -> list[LayerFindings]:
        """The layers with the error that is left where they alone stay in float."""
        names = [*self._expected.encodings]
        found = all_but_one(self._model, written, names, self._feeds, **self._given)
        return [
            dataclasses.replace(
                layer,
                left_in_float=found[layer.name].effect,
                left_in_float_metric=found[layer.name].metric,
            )
            if layer.name in found
            else layer
            for layer in layers
        ]


def _corrected(model: Model, expected: Expected) -> Model:
    """A copy of the model with biases corrected for the rounding of weights to nearest."""
    copy = model.clone()
    for layer in copy.layers():
        encoding, mean = layer.weight_encoding, expected.means.get(layer.name)
        if encoding is not None and mean is not None and takes_bias(layer):
            correct_bias(layer, rows_of(layer, encoding.fake_quantize(layer.weight)), mean)
    return copy


def _flow(
    model: Model, written: Model, feeds: Sequence[Mapping[str, np.ndarray]], ctx: Context
) -> list[TensorFindings]:
    with ctx.progress.task("error along the graph", len(feeds)) as advance:
        threads = min(ctx.threads, cores()) or cores()
        return error_flow(model, written, feeds, threads=threads, progress=advance)


def _facts(model: Model, session: Session) -> dict[str, Any]:
    operators: dict[str, int] = {}
    for node in model.graph.nodes:
        operators[node.op] = operators.get(node.op, 0) + 1
    return {
        "name": model.graph.name if model.path is None else model.path.name,
        "opset": model.opset,
        "inputs": [str(i) for i in session.inputs],
        "outputs": [str(o) for o in session.outputs],
        "output_names": model.outputs,
        "operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
        "bytes": model.nbytes,
        "sha256": model.digest(),
    }


def _expected_error(
    layers: Sequence[LayerFindings], weights: str, activations: str
) -> dict[str, float | None]:
    """The error of the outputs if all layers are in these formats, their noise added up."""
    found = [
        (layer.sensitivity("weights", weights), layer.sensitivity("activations", activations))
        for layer in layers
    ]
    known = [s.effect for pair in found for s in pair if s is not None and s.effect is not None]
    effect = sum(known) if known else None
    return {"effect": effect, "sqnr_db": decibel(effect)}


def _command(
    model: Model, calib: Any, weights: str, activations: str, exclude: Sequence[str]
) -> list[str]:
    """The words of the command that quantizes the model as it is ranked."""
    source = "MODEL" if model.path is None else str(model.path)
    out = "OUT" if model.path is None else f"{model.path.stem}.int8.onnx"
    samples = str(calib) if isinstance(calib, (str, os.PathLike)) else "PATH"
    found = ["onnxq", "quantize", source, out, "--calib", samples]
    if weights != WEIGHTS[1]:
        found += ["--weights", weights]
    if activations != ACTIVATIONS[0]:
        found += ["--activations", activations]
    for glob in exclude:
        found += ["--exclude", glob]
    return found
