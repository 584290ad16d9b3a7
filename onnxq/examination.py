"""Examine a model: what of it runs in integers, what does not, why, and how to mend it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.analysis import cost, error
from onnxq.analysis.breaches import breaches
from onnxq.analysis.faults import Fault, faults
from onnxq.analysis.measurement import Measurement, measure
from onnxq.analysis.prediction import Prediction, float_work, predict
from onnxq.analysis.qdq import dequantize_before, grid_of, is_qdq
from onnxq.analysis.saturation import Saturation, saturation
from onnxq.analysis.storage import storage
from onnxq.api import calibration, check_loads, is_quantized
from onnxq.calibration import Calibration
from onnxq.diagnosis import Agreement, Diagnosis, Kind, Mended, NodeState, View
from onnxq.errors import CalibrationError, ModelError
from onnxq.mending import Mend, mend
from onnxq.model import Model, is_standard, load
from onnxq.pass_manager import Context
from onnxq.placement import place
from onnxq.progress import Progress, Silent
from onnxq.runtime import Level, Session, versions
from onnxq.synthetic import synthesize
from onnxq.targets import Target, target_named

__all__ = ["SAMPLES", "doctor"]

# Samples on which levels of optimization are compared unless told otherwise.
SAMPLES = 4
LEVELS: tuple[Level, ...] = ("extended", "all")


def doctor(
    source: str | os.PathLike[str] | Model,
    *,
    target: str | Target = "ort-cpu",
    data: Any = None,
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    fix: str | os.PathLike[str] | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Tell what of a model runs in integers, what does not, why, and how to mend it.

    Args:
        source: A model in Q/DQ or QOperator form, as any tool writes it; never changed. Of a float
            model it is told what would run in integers.
        target: What is to run the model.
        data: Samples to compare levels of optimization on, in any form that `Calibration` takes;
            None: made up.
        limit: Use at most so many of them; None: `SAMPLES`.
        preprocess: Preset or TOML file that turns pictures into inputs.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        shapes: Concrete shapes of dynamic inputs, for MACs.
        fix: Where to write a copy that is mended where that is safe; None writes none. Nothing is
            written if there is nothing to mend.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Raises:
        OnnxqError: A model or a sample cannot be read; the target is not known.
    """
    contract, progress = target_named(target), progress or Silent()
    model = load(source)
    session = _session(model)
    notes = [*model.notes]
    model.infer()
    kind = _kind(model)
    count = SAMPLES if limit is None else limit
    samples = None if data is None else calibration(data, count, preprocess, strict).limited(count)
    feeds = _feeds(model, session, samples, count, preprocess, notes)
    macs = _macs(model, {**(feeds[0] if feeds else {}), **(shapes or {})})
    pairs: list[Saturation] = []
    if kind == "float":
        views = [View("planned", _planned(model, contract, macs), {})]
        wrong: list[Fault] = []
        agreement: list[Agreement] = []
    else:
        with progress.task("read onnxruntime's graphs", None):
            both = [predict(model, arm=arm) for arm in (False, True)]
            views = [
                _view(model, found, macs, arm=arm, notes=notes)
                for arm, found in zip((False, True), both, strict=True)
            ]
        wrong = faults(model, [*both[0], *both[1]]) if kind == "Q/DQ" else []
        if views[0].operators:
            wrong = [f for f in wrong if f.code != "unloadable"]  # it is loaded after all
        if kind == "Q/DQ":
            wrong = [*breaches(model, contract), *wrong]
        sound = kind == "Q/DQ" and all(f.severity != "error" for f in wrong)
        if sound and data is not None:
            with progress.task("look for overflows", None):
                pairs = saturation(
                    model, lambda _: feeds, rng=np.random.default_rng(0), threads=threads
                )
            wrong = [*_overflows(pairs), *(f for f in wrong if f.code != "saturation")]
        with progress.task("compare levels of optimization", None):
            agreement = [
                _agreement(model, session, level, feeds, threads) for level in LEVELS if feeds
            ]
    mends: list[Mend] = []
    mended: Mended | None = None
    if fix is not None:
        copy = model.clone()
        mends = mend(copy) if kind == "Q/DQ" else []
        if mends:
            mended = _write(copy, mends, Path(fix), session, feeds, macs)
        else:
            notes.append(f"there is nothing that is safe to mend: {fix} is not written")
    return Diagnosis(
        path=str(model.path or ""),
        target=contract.name,
        kind=kind,
        opset=model.opset,
        runtime=versions()["onnxruntime"],
        bytes=model.nbytes,
        storage=[str(s) for s in storage(model)],
        views=views,
        faults=wrong,
        agreement=agreement,
        saturation=pairs,
        samples=len(feeds),
        samples_made_up=data is None,
        mends=mends,
        mended=mended,
        notes=notes,
    )


def _overflows(pairs: Sequence[Saturation]) -> Iterator[Fault]:
    """What the samples showed of sums of two products in 16 bits, worst first."""
    for found in sorted(pairs, key=lambda s: -s.noise):
        if found.possible:
            yield Fault(
                "saturation",
                "warning" if found.overflows else "note",
                found.name,
                f"on x86-64 without VNNI {found}",
                "for such processors quantize with --target ort-x64-avx2",
            )


