"""What tests assert about models: the operators, and that two of them compute the same function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxq.model import Model, load
from onnxq.report import Changes
from tests import models

LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def ops(model: Model | onnx.ModelProto) -> list[str]:
    """The operator types in graph order."""
    nodes = model.graph.nodes if isinstance(model, Model) else model.graph.node
    return [node.op if isinstance(model, Model) else node.op_type for node in nodes]


def proto_of(model: Model | onnx.ModelProto) -> onnx.ModelProto:
    """The model as a ModelProto."""
    return model.to_proto() if isinstance(model, Model) else model


def run(
    model: Model | onnx.ModelProto, feed: Mapping[str, np.ndarray], level: str = "disabled"
) -> dict[str, np.ndarray]:
    """The outputs by name, computed by onnxruntime at an optimization level."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto_of(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def assert_same_function(
    before: Model | onnx.ModelProto,
    after: Model | onnx.ModelProto,
    tol: float = 1e-5,
    feed: Mapping[str, np.ndarray] | None = None,
    levels: tuple[str, ...] = ("disabled", "all"),
) -> None:
    """Assert equal outputs, to `tol` of the greatest value or range, at each optimization level."""
    if feed is None:
        feed = models.feeds(proto_of(before))
    wanted = run(before, feed)
    for level in levels:
        got = run(after, feed, level)
        assert got.keys() == wanted.keys()
        for name, array in wanted.items():
            assert got[name].dtype == array.dtype
            assert got[name].shape == array.shape, (level, name)
            if array.dtype.kind == "f" and array.size:
                span = max(float(np.ptp(array)), float(np.abs(array).max()), 1e-6)
                error = np.abs(got[name].astype(np.float64) - array).max()
                assert error <= tol * span, f"{name} at level {level}: {error / span:.2g}"
            else:
                np.testing.assert_array_equal(got[name], array)


def rewrite(
    step: Any, proto: onnx.ModelProto, *, ctx: Any = None, tol: float = 1e-5
) -> tuple[Model, Changes]:
    """Run a pass on a copy of the model and assert what every pass keeps that keeps the function.

    The result is valid ONNX and computes the same; the model it was cloned from is left alone;
    where nothing is reported as changed nothing is; a second run finds nothing more to do.
    """
    given = load(proto)
    untouched = _bytes(given.to_proto())
    model = given.clone()
    changes: Changes = step.apply(model, ctx)
    model.check()
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert _bytes(given.to_proto()) == untouched
    if not changes:
        assert _bytes(after) == untouched
    assert_same_function(proto, after, tol)
    again = step.apply(load(after), ctx)
    assert not again, f"a second run changes more: {again.done}"
    return model, changes


def _bytes(proto: onnx.ModelProto) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]  # shape inference is no change
    return copy.SerializeToString(deterministic=True)


def reasons(changes: Changes) -> dict[str, str]:
    """What was declined: node or tensor -> reason."""
    return {skip.layer: skip.why for skip in changes.skipped}


def pair_sums(
    x: np.ndarray, weight: np.ndarray, *, group: int = 1, pad: int = 0, step: int = 1, zero: int = 0
) -> np.ndarray:
    """The sums of two products that AVX2 adds in 16 bits, before it clips them, [P, O, K / 2].

    As onnxruntime packs a convolution: positions of the window outermost, then input channels.

    Args:
        x: Integers of the input, [N, C, H, W].
        weight: Integers of the weight, [O, C / group, kH, kW].
        group: Groups.
        pad: Padding on each side.
        step: Strides.
        zero: What is padded with.
    """
    wide = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    padded = np.pad(x.astype(np.int64), wide, constant_values=zero)
    outs, each, *size = weight.shape
    found = []
    for n in range(x.shape[0]):
        for i in range(0, padded.shape[2] - size[0] + 1, step):
            for j in range(0, padded.shape[3] - size[1] + 1, step):
                window = padded[n, :, i : i + size[0], j : j + size[1]]
                rows = []
                for o in range(outs):
                    start = o // (outs // group) * each
                    products = [
                        int(window[start + c, a, b]) * int(weight[o, c, a, b])
                        for a in range(size[0])
                        for b in range(size[1])
                        for c in range(each)
                    ]
                    products += [0] * (len(products) % 2)
                    rows.append([a + b for a, b in zip(*[iter(products)] * 2, strict=True)])
                found.append(rows)
    return np.array(found)
