"""The one table of operator knowledge: weights, channel axes, data movement, activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "ACTIVATIONS",
    "FUNCTIONS",
    "LAYERS",
    "OPERANDS",
    "PRODUCTS",
    "SHAPES",
    "LayerOp",
    "Window",
    "bias_input",
    "channel_axis",
    "conv_coverage",
    "conv_taps",
    "conv_transpose_window",
    "conv_window",
    "is_movement",
    "matmul_weight",
    "window_sums",
]


@dataclass(frozen=True)
class LayerOp:
    """Where a layer operator keeps its parameters.

    Args:
        weight: Input index of the weight.
        bias: Input index of the bias; None if the operator takes none.
    """

    weight: int
    bias: int | None


# Operators that multiply an activation by a weight.  MatMul may hold its constant on either side.
LAYERS = {
    "Conv": LayerOp(weight=1, bias=2),
    "ConvTranspose": LayerOp(weight=1, bias=2),
    "Gemm": LayerOp(weight=1, bias=2),
    "MatMul": LayerOp(weight=1, bias=None),
}

# Their forms in integers and in onnxruntime: the layer, and the input indices of its two factors.
PRODUCTS = {
    "ConvInteger": ("Conv", 0, 1),
    "DynamicQuantizeMatMul": ("MatMul", 0, 1),
    "FusedConv": ("Conv", 0, 1),
    "FusedGemm": ("Gemm", 0, 1),
    "FusedMatMul": ("MatMul", 0, 1),
    "MatMulInteger": ("MatMul", 0, 1),
    "MatMulIntegerToFloat": ("MatMul", 0, 1),
    "MatMulNBits": ("MatMul", 0, 1),
    "QGemm": ("Gemm", 0, 3),
    "QLinearConv": ("Conv", 0, 3),
    "QLinearMatMul": ("MatMul", 0, 3),
}

# Element-wise functions that an integer operator before them takes over by saturation.
ACTIVATIONS = frozenset({"Relu", "Clip"})

# Operators that read nothing of their input but the shape.
SHAPES = frozenset({"Shape", "Size"})

# Functions of each value of their first input alone; further inputs are parameters.
FUNCTIONS = frozenset(
    {
        *("Abs", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu"),
        *("HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "PRelu", "Reciprocal"),
        *("Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt"),
        *("Tanh", "ThresholdedRelu"),
    }
)

# Element-wise operators that compute with the values of all their inputs.
OPERANDS = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"})

# Operators whose output values are all taken from their first input.
_MOVEMENT = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


def is_movement(op: str, attrs: dict[str, Any]) -> bool:
    """Whether the operator only moves values of its first input (Pad adds zeros)."""
    if op == "Resize":
        return bool(attrs.get("mode", "nearest") == "nearest")
    if op == "Pad":
        return attrs.get("mode", "constant") in ("constant", "reflect", "edge", "wrap")
    return op in _MOVEMENT


def matmul_weight(constant: tuple[bool, bool]) -> int:
    """Which input of a MatMul is the weight, given which inputs are constant; -1 for none."""
    left, right = constant
    return 1 if right else (0 if left else -1)


def bias_input(op: str) -> int | None:
    """Input index of the bias, None if the operator takes none."""
    return LAYERS[op].bias


def channel_axis(op: str, attrs: dict[str, Any], shape: tuple[int, ...], side: int = 1) -> int:
    """The axis of the weight along which one scale per output channel runs.

    Conv [O, I/g, ...]: 0.  ConvTranspose [I, O/g, ...]: 1, or 0 where each group has a single
    output (depthwise), so that every output keeps a scale of its own.  Gemm [K, N]: 1, [N, K] with
    transB: 0.  MatMul: the last axis, or the one before it if the weight is the left input.

    Args:
        op: Operator type, a key of `LAYERS`.
        attrs: Node attributes.
        shape: Shape of the weight.
        side: Input index of the weight (MatMul, Gemm).
    """
    if op == "Conv":
        return 0
    if op == "ConvTranspose":
        depthwise = attrs.get("group", 1) > 1 and shape[1] == 1
        return 0 if depthwise else 1
    if op == "Gemm":
        if side == 0:
            return 1 if attrs.get("transA", 0) else 0
        return 0 if attrs.get("transB", 0) else 1
    if len(shape) == 1:
        return 0
    return len(shape) - (1 if side == 1 else 2)


@dataclass(frozen=True)
class Window:
    """The window of a convolution, one entry per spatial axis.

    Args:
        size: Window sizes.
        strides: Strides.
        dilations: Dilations.
        begin: Zeros padded before each axis.
        positions: Output sizes.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    positions: tuple[int, ...]


