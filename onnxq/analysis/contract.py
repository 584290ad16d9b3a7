"""By which rules onnxruntime runs an operator between DQ and Q in integers; what breaks them.

Read off onnxruntime 1.32 and probed on it, level EXTENDED, CPU provider.  A test holds each rule
against the installed version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.qdq import Grid, dequantize_before, is_quantize, limits
from onnxq.analysis.rewrites import Rewritten
from onnxq.model import has_subgraph, is_standard, producer
from onnxq.placement import activation_bounds

__all__ = [
    "BIAS_TOLERANCE",
    "RULES",
    "Rule",
    "Why",
    "bias_ratio",
    "broken_rule",
    "computes_integers",
]

Inputs = Literal["all", "first", "two", "choices"]
Output = Literal["one", "optional", "each", "none"]
Types = Literal["pair", "same"]


@dataclass(frozen=True)
class Rule:
    """What has to stand around an operator so that it runs in integers.

    Args:
        kernel: What onnxruntime runs in its place; empty: the operator itself, on integers.
        inputs: Which inputs come from a DQ: ``all`` of them, the ``first`` alone, the first
            ``two``, or the two that Where chooses from.
        output: ``one``: a Q reads the result, and nothing else does; ``optional``: or no Q at all,
            the result being float; ``each``: so for each output; ``none``: no float comes out.
        types: ``same``: integers of one type go in and come out; ``pair``: the second input may
            have a type of its own.
        same_grid: Whether scale and zero point are the same on both sides.
        wide: Whether 16-bit integers will do.
    """

    kernel: str
    inputs: Inputs
    output: Output = "one"
    types: Types = "same"
    same_grid: bool = False
    wide: bool = False


_MOVE = Rule("", "first", same_grid=True, wide=True)
_MOVE8 = Rule("", "first", same_grid=True)


def _unary(kernel: str) -> Rule:
    return Rule(kernel, "first")


RULES = {
    # layers
    "Conv": Rule("QLinearConv", "all", types="pair"),
    "Gemm": Rule("QGemm", "all", "optional", types="pair"),
    "MatMul": Rule("QLinearMatMul", "two", "optional", types="pair"),
    # element by element
    "Add": Rule("QLinearAdd", "all"),
    "Mul": Rule("QLinearMul", "all"),
    "Where": Rule("QLinearWhere", "choices"),
    "AveragePool": _unary("QLinearAveragePool"),
    "GlobalAveragePool": _unary("QLinearGlobalAveragePool"),
    "LeakyRelu": _unary("QLinearLeakyRelu"),
    "Sigmoid": _unary("QLinearSigmoid"),
    "Softmax": _unary("QLinearSoftmax"),
    # side by side: any scales, one type
    "Concat": Rule("QLinearConcat", "all"),
    # data movement
    "Expand": _MOVE,
    "Flatten": _MOVE,
    "Gather": _MOVE,
    "GatherElements": _MOVE,
    "Reshape": _MOVE,
    "Slice": _MOVE,
    "Squeeze": _MOVE,
    "Tile": _MOVE,
    "Transpose": _MOVE,
    "Unsqueeze": _MOVE,
    "DepthToSpace": _MOVE8,
    "MaxPool": _MOVE8,
    "ReduceMax": _MOVE8,
    "ReduceMin": _MOVE8,
    "Resize": _MOVE8,
    "Split": Rule("", "first", "each", same_grid=True, wide=True),
    "ArgMax": Rule("", "first", "none"),
}

# A Conv fuses as long as the scale of its bias is s_x * s_w to within this share.
BIAS_TOLERANCE = 0.01

# What to do about operators without integer kernels.
_INSTEAD = {
    "BatchNormalization": "fold it into the layer in front of it, before quantizing",
    "Clip": "write no Q/DQ between it and the layer before it: the layer's Q then does its work",
    "ConvTranspose": "nearest Resize and Conv, or Conv and DepthToSpace, have integer kernels",
    "Div": "write division by a constant as Mul by its reciprocal",
    "Gelu": "leave it in float, with no Q/DQ in front of it",
    "GlobalMaxPool": "write it as ReduceMax",
    "HardSwish": "leave it in float, or train with Relu6 or LeakyRelu",
    "Max": "write a Max with zero as Relu",
    "Min": "write it as Clip in front of a Q whose range ends at the bound",
    "PRelu": "with one slope for all channels, write it as LeakyRelu",
    "Pad": "write it on the integers, between Q and DQ, padding with the zero point",
    "ReduceMean": "over height and width, write it as GlobalAveragePool",
    "Relu": "write no Q/DQ between it and the layer before it: the layer's Q then does its work",
    "SpaceToDepth": "write it as Reshape, Transpose, Reshape",
    "Sub": "subtracting a constant is an Add of its negative",
}
_LEAVE = "leave it in float, and write no Q/DQ around it"
# Operators of onnxruntime that compute with integers.
_INTEGER_OPS = frozenset(
    {
        *("ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger"),
        *("MatMulIntegerToFloat", "QAttention", "QEmbedLayerNormalization", "QGemm"),
        *("QMoE", "QOrderedMatMul"),
    }
)


@dataclass(frozen=True)
class Why:
    """Why a node does not run in integers.

    Args:
        code: The rule that is broken, in a word.
        reason: In one sentence.
        mend: What to do about it, in another.
    """

    code: str
    reason: str
    mend: str


def computes_integers(op: str) -> bool:
    """Whether an operator is one of those that onnxruntime runs in integers."""
    return op.startswith("QLinear") or op in _INTEGER_OPS


def broken_rule(node: gs.Node, graph: Rewritten) -> Why | None:
    """The first rule that keeps a node in float; None if it runs in integers.

    Args:
        node: A node of the rewritten model.
        graph: The rewritten model.
    """
    if has_subgraph(node):
        return Why("subgraph", "it holds a subgraph, which is left alone", "leave it in float")
    rule = RULES.get(node.op) if is_standard(node) else None
    if rule is None:
        mend = _INSTEAD.get(node.op, _LEAVE)
        return Why("no-kernel", f"onnxruntime has no integer {_shown(node)}", mend)
    for check in (_mode, _inputs, _output, _taken_over, _types, _scalars, _grids, _layer):
        for why in check(node, rule, graph):
            return why
    return None


def _shown(node: gs.Node) -> str:
    return str(node.op) if is_standard(node) else f"{node.domain}.{node.op}"


# ---------------------------------------------------------------------- the operator itself


def _mode(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    attrs = node.attrs
    if node.op == "Resize" and attrs.get("mode", "nearest") != "nearest":
        yield Why(
            "mode",
            f"onnxruntime has no integer Resize of mode {attrs['mode']}",
            "use mode nearest, or leave it in float without Q/DQ around it",
        )
    if node.op == "MaxPool" and graph.model.opset < 12:
        yield Why(
            "opset",
            f"MaxPool of integers needs operator set 12, the model has {graph.model.opset}",
            "convert the model to operator set 13 or newer",
        )
    if node.op == "Gemm" and _named(node, 2):
        for name in ("alpha", "beta"):
            if float(attrs.get(name, 1.0)) != 1.0:
                yield Why(
                    name,
                    f"its {name} is {attrs[name]:g}, and a QGemm with bias needs 1",
                    f"multiply {'the weight' if name == 'alpha' else 'the bias'} by it",
                )


def _named(node: gs.Node, index: int) -> bool:
    return len(node.inputs) > index and bool(node.inputs[index].name)


# ---------------------------------------------------------------------- inputs


def _data(node: gs.Node, rule: Rule) -> list[tuple[int, gs.Tensor]]:
    """The inputs that have to come from a DQ, with their index."""
    chosen = {"first": slice(0, 1), "two": slice(0, 2), "choices": slice(1, 3)}
    found = [(i, t) for i, t in enumerate(node.inputs) if t.name]
    return found if rule.inputs == "all" else found[chosen[rule.inputs]]


def _inputs(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    data = _data(node, rule)
    quantized = [dequantize_before(t) is not None for _, t in data]
    if not any(quantized) and not _quantizes(node, graph):
        yield Why(
            "not-quantized",
            "nothing around it is quantized",
            "if its neighbours run in integers, put Q/DQ on all that it reads and gives",
        )
    for index, tensor in data:
        if dequantize_before(tensor) is not None or (node.name, index) in graph.filled:
            continue
        if node.op == "Where" and any(quantized) and _is_scalar(tensor):
            continue  # onnxruntime quantizes it
        yield _unquantized(node, index, tensor, graph)


def _is_scalar(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tuple(tensor.shape) in ((), (1,))


def _unquantized(node: gs.Node, index: int, tensor: gs.Tensor, graph: Rewritten) -> Why:
    if index == 2 and node.op in ("Conv", "Gemm"):
        added = next((n for n, by in graph.taken.items() if by == node.name), None)
        what = "its bias" if added is None else f"the bias that {added} adds to it"
        return Why(
            "float-bias",
            f"{what} is float, and onnxruntime quantizes it only where a Q follows and the weight"
            " is quantized, too" if isinstance(tensor, gs.Constant) else f"{what} is computed",
            "write it as int32 of scale s_x * s_w with a DQ, as input 2 of a Gemm or Conv",
        )  # fmt: skip
    what = "its weight" if index == 1 and node.op in ("Conv", "Gemm", "MatMul") else "its input"
    kind = "is float" if isinstance(tensor, gs.Constant) else "is not quantized"
    mend = "store it in integers with a DQ" if isinstance(tensor, gs.Constant) else None
    before = producer(tensor)
    if mend is None and before is not None and RULES.get(before.op) is None:
        mend = f"put Q/DQ between {before.name} and it, or none around it"
    return Why(
        "unquantized-input", f"{what} {tensor.name} {kind}", mend or "put Q/DQ in front of it"
    )


# ---------------------------------------------------------------------- the result


def _absorber(node: gs.Node, graph: Rewritten) -> gs.Node | None:
    """The Relu or Clip behind a node that onnxruntime tries to take over with it."""
    readers = graph.readers(node.outputs[0])
    if len(readers) != 1 or readers[0].op not in ("Relu", "Clip"):
        return None
    after: gs.Node = readers[0]
    if len(graph.readers(after.outputs[0])) != 1 or graph.is_output(after.outputs[0]):
        return None
    return after


def _quantizes(node: gs.Node, graph: Rewritten) -> list[gs.Node]:
    """The Qs behind a node, also behind the Relu or Clip that is taken over with it."""
    activation = _absorber(node, graph)
    found = []
    for tensor in (node if activation is None else activation).outputs:
        found += [n for n in graph.readers(tensor) if is_quantize(n)]
    return found


def _output(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    if rule.output == "none":
        return
    activation = _absorber(node, graph)
    last = node if activation is None else activation
    results = [t for t in last.outputs if t.name]
    quantizes = _quantizes(node, graph)
    if rule.output == "optional" and not quantizes:
        return
    for tensor in results:
        if graph.is_output(tensor):
            yield Why(
                "graph-output",
                f"its result {tensor.name} is also an output of the model",
                "let the output be what its DQ gives, or leave the last node in float",
            )
        readers = graph.readers(tensor)
        floats = [n.name for n in readers if not is_quantize(n)]
        mine = [n for n in readers if is_quantize(n)]
        if floats:
            what = f"{floats[0]} reads its result in float"
            mend = "quantize its result right behind it, and let all readers read the DQ"
            if mine and activation is None:
                mend = "let it read the DQ behind the Q of this result"
            yield Why("float-reader", what, mend)
        if len(mine) > 1:
            yield Why(
                "two-quantizes",
                f"its result is quantized {len(mine)} times, on different grids",
                "quantize it once, and let all readers read that DQ",
            )
        if not mine and not floats:
            yield Why("no-quantize", "nothing quantizes its result", "put Q/DQ behind it")


def _taken_over(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    """The Relu or Clip behind it has to be redundant in front of the Q."""
    activation, quantizes = _absorber(node, graph), _quantizes(node, graph)
    if activation is None:
        return
    if rule.same_grid or rule.output in ("none", "each"):
        yield Why(
            "activation",
            f"{activation.name} stands between it and the Q",
            f"put {activation.name} in front of it, behind the layer",
        )
        return
    if not quantizes:
        yield Why(
            "activation",
            f"{activation.name} behind it keeps it from giving float",
            f"put Q/DQ behind {activation.name}",
        )
        return
    grid = graph.grid(quantizes[0])
    low = limits(grid.dtype)[0]
    span, bounds = grid.bounds, activation_bounds(graph.model, activation)
    if span is None or grid.scale is None or grid.scale.shape != ():
        yield Why(
            "activation",
            f"the Q behind {activation.name} has scales of shape {_shape(grid)}, not a scalar",
            "write its scale and zero point without dimensions",
        )
    elif activation.op == "Relu":
        zero = 0 if grid.point is None else grid.point[1]
        if zero != low:
            symmetric = " (symmetric)" if grid.dtype == "int8" and zero == 0 else ""
            yield Why(
                "activation",
                f"the zero point behind {activation.name} is {zero}{symmetric}, not {low}: the Q"
                " does not cut negative values off",
                f"quantize the result of a Relu from zero on: zero point {low}",
            )
    elif bounds is None:
        yield Why(
            "activation",
            f"the bounds of {activation.name} are computed, or leave zero out",
            "make them constants around zero",
        )
    elif not _clips(grid, bounds):
        yield Why(
            "activation",
            f"the Q behind {activation.name} reaches from {span[0]:.4g} to {span[1]:.4g}, beyond"
            f" its bounds {bounds[0]:.4g} and {bounds[1]:.4g}",
            "let the range of the Q end at the bounds",
        )


def _clips(grid: Grid, bounds: tuple[float, float]) -> bool:
    """Whether a Q holds no value beyond the bounds of a Clip, as onnxruntime rounds."""
    if grid.point is None:
        return False
    (scale, zero), (low, high) = grid.point, limits(grid.dtype)
    ends = [b if np.isinf(b) else np.rint(b / scale) + zero for b in bounds]
    return bool(ends[0] <= low and ends[1] >= high)


def _shape(grid: Grid) -> list[int] | str:
    return "unknown" if grid.scale is None else list(grid.scale.shape)


# ---------------------------------------------------------------------- types and grids


def _dequantizes(node: gs.Node, rule: Rule) -> list[gs.Node]:
    found = [dequantize_before(t) for _, t in _data(node, rule)]
    return [n for n in found if n is not None]


def _types(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    pairs = _dequantizes(node, rule)[: 2 if rule.types == "pair" else None]
    types = [graph.dtype(n) for n in pairs]
    if rule.types == "pair" and (node.name, 1) in graph.filled:
        types.append("int8")
    results = [graph.dtype(n) for n in _quantizes(node, graph)] if rule.output != "none" else []
    written = [graph.grid(n).dtype for n in (*pairs[:1], *_quantizes(node, graph))]
    for kind in (*types, *results):
        if kind in ("int4", "uint4", "int2", "uint2"):
            yield Why(
                "bits",
                f"onnxruntime has no integer {node.op} of {kind}",
                "put a Cast to int8 in front of the DQ: it is done once, as the model is loaded",
            )
        if kind in ("int16", "uint16") and not rule.wide:
            yield Why(
                "bits", f"onnxruntime has no integer {node.op} of {kind}", "use 8-bit integers"
            )
    signed = not graph.arm and all(kind == "int8" for kind in written)
    if rule.types == "pair" and types[:1] == ["int8"] and types[1:2] not in ([], ["int8"]):
        yield Why(
            "types",
            f"onnxruntime has no integer {node.op} of int8 and {types[1]}",
            "use uint8 activations, or int8 weights",
        )
    sides = dict.fromkeys([*(types[:1] if rule.types == "pair" else types), *results])
    left = types[:1] == ["int8"] and node.op in ("Conv", "MatMul")
    if signed and (left or len(sides) > 1):
        yield Why(
            "int8-on-x64",
            "on x86-64 it needs uint8, and onnxruntime turns int8 into it only where a Q has one"
            " reader, and no constants",
            "quantize activations to uint8: the same grid with zero points 128 higher",
        )
    elif len(sides) > 1:
        first = " and ".join(dict.fromkeys(types[:1] if rule.types == "pair" else types))
        gives = f" and gives {results[0]}" if results else ""
        yield Why("types", f"it reads {first}{gives}", "use one type on both sides")


def _scalars(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    """Activations have one scale: kernels of several would fail or are not taken."""
    if rule.types == "pair" or rule.same_grid or node.op not in ("Add", "Mul"):
        return
    for other in (*_dequantizes(node, rule), *_quantizes(node, graph)):
        grid = graph.grid(other)
        if grid.scale is not None and grid.scale.size > 1:
            yield Why(
                "per-channel",
                f"{other.name} has {grid.scale.size} scales, and an integer {node.op} takes one",
                "give the tensor one scale",
            )


def _grids(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    if not rule.same_grid:
        return
    before = _dequantizes(node, rule)[0]
    for after in _quantizes(node, graph):
        grids = graph.grid(before), graph.grid(after)
        for other, grid in zip((before, after), grids, strict=True):
            if not grid.has_zero:
                yield Why(
                    "no-zero-point",
                    f"{other.name} has no zero point, which data movement needs written out",
                    "write the zero point 0 as an input",
                )
            if grid.scale is not None and grid.scale.size > 1:
                yield Why(
                    "per-channel",
                    f"{other.name} has {grid.scale.size} scales; data movement takes one",
                    "give the tensor one scale",
                )
        if not grids[0].equals(grids[1]):
            yield Why(
                "grids",
                f"it only moves values, but reads {grids[0]} and gives {grids[1]}",
                "give its result the scale and zero point of its input",
            )


# ---------------------------------------------------------------------- weights and biases


def _layer(node: gs.Node, rule: Rule, graph: Rewritten) -> Iterator[Why]:
    if node.op in ("Gemm", "MatMul"):
        weight = dequantize_before(node.inputs[1])
        yield from _columns(node, weight, graph)
    if node.op not in ("Conv", "Gemm") or not _named(node, 2):
        return
    bias = dequantize_before(node.inputs[2])
    if bias is None:
        return
    if graph.dtype(bias) != "int32":
        yield Why(
            "bias-type",
            f"its bias is {graph.dtype(bias)}, not int32",
            "write it as int32 of scale s_x * s_w",
        )
    if node.op == "Gemm":
        return
    grid = graph.grid(bias)
    if grid.zero is not None and grid.zero.any():
        yield Why("bias-zero-point", "its bias has a zero point", "subtract it from the bias")
    ratio = bias_ratio(node, graph)
    if ratio is not None and abs(ratio - 1) > BIAS_TOLERANCE:
        yield Why(
            "bias-scale",
            f"the scale of its bias is {ratio:.4g} x s_x * s_w",
            "write the bias anew, of scale s_x * s_w",
        )


def _columns(node: gs.Node, weight: gs.Node | None, graph: Rewritten) -> Iterator[Why]:
    """Scales of a matrix on the right run along its columns."""
    if weight is None:
        return
    grid, shape = graph.grid(weight), weight.inputs[0].shape
    if grid.scale is None or grid.scale.size == 1 or shape is None:
        return
    axis = grid.axis % len(shape)
    if node.op == "Gemm":
        columns = shape[0 if node.attrs.get("transB", 0) else 1]
        broken = grid.scale.size != columns
    else:
        broken = axis != len(shape) - 1
    if broken or grid.block:
        yield Why(
            "weight-axis",
            f"its weight has scales along axis {axis}, not one for each column of its result",
            "quantize the weight along the axis of the output channels",
        )


def bias_ratio(node: gs.Node, graph: Rewritten) -> float | None:
    """Scale of the bias over s_x * s_w where it is furthest from 1; None if not constant."""
    found = [dequantize_before(t) for t in node.inputs[:3]]
    if any(n is None for n in found):
        return None
    scales = [graph.grid(n).scale for n in found if n is not None]
    x, w, b = scales
    if x is None or w is None or b is None or x.size != 1:
        return None
    product = float(x.reshape(-1)[0]) * w.reshape(-1).astype(np.float64)
    if b.size not in (1, product.size) and product.size != 1:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = b.reshape(-1).astype(np.float64) / product
    far = np.abs(np.nan_to_num(np.log(np.maximum(ratios, 1e-30)), nan=0.0, posinf=1e3))
    return float(ratios[far.argmax()])
