"""The rules by which onnxruntime runs an operator between DQ and Q in integers.

Read off onnxruntime 1.32 and probed on it, level EXTENDED, CPU provider.  A test holds each rule
against the installed version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from onnxq.analysis.qdq import is_residue
from onnxq.model import is_standard

__all__ = [
    "BIAS_SLACK",
    "BIAS_TOLERANCE",
    "RULES",
    "Rule",
    "Why",
    "computes_integers",
    "missing_kernel",
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

# A Conv fuses as long as the scale of its bias is s_x * s_w to within this share of it, and this
# much more: below that, whatever the scale of the bias is.
BIAS_TOLERANCE, BIAS_SLACK = 0.01, 1e-6

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


def missing_kernel(node: gs.Node) -> Why:
    """Why an operator without a rule stays in float."""
    if is_residue(node):
        return Why(
            "residue",
            "it computes what quantizing its input leaves, which the next layer reads, too:"
            " twice the input, so that quiet samples keep their shape",
            "if time counts more, quantize without the pass residual-input",
        )
    shown = str(node.op) if is_standard(node) else f"{node.domain}.{node.op}"
    return Why("no-kernel", f"onnxruntime has no integer {shown}", _INSTEAD.get(node.op, _LEAVE))