def _feeds(
    model: Model,
    session: Session,
    samples: Calibration | None,
    count: int,
    preprocess: Any,
    notes: list[str],
) -> list[dict[str, np.ndarray]]:
    """Samples, given or made up; none, and a note, where none can be made up."""
    threads = session.threads
    if samples is None:
        try:
            made = synthesize(model, count=count, preprocess=preprocess, threads=threads)
        except CalibrationError as problem:
            notes.append(f"numbers are not compared, give samples (--data): {problem.what}")
            return []
        samples = calibration(made, count, None)
    feeds = [*islice(iter(Context(samples, threads=threads).spread(session, 0)), count)]
    notes += [samples.skip_note] if samples.skip_note is not None else []
    return feeds


def _session(model: Model) -> Session:
    """A session with nothing optimized.

    Raises:
        ModelError: onnxruntime does not load the model; operators that it does not have are named.
    """
    try:
        return check_loads(model)
    except ModelError as problem:
        functions = {(f.domain, f.name) for f in model.graph.functions}
        for node in model.graph.nodes:
            own = is_standard(node) or str(node.domain).startswith(("ai.onnx", "com.microsoft"))
            if not own and (node.domain, node.op) not in functions:
                raise ModelError(
                    f"{node.name} is {node.domain}.{node.op}, which onnxruntime does not have",
                    where=model.path,
                    fix="give the model without custom operators: nothing can be told of it",
                ) from problem
        raise


def _kind(model: Model) -> Kind:
    if any(is_qdq(n) for n in model.graph.nodes) and not any(
        n.op.startswith("QLinear") for n in model.graph.nodes
    ):
        return "Q/DQ"
    return "QOperator" if is_quantized(model) else "float"


def _macs(model: Model, given: Mapping[str, Any]) -> dict[str, int | None]:
    return {c.name: c.macs for c in cost.layer_costs(model, cost.tensor_shapes(model, given))}


def _view(
    model: Model,
    predictions: Sequence[Prediction],
    macs: Mapping[str, int | None],
    *,
    arm: bool,
    notes: list[str],
) -> View:
    name = "ARM" if arm else "x86-64"
    measured = Measurement({}, {})
    try:
        measured = measure(model, arm=arm)
    except ModelError as problem:
        notes.append(f"optimized for {name}, the model does not load: {problem.what}")
    states = []
    for p in predictions:
        became = measured.nodes.get(p.name)
        is_float = p.integer is False or (became is not None and became.integer is False)
        why = p.why if is_float else None
        states.append(
            NodeState(
                name=p.name,
                op=p.op,
                macs=macs.get(p.name, 0),
                predicted=p.integer,
                measured=None if became is None else became.integer,
                kernel=p.kernel if became is None else became.kernel,
                code="" if why is None else why.code,
                reason="" if why is None else why.reason,
                mend="" if why is None else why.mend,
            )
        )
    return View(name, states, measured.operators)


def _planned(model: Model, target: Target, macs: Mapping[str, int | None]) -> list[NodeState]:
    """What would run in integers if a float model were quantized."""
    model = model.clone()
    plan = place(model, target)
    states = []
    for node in float_work(model):
        integer = node.name in plan.nodes
        why = plan.float_nodes.get(node.name, "")
        if not integer and not why:  # taken over by the node before it
            integer = True
        states.append(
            NodeState(
                name=node.name,
                op=node.op,
                macs=macs.get(node.name, 0),
                predicted=integer,
                measured=None,
                kernel=node.op,
                code="planned" if why else "",
                reason=why,
            )
        )
    return states


def _agreement(
    model: Model,
    reference: Session,
    level: Level,
    feeds: Sequence[Mapping[str, np.ndarray]],
    threads: int,
) -> Agreement:
    try:
        session = Session(model.to_proto(), threads=threads, level=level)
        outputs = error.compare(reference, session, feeds)
    except (ModelError, CalibrationError) as problem:
        return Agreement(level, failure=problem.what)
    steps = {}
    for output, tensor in zip(outputs, model.graph.outputs, strict=False):
        before = dequantize_before(tensor)
        point = None if before is None else grid_of(model, before).point
        if point is not None and output.max_abs_error is not None and point[0] > 0:
            steps[output.name] = output.max_abs_error / point[0]
    return Agreement(level, outputs, steps)


def _write(
    copy: Model,
    mends: Sequence[Mend],
    path: Path,
    reference: Session,
    feeds: Sequence[Mapping[str, np.ndarray]],
    macs: Mapping[str, int | None],
) -> Mended:
    """Write a mended copy, once it computes what the model does.

    Raises:
        ModelError: It does not, though every mend was to keep every bit.
    """
    other = Session(copy.to_proto(), threads=reference.threads, level="disabled")
    outputs = error.compare(reference, other, feeds) if feeds else []
    if all(m.keeps == "every bit" for m in mends):
        for output in outputs:
            if output.max_abs_error or output.equal not in (None, 1):
                raise ModelError(
                    f"output {output.name} of the mended copy is not the same",
                    where=path,
                    fix="leave out --fix, and report this model",
                )
    notes: list[str] = []
    copy.infer()
    views = [
        _view(copy, predict(copy, arm=arm), macs, arm=arm, notes=notes) for arm in (False, True)
    ]
    copy.save(path)
    return Mended(str(path), views, outputs)
