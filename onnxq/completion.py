"""Encodings for every tensor that AIMET's default configuration quantizes.

AIMET rounds the result of each operator, whatever kernels there are; with ``strict=True`` it loads
a file only if that names exactly the tensors which it rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.encoding import DTYPES, Encoding, Encodings
from onnxq.fitting import without_moves
from onnxq.graph import consumers, producer
from onnxq.model import Layer, Model
from onnxq.pass_manager import Context
from onnxq.statistics import Method, needs_histogram

__all__ = ["completed", "rounded"]

# Operators whose results have the values of their inputs; AIMET does not round these once more.
_MOVES = frozenset(
    {
        *("Cast", "Col2Im", "Compress", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather"),
        *("GatherElements", "GatherND", "Identity", "MaxPool", "MaxRoiPool", "NonZero", "Pad"),
        *("ReduceMax", "ReduceMin", "Reshape", "Shape", "Slice", "SpaceToDepth", "Split"),
        *("SplitToSequence", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze"),
    }
)
# What is rounded behind the second one of the two only; of convolutions, 1-D and 2-D ones with more
# than a channel a group.
_PAIRS = frozenset(
    {
        *(("Conv", "Relu"), ("Conv", "Clip"), ("ConvTranspose", "Relu")),
        *(("Add", "Relu"), ("Gemm", "Relu")),
    }
)
_CONVOLUTIONS = ("Conv", "ConvTranspose")
# Constants that are not rounded, by the inputs that read them.
_UNROUNDED = {
    "BatchNormalization": (2, 3, 4),
    "InstanceNormalization": (2,),
    "LayerNormalization": (2,),
    "GroupNormalization": (2,),
    "Resize": (1, 2, 3),
}


@dataclass(frozen=True)
class _Rounded:
    """The tensors that are rounded.

    Args:
        activations: Results and inputs.
        weights: Those of layers -> the axis that scales run along; None for one scale.
        constants: Others, with one scale each.
    """

    activations: list[str]
    weights: dict[str, int | None]
    constants: list[str]

    def __iter__(self) -> Iterator[str]:
        yield from (*self.activations, *self.weights, *self.constants)


def rounded(model: Model) -> _Rounded:
    """What AIMET's default configuration rounds of a model, subgraphs left out."""
    model.infer()
    spared = {id(t) for node in model.graph.nodes for t in _inside(model, node)}
    weights: dict[str, int | None] = {}
    for layer in model.layers():
        whole = layer.op == "ConvTranspose" and layer.node.attrs.get("group", 1) > 1
        weights[layer.weight_tensor.name] = None if whole else layer.channel_axis
    activations, constants = [], []
    for name, tensor in model.tensors().items():
        if id(tensor) in spared or name in weights or tensor.dtype != np.float32:
            continue
        readers = [(n, i) for n in consumers(tensor) for i, t in enumerate(n.inputs) if t is tensor]
        if isinstance(tensor, gs.Constant):
            if not any(i in _unrounded(node) for node, i in readers):
                constants.append(name)
        elif not any(n.op == "Resize" and i for n, i in readers):
            before = producer(tensor)
            if before is None or before.op not in _MOVES:
                activations.append(name)
    return _Rounded(activations, weights, constants)


def _unrounded(node: gs.Node) -> tuple[int, ...]:
    if node.op in ops.LAYERS:
        bias = ops.bias_input(node.op)
        return () if bias is None else (bias,)
    return _UNROUNDED.get(node.op, ())


def _inside(model: Model, node: gs.Node) -> list[gs.Tensor]:
    """The tensors between a node and the one behind it that rounds for both."""
    if not node.outputs:
        return []
    made = node.outputs[0]
    readers = consumers(made)
    if len(readers) != 1 or model.is_output(made):
        return []
    (after,) = readers
    if node.op == "MatMul" and after.op == "Add" and Layer.of(model, node) is not None:
        other = next((t for t in after.inputs if t is not made), None)
        return [made, other] if isinstance(other, gs.Constant) and len(other.shape) == 1 else []
    if (node.op, after.op) not in _PAIRS:
        return []
    if node.op in _CONVOLUTIONS:
        weight = node.inputs[1]
        if weight.shape is None or len(weight.shape) > 4 or _is_depthwise(node):
            return []
    return [made]


def _is_depthwise(node: gs.Node) -> bool:
    group, channels = node.attrs.get("group", 1), node.inputs[0].shape
    return bool(group > 1 and channels is not None and channels[1] == group)


def completed(
    model: Model, encodings: Encodings, ctx: Context, method: Method = "mse"
) -> tuple[Encodings, list[str]]:
    """Encodings of exactly the tensors that AIMET's default configuration rounds.

    What is known stays.  The others get formats that most of their kind have: activations and
    operands with free zero points and ranges from the samples, weights symmetric.

    Args:
        model: The float model.
        encodings: What is known.
        ctx: Has the samples.
        method: How ranges of activations are chosen.

    Returns:
        The encodings, and what is left out because AIMET does not round it, one sentence each.

    Raises:
        CalibrationError: There are no samples, or they do not fit.
    """
    model = model.clone()
    wanted = rounded(model)
    told = without_moves(model, encodings, ctx.target)
    tensors = model.tensors()
    widths = _dtypes(model, encodings)
    found = Encodings({n: e for n, e in encodings.items() if n in {*wanted}})
    found.float_nodes = dict(encodings.float_nodes)
    histogram = needs_histogram(method)
    lacking = [n for n in wanted.activations if n not in found]
    known = ctx.statistics(model, lacking, histogram=histogram) if lacking else {}
    for name, seen in known.items():
        if name in lacking:
            bits = DTYPES[widths["activation"]][0]
            found[name] = Encoding.of_range(*seen.range(method, bits=bits), widths["activation"])
    for name in wanted.constants:
        if name not in found:
            values = np.nan_to_num(model.array(tensors[name]))  # a bound may be infinite
            ends = values.min(initial=0), values.max(initial=0)
            found[name] = Encoding.of_range(*ends, widths["activation"])
    for name, axis in wanted.weights.items():
        if name not in found:
            size = np.abs(model.array(tensors[name]))
            others = tuple(i for i in range(size.ndim) if i != axis) if axis is not None else None
            found[name] = Encoding.symmetric(size.max(axis=others), widths["weight"], axis)
    notes = [f"{n}: AIMET does not round it, left out" for n in told if n not in found]
    return found, notes


def _dtypes(model: Model, encodings: Mapping[str, Encoding]) -> dict[str, str]:
    """The types that most activations and most weights have."""
    weights = {layer.weight_tensor.name for layer in model.layers()}
    kinds = {"activation": "uint8", "weight": "int8"}
    for kind in kinds:
        count = Counter(
            e.dtype for n, e in encodings.items() if (n in weights) == (kind == "weight")
        )
        if count:
            kinds[kind] = count.most_common(1)[0][0]
    return kinds
