"""What a verb makes of a model: a valid one close to float, or one line of error."""

from __future__ import annotations

import hashlib
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import onnxq
from onnxq.errors import OnnxqError, PassError
from onnxq.synthetic import synthesize
from tests.corpus.cases import Case, Feed

__all__ = ["FAILURES", "MORE", "VERBS", "Verdict", "judge"]

Verb = Callable[[Path, Path, "_Reference"], "Verdict"]

# What must not happen.
FAILURES = ("traceback", "invalid", "changed", "diverging", "crashed", "out of time")
# Float models that a pass wrote anew differ by roundings of float32.
FLOAT_DB = 70.0
# What is left out must be less than what stays.
COMPRESSED_DB = 0.0
# Inputs that can be made of zeros.
_NUMBERS = {"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2"}
# Samples made up for a model that comes without.
MADE_UP = 8

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Args:
        outcome: quantized, compressed, told, nothing to quantize, refused, skipped, or one of
            `FAILURES`.
        why: The reason, on one line.
        detail: A traceback.
    """

    outcome: str
    why: str = ""
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES


class _WrongError(Exception):
    """What a model must not be."""

    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(why)
        self.verdict = Verdict(outcome, why)


def judge(case: Case, verb: str, folder: Path) -> Verdict:
    """Run a verb on a model, in an empty folder.

    Args:
        case: The model.
        verb: One of `VERBS`.
        folder: Where files may be written.
    """
    proto = _made(case)
    source = folder / "in.onnx"
    onnx.save(proto, source)
    before = _digests(folder)
    reference = _Reference(source, case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            verdict = (VERBS | MORE)[verb](source, folder / "out.onnx", reference)
    except PassError as error:
        verdict = Verdict("traceback", _line(error), traceback.format_exc())
    except OnnxqError as error:
        verdict = Verdict("refused", str(error))
        if "\n" in str(error) or not str(error).strip():
            verdict = Verdict("traceback", f"not one line: {error!r}")
    except _WrongError as error:
        verdict = error.verdict
    except Exception as error:
        verdict = Verdict("traceback", _line(error), traceback.format_exc())
    if verdict.outcome == "refused" and _broke(verdict.why) and reference.runs():
        verdict = Verdict("invalid", f"onnxruntime runs the model, but: {verdict.why}")
    left = {n: d for n, d in _digests(folder).items() if n != "out.onnx"}
    if left != before:
        verdict = Verdict("changed", f"files before {sorted(before)}, after {sorted(left)}")
    if verdict.outcome == "refused" and (folder / "out.onnx").exists():
        verdict = Verdict("invalid", f"a file is left behind by: {verdict.why}")
    return verdict


def _broke(why: str) -> bool:
    """Whether a model that was right is refused for what was made of it."""
    return any(w in why for w in ("cannot load", "not valid ONNX", "the model failed"))


def _made(case: Case) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case.make()


class _Reference:
    """The float model in onnxruntime alone, and what it is compared on."""

    def __init__(self, source: Path, case: Case) -> None:
        self.case = case
        self.source = source
        self.why = ""
        self.fault = _valid(source)
        proto = onnx.load(source)
        for node in proto.graph.node:  # onnxruntime refuses names that nodes share
            node.name = ""
        if any(o.version < 7 for o in proto.opset_import if o.domain in ("", "ai.onnx")):
            proto = onnx.version_converter.convert_version(proto, 7)
        try:
            self.session = _session(proto.SerializeToString(), LEVELS[0])
        except Exception as error:
            self.session, self.why = None, _line(error)
        self.given = [f for f in case.feeds() if f] if self.session else []
        names = {i.name for i in self.session.get_inputs()} if self.session else set()
        self.given = [{n: a for n, a in f.items() if n in names} for f in self.given]

    def runs(self) -> bool:
        """Whether onnxruntime runs the float model, by itself: it may take one that it cannot run.

        What is not known counts as yes, so that nothing is excused by it.
        """
        if self.session is None:
            return False
        inputs = self.session.get_inputs()
        if not self.given and any(i.type not in _NUMBERS for i in inputs):
            return True
        zeros = {
            i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], _NUMBERS[i.type])
            for i in inputs
            if i.type in _NUMBERS
        }
        try:
            self.session.run(None, self.given[0] if self.given else zeros)
        except Exception as error:  # onnxruntime's exceptions share no other base
            return "2 : INVALID_ARGUMENT" in str(error)[:50]  # of the zeros, not of the model
        return True

    def feeds(self) -> list[Feed]:
        """What models are compared on: the samples that were given, or more that are made up."""
        if self.given:
            return self.given
        if not self.session.get_inputs():
            return [{}]
        return [*synthesize(onnxq.load(self.source), count=MADE_UP + 4)][-4:]


def _quantize(**options: object) -> Verb:
    verb = partial(onnxq.quantize, **options)
    return lambda *given: _written(verb, *given, "quantized")


def _compress(**options: object) -> Verb:
    verb = partial(onnxq.compress, macs=0.9, multiple=1, **options)
    return lambda *given: _written(verb, *given, "compressed")


def _written(
    verb: Callable[..., object],
    source: Path,
    destination: Path,
    reference: _Reference,
    done: str,
) -> Verdict:
    if reference.given or done == "compressed":
        options = {"calib": reference.feeds() if reference.session else [{}]}
    else:
        options = {"data_free": True, "limit": MADE_UP}
    verb(source, destination, threads=1, **options)
    if reference.session is None:
        try:
            _session(destination, LEVELS[1])
        except Exception as error:
            raise _WrongError("invalid", f"written, but does not load: {_line(error)}") from error
        return Verdict("skipped", f"onnxruntime loads only what is written: {reference.why}")
    if (why := _valid(destination)) is not None and why != reference.fault:
        raise _WrongError("invalid", f"onnx.checker: {why}")
    result = onnx.load(destination)
    integers = any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in result.graph.node)
    try:
        feeds = reference.feeds()
        wanted = [_run(reference.session, feed) for feed in feeds]
    except OnnxqError as error:
        return Verdict("skipped", f"not compared: {error}")
    except Exception as error:
        return Verdict("skipped", f"onnxruntime cannot run it: {_line(error)}")
    for level in LEVELS:
        try:
            session = _session(destination, level)
            got = [_run(session, feed) for feed in feeds]
        except Exception as error:
            raise _WrongError("invalid", f"does not run at {level.name}: {_line(error)}") from error
        bound = reference.case.bound_db
        if any(n.op_type == "If" for n in result.graph.node):
            bound = None  # a comparison may fall the other way
        if done == "compressed":
            bound = None if bound is None else COMPRESSED_DB
        elif not integers:
            bound = FLOAT_DB
        _compare(wanted, got, bound, level.name)
    if done == "quantized" and not integers:
        return Verdict("nothing to quantize")
    return Verdict(done)


def _compare(wanted: list[dict], got: list[dict], bound: float | None, level: str) -> None:
    for before, after in zip(wanted, got, strict=True):
        if before.keys() != after.keys():
            raise _WrongError("invalid", f"outputs {[*after]} instead of {[*before]}")
    for name in wanted[0] if wanted else ():
        signal = noise = 0.0
        for before, after in zip(wanted, got, strict=True):
            ref, out = before[name], after[name]
            if type(ref) is not type(out):
                raise _WrongError("invalid", f"{name} is {type(out)} instead of {type(ref)}")
            if not isinstance(ref, np.ndarray):
                if bound == FLOAT_DB and not _equal(ref, out):
                    raise _WrongError("diverging", f"{name} is not equal at {level}")
                continue
            if (ref.dtype, ref.shape) != (out.dtype, out.shape):
                why = f"{name} is {out.dtype}{out.shape} instead of {ref.dtype}{ref.shape}"
                raise _WrongError("invalid", why)
            if ref.dtype.kind not in "fc":
                if bound == FLOAT_DB and not np.array_equal(ref, out):
                    raise _WrongError("diverging", f"{name} is not equal at {level}")
                continue
            x, y = ref.astype(np.complex128).ravel(), out.astype(np.complex128).ravel()
            odd = ~(np.isfinite(x) & np.isfinite(y))
            if odd.any() and not np.array_equal(x[odd], y[odd], equal_nan=True):
                raise _WrongError("diverging", f"{name} is not finite in one of both, {level}")
            x, y = x[~odd], y[~odd]
            signal += float(np.vdot(x, x).real)
            noise += float(np.vdot(x - y, x - y).real)
        if bound is not None and noise > 1e-12:
            sqnr = 10 * np.log10(signal / noise) if signal else -np.inf
            limit = bound
            if wanted[0][name].dtype == np.float16:
                limit = min(bound, 40.0)
            if sqnr < limit:
                raise _WrongError(
                    "diverging", f"{name}: {sqnr:.1f} dB, wanted {limit:g}, at {level}"
                )


def _equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _inspect(source: Path, _: Path, reference: _Reference) -> Verdict:
    onnxq.inspect(source).to_dict()
    return Verdict("told")


def _doctor(source: Path, _: Path, reference: _Reference) -> Verdict:
    onnxq.doctor(source, threads=1).to_dict()
    return Verdict("told")


VERBS: dict[str, Verb] = {
    "inspect": _inspect,
    "doctor": _doctor,
    "quantize": _quantize(),
    "compress": _compress(),
}
# The same with options.
MORE: dict[str, Verb] = {
    "quantize-int4": _quantize(weights="int4/channel"),
    "quantize-tensor": _quantize(weights="int8/tensor"),
    "quantize-block": _quantize(weights="int4/block=32", activations="float"),
    "quantize-qnn": _quantize(target="qnn"),
    "quantize-avx2": _quantize(target="ort-x64-avx2"),
    "quantize-xnnpack": _quantize(target="xnnpack"),
    "compress-channels": _compress(method="channel-pruning"),
}


def _session(path: Path | bytes, level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, feed: Feed) -> dict[str, object]:
    names = [o.name for o in session.get_outputs()]
    found: dict[str, object] = {}
    for name, value in zip(names, session.run(names, feed), strict=True):
        if isinstance(value, list) and all(isinstance(v, np.ndarray) for v in value):
            found |= {f"{name}[{i}]": v for i, v in enumerate(value)}
        else:
            found[name] = value
    return found


def _valid(path: Path) -> str | None:
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        # nodes without a name are given one
        return re.sub(", node name: [^)]*", "", _line(error))[:200]
    return None


def _digests(folder: Path) -> dict[str, str]:
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
        if f.is_file()
    }


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or repr(error)
    return f"{type(error).__name__}: {text}"[:300]


def kind(why: str) -> str:
    """A reason without names and numbers, to count by."""
    text = re.sub(r"\([^()]*\)", "()", why)
    text = re.sub(r"'[^']*'", "'...'", text)
    return re.sub(r"\d+", "N", text)[:110]
