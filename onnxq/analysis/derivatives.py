"""How gradients pass through operators, one rule each.

A rule gets the tape, the node, its attributes and the gradient of each of its outputs (None where
there is none), adds the nodes that it takes, and gives the gradient of each input; or it says why
there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxq import ops
from onnxq.analysis.tape import Rule, Tape

__all__ = ["RULES", "movement"]

Attrs = dict[str, Any]
Given = list[str | None]
Found = Sequence[str | None] | str
# Steps of difference quotients: a share of the value, and the least step.
_STEP, _LEAST_STEP = 1e-2, 1e-4
# Numbers up to this are exact in float32, in which places are counted.
_COUNTABLE = 1 << 24


# ---------------------------------------------------------------------- layers


def _conv(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    (g,) = given
    x, w = node.input[:2]
    if tape.value(w) is None:
        return "its weight is computed"
    spatial, size = tape.shape(x)[2:], tape.shape(w)[2:]
    window = ops.conv_window(attrs, spatial, size)
    begin, end, rest = [], [], []
    for n, k, s, d, b, p in zip(
        spatial, size, window.strides, window.dilations, window.begin, window.positions, strict=True
    ):
        reach = s * (p - 1) + d * (k - 1) + 1 - b  # how far the windows go into the input
        begin.append(b)
        end.append(max(0, reach - n))
        rest.append(max(0, n - reach))
    return [
        tape(
            "ConvTranspose",
            g or "",
            w,
            strides=window.strides,
            dilations=window.dilations,
            group=attrs.get("group", 1),
            pads=[*begin, *end],
            output_padding=rest,
        )
    ]


def _conv_transpose(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    (g,) = given
    x, w = node.input[:2]
    if tape.value(w) is None:
        return "its weight is computed"
    spatial, size = tape.shape(x)[2:], tape.shape(w)[2:]
    window = ops.conv_transpose_window(attrs, spatial, size)
    strides = attrs.get("strides") or [1] * len(spatial)
    begin, end, extra = [], [], False
    for n, k, s, d, b, p in zip(
        spatial, size, strides, window.dilations, window.begin, window.positions, strict=True
    ):
        extent = d * (k - 1) + 1
        cut = extent - 1 - b
        begin.append(cut)
        end.append(max(0, s * (n - 1) + extent - p - cut))
        extra |= (p + cut + end[-1] - extent) // s + 1 != n
    if extra or min(begin, default=0) < 0:
        return "its output is padded further than its windows go"
    return [
        tape(
            "Conv",
            g or "",
            w,
            strides=strides,
            dilations=window.dilations,
            group=attrs.get("group", 1),
            pads=[*begin, *end],
        )
    ]


def _gemm(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    g = given[0] or ""
    a, b = node.input[:2]
    left, right = int(attrs.get("transA", 0)), int(attrs.get("transB", 0))
    alpha = float(attrs.get("alpha", 1.0))
    found: Given = [None, None, None]
    if tape.is_float(a):
        if left:
            found[0] = tape("Gemm", b, g, transA=right, transB=1, alpha=alpha)
        else:
            found[0] = tape("Gemm", g, b, transB=1 - right, alpha=alpha)
    if tape.is_float(b):
        if right:
            found[1] = tape("Gemm", g, a, transA=1, transB=left, alpha=alpha)
        else:
            found[1] = tape("Gemm", a, g, transA=1 - left, alpha=alpha)
    if len(node.input) > 2 and tape.is_float(node.input[2]):
        scaled = tape("Mul", g, tape.constant(float(attrs.get("beta", 1.0))))
        found[2] = tape.reduced(scaled, tape.shape(node.output[0]), tape.shape(node.input[2]))
    return found


def _matmul(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    g = given[0] or ""
    a, b = node.input
    ranks = len(tape.shape(a)), len(tape.shape(b))
    if min(ranks) < 2:
        return "one of its factors is a vector"
    found: Given = [None, None]
    batch = tape.shape(node.output[0])[:-2]
    for index, other, rank in ((0, b, ranks[1]), (1, a, ranks[0])):
        name = node.input[index]
        if tape.is_float(name):
            turned = tape("Transpose", other, perm=[*range(rank - 2), rank - 1, rank - 2])
            product = tape("MatMul", *((g, turned) if index == 0 else (turned, g)))
            shape = (*batch, *tape.shape(name)[-2:])
            found[index] = tape.reduced(product, shape, tape.shape(name))
    return found


# ---------------------------------------------------------------------- value by value


def _function(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    """Any function of single values: by a difference quotient, half of it at a kink."""
    x, *parameters = node.input
    if any(tape.is_float(n) for n in parameters):
        return "its parameters are computed"
    step = tape(
        "Add",
        tape("Mul", tape("Abs", x), tape.constant(_STEP)),
        tape.constant(_LEAST_STEP),
    )
    ends = [tape(op, x, step) for op in ("Add", "Sub")]
    high, low = (tape.copy(node, [end, *parameters]) for end in ends)
    slope = tape("Div", tape("Sub", high, low), tape("Sub", *ends))
    return [tape("Mul", given[0] or "", slope)]


def _rounding(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    return "it is flat between its steps"


def _spread(tape: Tape, node: onnx.NodeProto, part: str | None, index: int) -> str | None:
    """A gradient with the shape of the result, as one of an input that was broadcast."""
    name = node.input[index]
    if part is None or not tape.is_float(name):
        return None
    return tape.reduced(part, tape.shape(node.output[0]), tape.shape(name))


def _add(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    return [_spread(tape, node, given[0], i) for i in range(len(node.input))]


def _mean(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    part = tape("Div", given[0] or "", tape.constant(float(len(node.input))))
    return [_spread(tape, node, part, i) for i in range(len(node.input))]


def _sub(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    g = given[0] or ""
    second = tape("Neg", g) if tape.is_float(node.input[1]) else None
    return [_spread(tape, node, g, 0), _spread(tape, node, second, 1)]


def _mul(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    g = given[0] or ""
    return [
        _spread(tape, node, tape("Mul", g, node.input[1 - i]), i)
        if tape.is_float(node.input[i])
        else None
        for i in (0, 1)
    ]


def _div(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    part = tape("Div", given[0] or "", node.input[1])
    second = None
    if tape.is_float(node.input[1]):
        second = tape("Neg", tape("Mul", part, node.output[0]))
    return [_spread(tape, node, part, 0), _spread(tape, node, second, 1)]


def _pow(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    x, exponent = node.input
    if tape.is_float(exponent):
        return "its exponent is computed"
    value = np.asarray(tape.value(exponent), np.float64)
    less = tape("Pow", x, tape.constant(value - 1))
    slope = tape("Mul", less, tape.constant(value))
    return [_spread(tape, node, tape("Mul", given[0] or "", slope), 0)]


def _sqrt(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    tiny = tape.constant(1e-20)  # at zero the slope is infinite
    return [tape("Div", given[0] or "", tape("Max", tape("Add", *[node.output[0]] * 2), tiny))]


def _log(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    return [tape("Div", given[0] or "", node.input[0])]


def _reciprocal(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    square = tape("Mul", *[node.output[0]] * 2)
    return [tape("Neg", tape("Mul", given[0] or "", square))]


def _extreme(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    """Of Max and Min: to whichever input is the result."""
    g = given[0] or ""
    found: Given = []
    for i, name in enumerate(node.input):
        part = None
        if tape.is_float(name):
            wins = tape("Equal", name, node.output[0])
            part = tape("Where", wins, g, tape.constant(0.0))
        found.append(_spread(tape, node, part, i))
    return found


def _where(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    g, zero = given[0] or "", tape.constant(0.0)
    condition, a, b = node.input
    first = tape("Where", condition, g, zero) if tape.is_float(a) else None
    second = tape("Where", condition, zero, g) if tape.is_float(b) else None
    return [None, _spread(tape, node, first, 1), _spread(tape, node, second, 2)]


def _cast(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    return [given[0]] if tape.is_float(node.output[0]) else "it makes integers"


# ---------------------------------------------------------------------- over axes


def _axes(tape: Tape, node: onnx.NodeProto, attrs: Attrs) -> list[int] | None:
    rank = len(tape.shape(node.input[0]))
    axes = attrs.get("axes")
    if len(node.input) > 1 and node.input[1]:
        known = tape.value(node.input[1])
        axes = None if known is None else known.reshape(-1).tolist()
    if not axes:
        return None if attrs.get("noop_with_empty_axes", 0) else [*range(rank)]
    return [int(a) % rank for a in axes]


def _stretched(tape: Tape, name: str, x: str, axes: Sequence[int]) -> str:
    """What was reduced over axes, once more at every place of the input."""
    shape = tape.shape(x)
    kept = [1 if i in axes else n for i, n in enumerate(shape)]
    return tape("Expand", tape.reshaped(name, kept), tape.constant([*shape]))


def _reduce_sum(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    axes = _axes(tape, node, attrs)
    if axes is None:
        return "it has no axes"
    return [_stretched(tape, given[0] or "", node.input[0], axes)]


def _reduce_mean(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    shape = tape.shape(node.input[0])
    axes = [*range(2, len(shape))]
    if node.op_type == "ReduceMean":
        found = _axes(tape, node, attrs)
        if found is None:
            return "it has no axes"
        axes = found
    count = float(np.prod([shape[a] for a in axes]))
    part = tape("Div", given[0] or "", tape.constant(count))
    return [_stretched(tape, part, node.input[0], axes)]


def _reduce_extreme(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    x = node.input[0]
    axes: list[int] | None = [*range(2, len(tape.shape(x)))]
    if node.op_type != "GlobalMaxPool":
        axes = _axes(tape, node, attrs)
    if axes is None:
        return "it has no axes"
    wins = tape("Equal", x, _stretched(tape, node.output[0], x, axes))
    g = _stretched(tape, given[0] or "", x, axes)
    return [tape("Where", wins, g, tape.constant(0.0))]


def _softmax(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    g, y, axis = given[0] or "", node.output[0], int(attrs.get("axis", -1))
    if node.op_type == "LogSoftmax":
        total = tape.summed(g, [axis])
        return [tape("Sub", g, tape("Mul", tape("Exp", y), total))]
    weighted = tape("Mul", g, y)
    return [tape("Sub", weighted, tape("Mul", y, tape.summed(weighted, [axis])))]


def _layer_norm(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    x, shape = node.input[0], tape.shape(node.input[0])
    first = int(attrs.get("axis", -1)) % len(shape)
    axes = [*range(first, len(shape))]
    count = tape.constant(float(np.prod(shape[first:])))

    def mean(name: str) -> str:
        return tape("Div", tape.summed(name, axes), count)

    centred = tape("Sub", x, mean(x))
    epsilon = tape.constant(float(attrs.get("epsilon", 1e-5)))
    deviation = tape("Sqrt", tape("Add", mean(tape("Mul", centred, centred)), epsilon))
    unit = tape("Div", centred, deviation)
    g = tape("Mul", given[0] or "", node.input[1])
    inner = tape("Mul", unit, mean(tape("Mul", g, unit)))
    return [tape("Div", tape("Sub", tape("Sub", g, mean(g)), inner), deviation)]


def _batch_norm(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    scale, variance = tape.value(node.input[1]), tape.value(node.input[4])
    if scale is None or variance is None:
        return "its scales are computed"
    slope = scale / np.sqrt(variance.astype(np.float64) + float(attrs.get("epsilon", 1e-5)))
    shape = [-1, *[1] * (len(tape.shape(node.input[0])) - 2)]
    return [tape("Mul", given[0] or "", tape.constant(slope.reshape(shape)))]


# ---------------------------------------------------------------------- pooling, moving


def _average_pool(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    """As a convolution of each channel by ones, over what each window was divided by."""
    x, shape = node.input[0], tape.shape(node.input[0])
    if attrs.get("ceil_mode", 0):
        return "its windows go beyond its input"
    size = tuple(attrs["kernel_shape"])
    window = ops.conv_window(attrs, shape[2:], size)
    counts = np.ones(())
    for inside in ops.conv_taps(window, shape[2:]):
        seen = inside.sum(axis=1)
        if attrs.get("count_include_pad", 0):
            seen = np.full(seen.shape, inside.shape[1])
        counts = counts[..., None] * seen
    ones = tape.constant(np.ones((shape[1], 1, *size)))
    part = tape("Div", given[0] or "", tape.constant(counts))
    twin = onnx.helper.make_node("Conv", [x, ones], list(node.output))
    return _conv(tape, twin, {**attrs, "group": shape[1]}, [part])


def _scattered(tape: Tape, part: str, places: str, x: str) -> str:
    """Values added up at numbered places of a tensor; place 0 is none of it."""
    shape = tape.shape(x)
    count = int(np.prod(shape))
    empty = tape.constant(np.zeros(count + 1))
    flat = [tape.reshaped(n, [-1]) for n in (places, part)]
    found = tape("ScatterElements", empty, *flat, axis=0, reduction="add")
    kept = tape("Slice", found, tape.constant([1]), tape.constant([count + 1]))
    return tape.reshaped(kept, shape)


def _max_pool(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    places = tape("Add", tape.expose_second(node), tape.constant([1]))
    return [_scattered(tape, given[0] or "", places, node.input[0])]


def movement(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    """Whatever moves values of its first input: to where the operator finds them."""
    x = node.input[0]
    shape = tape.shape(x)
    if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"):
        return [tape.reshaped(given[0] or "", shape)]
    if node.op_type == "Transpose":
        perm = attrs.get("perm") or [*reversed(range(len(shape)))]
        return [tape("Transpose", given[0] or "", perm=np.argsort(perm).tolist())]
    if node.op_type == "MaxPool":
        return _max_pool(tape, node, attrs, given)
    if int(np.prod(shape)) >= _COUNTABLE:
        return "it moves too many values"
    others = [n for n in node.input[1:] if n]
    if any(tape.value(n) is None for n in others if not tape.is_float(n)):
        return "where it moves values to is computed"
    numbers = tape.constant(np.arange(1, np.prod(shape) + 1, dtype=np.float64).reshape(shape))
    found = None
    for index, part in enumerate(given):
        if part is not None:
            moved = tape.copy(node, [numbers, *node.input[1:]], index)
            places = tape("Cast", moved, to=onnx.TensorProto.INT64)
            back = _scattered(tape, part, places, x)
            found = back if found is None else tape("Add", found, back)
    return [found]


def _concat(tape: Tape, node: onnx.NodeProto, attrs: Attrs, given: Given) -> Found:
    axis = int(attrs["axis"]) % len(tape.shape(node.output[0]))
    found: Given = []
    start = 0
    for name in node.input:
        stop = start + tape.shape(name)[axis]
        ends = [tape.constant([n]) for n in (start, stop, axis)]
        found.append(tape("Slice", given[0] or "", *ends) if tape.is_float(name) else None)
        start = stop
    return found


RULES: Mapping[str, Rule] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _div,
    "Gemm": _gemm,
    "GlobalAveragePool": _reduce_mean,
    "GlobalMaxPool": _reduce_extreme,
    "LayerNormalization": _layer_norm,
    "Log": _log,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "Max": _extreme,
    "Mean": _mean,
    "Min": _extreme,
    "Mul": _mul,
    "Pow": _pow,
    "Reciprocal": _reciprocal,
    "ReduceMax": _reduce_extreme,
    "ReduceMean": _reduce_mean,
    "ReduceMin": _reduce_extreme,
    "ReduceSum": _reduce_sum,
    "Softmax": _softmax,
    "Sqrt": _sqrt,
    "Sub": _sub,
    "Sum": _add,
    "Where": _where,
    **dict.fromkeys(ops.FUNCTIONS - {"Log", "Reciprocal", "Sqrt"}, _function),
    **dict.fromkeys(("Ceil", "Floor", "Round", "Sign"), _rounding),
}