def conv_window(attrs: dict[str, Any], spatial: tuple[int, ...], size: tuple[int, ...]) -> Window:
    """The window of a Conv node on an input of the given spatial sizes.

    Source: the Conv operator of the ONNX specification, `auto_pad` included.
    """
    rank = len(spatial)
    strides = tuple(attrs.get("strides") or [1] * rank)
    dilations = tuple(attrs.get("dilations") or [1] * rank)
    pads = list(attrs.get("pads") or [0] * (2 * rank))
    extent = [d * (k - 1) + 1 for k, d in zip(size, dilations, strict=True)]
    auto = attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        positions = tuple(-(-n // s) for n, s in zip(spatial, strides, strict=True))
        total = [
            max(0, (p - 1) * s + e - n)
            for p, s, e, n in zip(positions, strides, extent, spatial, strict=True)
        ]
        begin = tuple(t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total)
    else:
        if auto == "VALID":
            pads = [0] * (2 * rank)
        begin = tuple(pads[:rank])
        positions = tuple(
            (n + b + e - x) // s + 1
            for n, b, e, x, s in zip(
                spatial, pads[:rank], pads[rank:], extent, strides, strict=True
            )
        )
    return Window(tuple(size), strides, dilations, begin, positions)


def conv_transpose_window(
    attrs: dict[str, Any], spatial: tuple[int, ...], size: tuple[int, ...]
) -> Window:
    """The window of a ConvTranspose as that of a convolution of stride 1 with the kernel mirrored.

    The convolution runs over the input with stride - 1 zeros between neighbours.

    Source: the ConvTranspose operator of the ONNX specification, `output_shape` included.
    """
    rank = len(spatial)
    strides = tuple(attrs.get("strides") or [1] * rank)
    dilations = tuple(attrs.get("dilations") or [1] * rank)
    pads = list(attrs.get("pads") or [0] * (2 * rank))
    extra = list(attrs.get("output_padding") or [0] * rank)
    shape = list(attrs.get("output_shape") or [])[-rank:]
    extent = [d * (k - 1) + 1 for k, d in zip(size, dilations, strict=True)]
    full = [(n - 1) * s + x + o for n, s, x, o in zip(spatial, strides, extent, extra, strict=True)]
    auto = attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER") and not shape:
        shape = [n * s for n, s in zip(spatial, strides, strict=True)]
    if shape:
        total = [max(0, f - n) for f, n in zip(full, shape, strict=True)]
        begin = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
    else:
        total = (
            [0] * rank
            if auto == "VALID"
            else [a + b for a, b in zip(pads[:rank], pads[rank:], strict=True)]
        )
        begin = [0] * rank if auto == "VALID" else pads[:rank]
        shape = [f - t for f, t in zip(full, total, strict=True)]
    return Window(
        tuple(size),
        (1,) * rank,
        dilations,
        tuple(x - 1 - b for x, b in zip(extent, begin, strict=True)),
        tuple(shape),
    )


def conv_taps(window: Window, spatial: tuple[int, ...]) -> list[np.ndarray]:
    """Per spatial axis, which taps lie inside the input at each output position, bool [P, size]."""
    found = []
    for axis, n in enumerate(spatial):
        taps = np.arange(window.size[axis]) * window.dilations[axis] - window.begin[axis]
        read = np.arange(window.positions[axis])[:, None] * window.strides[axis] + taps
        found.append((read >= 0) & (read < n))
    return found


def conv_coverage(window: Window, spatial: tuple[int, ...]) -> np.ndarray:
    """The share of output positions at which each tap lies inside the input, [*size].

    1 everywhere without padding: the share that is missing meets the padded border.
    """
    shares = np.ones(())
    for inside in conv_taps(window, spatial):
        shares = shares[..., None] * inside.mean(axis=0)
    return shares


def window_sums(
    values: np.ndarray, window: Window, spatial: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over those taps that lie inside the input, at every kind of output position.

    Positions at which a border cuts the window in the same way are one kind.

    Args:
        values: One per tap, [C, *size].
        window: The window.
        spatial: Sizes of the input.

    Returns:
        The sums [C, *kinds], and the share of positions that are of each kind, [*kinds].
    """
    sums, shares = values.astype(np.float64), np.ones(())
    for inside in conv_taps(window, spatial):
        kinds, counts = np.unique(inside, axis=0, return_counts=True)
        sums = np.tensordot(sums, kinds.astype(np.float64), (1, 1))
        shares = shares[..., None] * (counts / counts.sum())
    return sums, shares
