"""Models from a seed: small networks with what exporters and people put into graphs.

Each is a chain of layers and what joins them, with a few oddities: control flow, sequences, text,
functions, names, types, shapes. All are valid ONNX; some hold what onnxruntime does not run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from tests.corpus import oddities
from tests.corpus.builder import Builder

__all__ = ["BOUND_DB", "FINISHES", "ODDITIES", "OPSETS", "graph"]

# Least SQNR of int8 versions: about 20 dB below what a layer has.
BOUND_DB = 5.0
OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24)
ODDITIES, FINISHES = oddities.STEPS + oddities.ENDS, oddities.FINISHES

Step = Callable[[Builder], None]


def graph(
    seed: int,
    *,
    opset: int | None = None,
    dtype: type | None = None,
    odd: tuple[str, ...] | None = None,
    free: bool = True,
) -> onnx.ModelProto:
    """A model from a seed.

    Args:
        seed: Decides about everything that is not given.
        opset: Version of the standard operator set.
        dtype: float32, float64 or float16.
        odd: Names of oddities.
        free: Whether pictures may be of any size.
    """
    rng = np.random.default_rng([seed, 17])
    version = int(rng.choice(OPSETS)) if opset is None else opset
    kinds = [np.float32, np.float64, np.float16]
    kind = kinds[int(rng.choice(3, p=[0.88, 0.06, 0.06]))]
    chosen = rng.choice([s.__name__ for s in ODDITIES], int(rng.integers(1, 5)), replace=False)
    names = {*chosen} if odd is None else {*odd}
    build = Builder(rng, version, kind if dtype is None else dtype)
    _start(build, free=free and "attention" not in names)  # large where pictures are
    extra = [s for s in oddities.STEPS if s.__name__ in names]
    plain = DENSE if build.dtype == np.float64 else PLAIN  # onnxruntime has no Conv of doubles
    steps: list[Step] = [*rng.choice(np.array(plain, object), int(rng.integers(1, 6)))]
    for step in extra:
        steps.insert(int(rng.integers(len(steps) + 1)), step)
    for step in steps:
        step(build)
    _end(build)
    for end in oddities.ENDS:
        if end.__name__ in names:
            end(build)
    model = build.build()
    for finish in FINISHES:
        if rng.random() < 0.12 if odd is None else finish.__name__ in names:
            finish(model, rng)
    return model


def _start(b: Builder, *, free: bool) -> None:
    b.shape = (int(b.rng.choice([1, 2])), int(b.rng.choice([1, 3, 4])), 8, 8)
    shape: list[int | str | None] = list(b.shape)
    how = int(b.rng.integers(6))
    if how < 3:
        shape[0] = (None, "N", "N")[how]
    if how == 2 and free:
        shape[2:] = ["H", "W"]
    b.name = b.input("x", shape, b.kind)


def _end(b: Builder) -> None:
    if b.rng.random() < 0.6:
        how = int(b.rng.integers(3))
        b.apply("GlobalAveragePool")
        features = b.shape[1]
        if how == 0:
            b.apply("Flatten")
            matrix, bias = b.weight((5, features)), b.rng.normal(0, 0.3, 5)
            b.apply("Gemm", b.constant(matrix), b.constant(bias), transB=1)
        elif how == 1:
            b.apply("Reshape", b.ints([0, -1]))
            b.apply("MatMul", b.constant(b.weight((5, features)).T))
            b.apply("Add", b.constant(b.rng.normal(0, 0.3, 5)))
        else:
            b.apply("Flatten")
            b.apply("Gemm", b.constant(b.weight((5, features)).T), b.constant(np.zeros(5)))
            b.apply("Softmax", axis=1)
        b.shape = (b.shape[0], 5)
    b.nodes[-1].output[0] = b.name = "y"
    b.output("y", None)


def _conv(b: Builder) -> None:
    b.conv(int(b.rng.choice([2, 4, 6])), int(b.rng.choice([1, 3])), bias=b.rng.random() < 0.6)


def _conv_relu(b: Builder) -> None:
    _conv(b)
    b.apply("Relu")


def _conv_norm(b: Builder) -> None:
    b.conv(4, bias=False)
    b.norm()
    b.clip(0, 6)


def _depthwise(b: Builder) -> None:
    b.conv(b.shape[1], bias=b.rng.random() < 0.5, group=b.shape[1])


def _residual(b: Builder) -> None:
    before, shape = b.name, b.shape
    b.conv(shape[1])
    b.apply("Relu")
    b.apply("Add", before)


def _gate(b: Builder) -> None:
    b.conv(4)
    b.apply("Mul", b.node("Sigmoid", b.name))


def _branches(b: Builder) -> None:
    source, shape, parts, total = b.name, b.shape, [], 0
    for _ in range(int(b.rng.integers(2, 4))):
        b.name, b.shape = source, shape
        _conv_relu(b)
        parts.append(b.name)
        total += b.shape[1]
    b.name = b.node("Concat", *parts, axis=1)
    b.shape = (shape[0], total, *shape[2:])


def _pool(b: Builder) -> None:
    if min(b.shape[2:]) >= 2:
        op = b.rng.choice(["MaxPool", "AveragePool"])
        b.apply(str(op), kernel_shape=[2, 2], strides=[2, 2])
        b.shape = (*b.shape[:2], *(n // 2 for n in b.shape[2:]))


def _leaky(b: Builder) -> None:
    _conv(b)
    b.apply("LeakyRelu", alpha=0.1)


def _transposed(b: Builder) -> None:
    shape = (b.shape[1], 2, 2, 2)
    b.apply("ConvTranspose", b.constant(b.weight(shape)), kernel_shape=[2, 2], strides=[2, 2])
    b.shape = (b.shape[0], 2, *(2 * n for n in b.shape[2:]))


PLAIN: tuple[Step, ...] = (
    *(_conv, _conv_relu, _conv_relu, _conv_norm, _depthwise, _residual, _gate, _branches),
    *(_pool, _leaky, _transposed),
)


def _dense(b: Builder) -> None:
    b.apply("MatMul", b.constant(b.weight((b.shape[3],) * 2)))
    b.apply("Add", b.constant(b.rng.normal(0, 0.3, b.shape[3])))


def _dense_relu(b: Builder) -> None:
    _dense(b)
    b.apply("Relu")


DENSE: tuple[Step, ...] = (_dense, _dense_relu, _dense_relu)
