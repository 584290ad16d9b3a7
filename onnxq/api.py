"""Runs over a model as typed functions, and what the verbs share."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import recipe, report_page
from onnxq.analysis import cost, error, fusion
from onnxq.analysis.storage import storage
from onnxq.analysis.weight_ranges import WeightRanges
from onnxq.calibration import Calibration, Samples
from onnxq.encoding import Format
from onnxq.errors import CalibrationError, ModelError, OnnxqError, RecipeError
from onnxq.healthy import check_constants
from onnxq.kernels._jit import announced
from onnxq.model import Model, load
from onnxq.model_io import external_files, file_bytes
from onnxq.pass_manager import After, Changes, Context, Pass, PassManager
from onnxq.passes import (
    PASSES,
    Calibrate,
    Clean,
    CrossLayerEqualization,
    FoldBatchNorm,
    FoldDeadChannels,
    HighBiasAbsorption,
    LoadEncodings,
    NoiseEqualization,
)
from onnxq.pictures import Preprocess
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.runtime import Session, versions
from onnxq.statistics import Statistics
from onnxq.synthetic import synthesize
from onnxq.targets import Target
from onnxq.version import __version__

__all__ = [
    "calibration",
    "check_loads",
    "check_outputs",
    "equalize_model",
    "is_quantized",
    "quantize",
    "run",
]

# Samples that are made up where there are none; fewer where batch normalization tells most of it.
SYNTHETIC_SAMPLES, SYNTHETIC_SAMPLES_BESIDE_NORMS = 32, 6
# Samples on which float and quantized outputs are compared at the end of a run.
CHECK_SAMPLES = 32
# Operators of models that are quantized already.
_QUANTIZED = re.compile("(Quantize|Dequantize)Linear|DynamicQuantize.*|QLinear.*|.+Integer")


def quantize(
    source: str | os.PathLike[str] | Model,
    destination: str | os.PathLike[str] | None = None,
    calib: Any = None,
    *,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    target: str | Target | None = None,
    weights: str | None = None,
    activations: str | None = None,
    formats: Sequence[str] = (),
    method: str | None = None,
    exclude: Sequence[str] = (),
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    encodings: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    data_free: bool = False,
    report: str | os.PathLike[str] | None = None,
    budget_s: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Quantize a float model to integers.

    Args:
        source: The float model; never changed.
        destination: Where the Q/DQ model is written, whole or not at all; None: nowhere.
        calib: Calibration samples in any form that `Calibration` takes.
        recipe: Name or file of the passes to run; None: default; weight-only if activations are
            float, weight-only-nearest if there are no samples either; per-tensor if that is the
            granularity of the weights; data-free where there are no samples.
        target: What the model is to run on; None: the recipe's.
        weights: Format of weights, such as int8/channel; None: the recipe's, or the target's.
        activations: Format of activations, such as uint8, or float; None: the recipe's, or the
            target's.
        formats: Formats of the weights of some layers, such as ``first=int8/channel``, see the pass
            `Calibrate`.
        method: How activation ranges are chosen; None: the recipe's.
        exclude: Globs on node names and operator types that stay in float.
        limit: Use at most so many samples.
        preprocess: Preset or TOML file that turns pictures into inputs.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        encodings: Encodings to use instead of calibrating; they choose formats and ranges, so that
            weights, activations, formats and method must be left out.
        statistics: A file in which calibration statistics are kept for the next run.
        data_free: Make samples up instead of reading any, see `onnxq.synthetic`.
        report: A file for the report as a page (HTML).
        budget_s: Seconds that passes which search may take; None: as long as it takes.
        resume: A folder where such passes keep what is finished, and take it up again.
        seed: Seed of every random choice.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Returns:
        The quantized model, and the report with its measured facts.

    Raises:
        OnnxqError: Anything that the user can mend.
    """
    if encodings is not None:
        _check_free(weights=weights, activations=activations, formats=formats, method=method)
    if recipe is None:
        samples = calib is not None or data_free
        recipe = _fitting_recipe(weights, activations, samples=samples, data_free=data_free)
    chosen = _recipe(recipe)
    wanted = {"weights": weights, "activations": activations, "method": method}
    given: dict[str, Any] = {k: v for k, v in wanted.items() if v is not None}
    given |= {k: tuple(v) for k, v in (("formats", formats), ("exclude", exclude)) if v}
    steps = _with_options(chosen.passes, given)
    if encodings is not None:
        steps = _with_encodings(steps, Path(encodings), tuple(exclude))
    return run(
        dataclasses.replace(chosen, passes=steps),
        source,
        destination,
        calib,
        target=target,
        limit=limit,
        preprocess=preprocess,
        strict=strict,
        statistics=statistics,
        data_free=data_free,
        report=report,
        budget_s=budget_s,
        resume=resume,
        seed=seed,
        threads=threads,
        progress=progress,
    )


def run(
    recipe: str | os.PathLike[str] | Recipe,
    source: str | os.PathLike[str] | Model,
    destination: str | os.PathLike[str] | None = None,
    calib: Any = None,
    *,
    target: str | Target | None = None,
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    statistics: str | os.PathLike[str] | None = None,
    data_free: bool = False,
    report: str | os.PathLike[str] | None = None,
    budget_s: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Run any recipe; the arguments are those of `quantize`."""
    chosen = _recipe(recipe)
    check_outputs([destination, statistics, report], models=[source], others=[calib])
    if report is not None:
        report_page.check_installed()
    before = load(source)
    if is_quantized(before):
        raise ModelError(
            "the model is quantized already", where=before.path, fix="give the float model"
        )
    check_loads(before)
    check_constants(before, {layer.name for layer in before.layers()})
    if data_free:
        if calib is not None:
            raise CalibrationError("samples are given, and none are wanted", fix="choose one")
        norms = any(n.op == "BatchNormalization" for n in before.graph.nodes)
        made = synthesize(
            before,
            count=limit or (SYNTHETIC_SAMPLES_BESIDE_NORMS if norms else SYNTHETIC_SAMPLES),
            seed=seed,
            preprocess=preprocess,
            threads=threads,
            progress=progress,
        )
        data: Calibration | None = Calibration(made)
    else:
        data = None if calib is None else calibration(calib, limit, preprocess, strict)
    kept = None if statistics is None else Path(statistics)
    ctx = Context(
        data,
        seed=seed,
        target=target or chosen.target or "ort-cpu",
        threads=threads,
        progress=progress,
        statistics=_known_statistics(kept, before),
        budget_s=budget_s,
        resume=resume,
    )
    after = before.clone()
    ranges = WeightRanges(before)
    watch = None if report is None else report_page.Watch(before)
    manager = PassManager(*chosen.passes, after=_watch([ranges, watch], chosen.passes))
    with announced(ctx.progress.say):
        manager.apply(after, ctx)
    result = ctx.report
    result.notes[:0] = after.notes
    after.set_metadata("onnxq.version", __version__)
    after.set_metadata("onnxq.recipe", _dumps(chosen, ctx.target))
    _measure(result, before, after, ctx)
    ctx.finish()
    layers = ranges.finish(after)
    result.facts["weights"] = [layer.to_dict() for layer in layers]
    if kept is not None and ctx.observed is not None and not kept.exists():
        ctx.observed.metadata["model"] = before.digest()
        ctx.observed.save(kept)
    if destination is not None:
        after.save(destination)
        result.facts["bytes"]["after"] = file_bytes(Path(destination))
    if report is not None and watch is not None:
        title = before.path.name if before.path is not None else before.graph.name
        text = after.metadata["onnxq.recipe"]
        seen = watch.finish(after, ctx.observed)
        found = report_page.of_run(title, result, layers, text, seed, seen)
        report_page.write(Path(report), found)
    return after, result


def equalize_model(
    source: str | os.PathLike[str] | Model, calib: Any = None, **context: Any
) -> tuple[Model, Report]:
    """Even out the channels of a model: fold, equalize, absorb; the function stays the same.

    BatchNormalization is folded, dead channels are cleared away, neighbouring layers equalized,
    and high biases absorbed: what has to be done to a model before weights with one scale per
    tensor can be accurate.

    Args:
        source: The float model; never changed.
        calib: Samples, in any form that `Calibration` takes; None: by batch normalization alone.
        **context: Further arguments of `Context` (seed, threads, progress).

    Returns:
        The float model with even channels, and the report of what was done and declined.

    Raises:
        OnnxqError: Anything that the user can mend.

    Source: Nagel et al. 2019 (arXiv 1906.04721).
    """
    steps = PassManager(
        Clean(),
        FoldBatchNorm(standalone="conv"),
        FoldDeadChannels(),
        CrossLayerEqualization(),
        HighBiasAbsorption(),
    )
    return steps(source, calib, **context)


def check_outputs(
    outputs: Iterable[str | os.PathLike[str] | None],
    *,
    models: Iterable[Any],
    others: Iterable[Any] = (),
) -> None:
    """Refuse outputs that cannot be written, or would replace an input, before work is done.

    Args:
        outputs: What is to be written; None for nothing.
        models: Models that are read; what is no path does not matter.
        others: What else is read.

    Raises:
        OnnxqError: Names the output, and why not.
    """
    sources = [Path(m) for m in models if isinstance(m, (str, os.PathLike))]
    given = [*sources, *(Path(o) for o in others if isinstance(o, (str, os.PathLike)))]
    paths = [Path(o) for o in outputs if o is not None]
    for index, path in enumerate(paths):
        try:
            _check_output(path)
            taken = [p for p in given if path.exists() and os.path.exists(p) and path.samefile(p)]
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            raise OnnxqError(
                f"cannot be written: {error.strerror}", where=path, fix="write to another file"
            ) from error
        if taken:
            raise OnnxqError("is the input", where=path, fix="write to another file")
        if path.exists() and any(path.resolve() in external_files(p) for p in sources):
            raise OnnxqError("holds weights of the input", where=path, fix="write to another file")
        if path.resolve() in [p.resolve() for p in paths[:index]]:
            raise OnnxqError("is given for two outputs", where=path, fix="name another file")


def check_loads(model: Model) -> Session:
    """Let onnxruntime refuse a model before anything else stumbles over it.

    Returns:
        The session, nothing optimized.

    Raises:
        ModelError: It does.
    """
    try:
        return Session(model.to_proto(), threads=1, level="disabled")
    except ModelError as error:
        raise ModelError(error.what, where=model.path, fix=error.fix) from error


def calibration(
    source: Any,
    limit: int | None,
    preprocess: str | os.PathLike[str] | Preprocess | None,
    strict: bool = False,
) -> Calibration:
    """Samples, unless they are `Calibration` already."""
    if isinstance(source, Calibration):
        return source
    return Calibration(source, limit=limit, preprocess=preprocess, strict=strict)


def is_quantized(model: Model) -> bool:
    """Whether a model has operators of quantized ones."""
    return any(_QUANTIZED.fullmatch(n.op) for n in model.graph.nodes)


# ---------------------------------------------------------------------- parts


def _fitting_recipe(
    weights: str | None, activations: str | None, *, samples: bool, data_free: bool
) -> str:
    """The name of the recipe for the formats that are wanted."""
    if activations is not None and Format.parse(activations).dtype == "float":
        return "weight-only" if samples else "weight-only-nearest"
    if data_free:
        return "data-free"
    wanted = None if weights is None else Format.parse(weights)
    if wanted is not None and wanted.granularity == "tensor":
        return "per-tensor"
    return "accurate" if wanted is not None and wanted.bits < 8 else "default"


def _recipe(given: str | os.PathLike[str] | Recipe) -> Recipe:
    return given if isinstance(given, Recipe) else recipe.load(given)


def _with_options(steps: Sequence[Pass], given: Mapping[str, Any]) -> tuple[Pass, ...]:
    """Give options to the Calibrate pass of a recipe, and formats to those that foresee them."""
    if not given:
        return tuple(steps)
    if not any(isinstance(s, Calibrate) for s in steps):
        raise RecipeError(
            f"the recipe has no pass calibrate to take {', '.join(given)}", fix="edit the recipe"
        )
    foreseen = {k: v for k, v in given.items() if k in ("weights", "activations")}

    def told(step: Pass) -> Pass:
        if isinstance(step, Calibrate):
            return dataclasses.replace(step, **given)
        if isinstance(step, NoiseEqualization):
            return dataclasses.replace(step, **foreseen)
        return step

    return tuple(map(told, steps))


def _check_free(**given: Any) -> None:
    """Refuse options that choose formats or ranges where encodings are given, which have both."""
    chosen = [name for name, value in given.items() if value]
    if chosen:
        raise RecipeError(
            f"encodings are given, and say themselves what {' and '.join(chosen)} would choose",
            fix="leave out the one or the other",
        )


def _with_encodings(
    steps: Sequence[Pass], path: Path, exclude: tuple[str, ...]
) -> tuple[Pass, ...]:
    load = LoadEncodings(path=str(path), exclude=exclude)
    return tuple(load if isinstance(s, Calibrate) else s for s in steps)


def _watch(
    watched: Sequence[WeightRanges | report_page.Watch | None], steps: Sequence[Pass]
) -> After:
    """What is watched starts with BatchNormalization in the weights, ends before the integers."""
    folds = next((s for s in steps if isinstance(s, FoldBatchNorm)), None)
    known: list[WeightRanges | report_page.Watch] = [w for w in watched if w is not None]

    def after(step: Pass, model: Model, _: Changes) -> None:
        for each in known:
            if step is folds:
                each.start(model)
            else:
                each.see(model)

    return after


def _dumps(chosen: Recipe, target: Target) -> str:
    """The recipe as it was run; passes of the caller's own are no more than named."""
    kinds = {id(p): PASSES.get(p.name, "").rpartition(":")[2] for p in chosen.passes}
    known = tuple(p for p in chosen.passes if type(p).__name__ == kinds[id(p)])
    text = recipe.dumps(dataclasses.replace(chosen, target=target.name, passes=known))
    own = [p.name for p in chosen.passes if not any(p is k for k in known)]
    return text + (f"\n# and passes that onnxq does not name: {', '.join(own)}\n" if own else "")


def _check_output(path: Path) -> None:
    folder = path.parent
    if path.is_dir():
        raise OnnxqError("is a folder", where=path, fix="give a file name")
    if path.exists() and not path.is_file():  # /dev/null, say: renaming onto it would replace it
        raise OnnxqError("is not a file", where=path, fix="give a file name")
    if not folder.is_dir():
        raise OnnxqError("no such folder", where=folder, fix="create it first")
    if not os.access(folder, os.W_OK):
        raise OnnxqError("the folder cannot be written to", where=folder, fix="take another one")


def _known_statistics(path: Path | None, model: Model) -> Statistics | None:
    if path is None or not path.exists():
        return None
    known = Statistics.load(path)
    if known.metadata.get("model") != model.digest():
        raise OnnxqError(
            "the statistics belong to another model", where=path, fix="delete the file"
        )
    return known


def _measure(report: Report, before: Model, after: Model, ctx: Context) -> None:
    """What the run achieved, measured: bytes, share of MACs in integers, output error."""
    size = before.nbytes if before.path is None else file_bytes(before.path)
    report.facts["bytes"] = {"before": size, "after": after.nbytes}
    report.facts["versions"] = versions()
    report.facts["seconds"] = round(report.seconds, 3)
    samples = None if ctx.data is None else ctx.samples(before)
    feed = None if samples is None else next(iter(samples))
    shapes = cost.tensor_shapes(before, feed if feed is not None else {})
    report.facts["target"] = ctx.target.name
    if ctx.target.cpu:
        share = fusion.integer_share(after, shapes, arm=ctx.target.arm)
    else:
        share = fusion.written_share(after, ctx.target, shapes)
        report.notes.append(
            f"integers are told by the contract of {ctx.target.name}; outputs are those of"
            " onnxruntime's CPU provider"
        )
    report.facts["integers"] = share.to_dict()
    report.facts["storage"] = [s.to_dict() for s in storage(after)]
    if samples is not None:
        pair = [Session(m.to_proto(), threads=ctx.threads) for m in (before, after)]
        total = None if samples.length is None else min(samples.length, CHECK_SAMPLES)
        with ctx.progress.task("check", total) as advance:
            errors = error.compare(pair[0], pair[1], _first(samples), advance)
        report.facts["outputs"] = [e.to_dict() for e in errors]


def _first(samples: Samples) -> Iterator[dict[str, np.ndarray]]:
    return islice(iter(samples), CHECK_SAMPLES)
