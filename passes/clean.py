"""Constants computed in advance, operators that do nothing removed, Gemm in its plain form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx

from onnxq.errors import OnnxqError
from onnxq.inference import inferred
from onnxq.model import Layer, Model, has_subgraph, is_standard, rewire
from onnxq.report import Changes
from onnxq.runtime import Session

if TYPE_CHECKING:
    from onnxq.pass_manager import Context

__all__ = ["Clean"]

# Results up to this many bytes are kept as constants even where they are larger than the inputs.
SMALL = 1 << 16
# Inputs up to this many values go into the model that computes a node, where shape inference sees
# them; larger ones are fed, which does not copy them.
VISIBLE = 1 << 10
# Not the same at every run, or the products of quantization.
KEPT = frozenset(
    {
        "Bernoulli",
        "DequantizeLinear",
        "Dropout",
        "DynamicQuantizeLinear",
        "Multinomial",
        "QuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
# The size of the result depends on the values, but never passes that of the input.
SELECTING = frozenset({"Compress", "NonZero", "Unique"})


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Bring a model into the form in which the other passes recognise its layers.

        x   w                                  x   w'
        |   |                                  |  /
        |  Transpose                          Gemm (alpha = beta = 1)
        |  /                         =>        |
       Gemm (alpha = 0.5, beta = 2)           Relu
        |                                      |
       Dropout                                 y
        |
       Relu -- Identity -- y

    It rewrites, in one sweep in graph order,

    1. Operators of the standard domain whose inputs are all constants: they are run by onnxruntime,
       one at a time, and their outputs become constants.
    2. Operators that give back their input: Identity, Dropout in inference, Cast to the same type,
       Reshape to the same shape, Flatten of a matrix, Transpose in the same order, Pad by nothing,
       GlobalAveragePool over one position, Concat, Sum, Mean, Max and Min of one tensor, + 0, - 0,
       * 1 and / 1 with one value that does not change the rank.
    3. Gemm: alpha goes into the constant weight, beta into the constant bias, and a bias of one
       value or of shape [1, N] becomes [N].  onnxruntime runs a Gemm in integers only if beta is 1.
    4. Operators that no output needs, before and after.

    Names of inputs and outputs stay.  It leaves alone

    1. random operators, QuantizeLinear and DequantizeLinear, operators with subgraphs, and
       operators that put out strings or sequences,
    2. what onnxruntime cannot compute, and results of more than 64 KiB that hold more values than
       the inputs (Expand, Tile, ConstantOfShape...): the file would grow; both are reported,
    3. the insides of subgraphs; a tensor that a subgraph reads counts as read,
    4. operators in front of an output that would leave the output without a name of its own: an
       Identity from an input, or from another output.

    Source: the usual clean-up passes of compilers; for a larger collection see onnxsim and the
    graph optimizations of onnxruntime, which run after all weights are fixed and on one machine.
    """

    name: ClassVar[str] = "clean"

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Clean the model."""
        changes = Changes()
        if dead := model.cleanup():
            changes.add(f"{dead} operators that no output needs removed")
        if any(n.op == "GlobalAveragePool" for n in model.graph.nodes):
            model.infer()  # over how many positions?
        for node in [*model.graph.nodes]:
            if not is_standard(node) or has_subgraph(node):
                continue
            if _is_neutral(model, node) and _remove(model, node):
                changes.add(f"{node.name} ({node.op}) removed")
            elif _is_constant(model, node):
                _compute(model, node, changes)
            elif node.op == "Gemm" and (what := _plain_gemm(model, node)):
                changes.add(f"{node.name}: {what} folded")
        if changes:
            model.cleanup()
        return changes


# ---------------------------------------------------------------------- constants


def _is_constant(model: Model, node: gs.Node) -> bool:
    """Whether all that the node puts out can become constants."""
    read = [t for t in node.inputs if t.name]
    return (
        bool(read)
        and all(isinstance(t, gs.Constant) for t in read)
        and node.op not in KEPT
        and not any(model.is_output(t) for t in node.outputs)
    )


def _compute(model: Model, node: gs.Node, changes: Changes) -> None:
    """Turn the outputs of a node with constant inputs into constants, or say why not."""
    inputs = {t.name: model.array(t) for t in node.inputs if t.name}
    if any(a.dtype.kind in "OSU" for a in inputs.values()):  # strings
        return
    proto = _single(model, node, inputs)
    size = _result_size(node, proto)
    if size is None or (size[1] > SMALL and size[0] > sum(a.size for a in inputs.values())):
        grown = "an unknown size" if size is None else f"{size[1] >> 10} KiB"
        changes.skip(node.name, f"its result is constant, but would grow to {grown}")
        return
    fed = {i.name: inputs[i.name] for i in proto.graph.input}
    try:
        session = Session(proto.SerializeToString(), threads=1, level="disabled")
        results = session.run(fed)
    except OnnxqError as error:
        changes.skip(node.name, f"its result is constant, but {error.what}")
        return
    outputs = [t for t in node.outputs if t.name]
    if any(t.name not in results or results[t.name].dtype.kind not in "fiub" for t in outputs):
        return
    node.outputs.clear()
    for tensor in outputs:
        tensor.to_constant(results[tensor.name])
    changes.add(f"{node.name} ({node.op}) computed")


def _single(model: Model, node: gs.Node, inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one node, whose large inputs are to be fed."""
    fed, held = [], []
    for name, array in inputs.items():
        if array.size <= VISIBLE or array.dtype.kind == "V":  # "V": what numpy cannot feed
            held.append(numpy_helper.from_array(array, name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            fed.append(helper.make_tensor_value_info(name, kind, array.shape))
    outputs = [onnx.ValueInfoProto(name=t.name) for t in node.outputs if t.name]
    proto = OnnxExporter.export_node(node)
    graph = helper.make_graph([proto], "constant", fed, outputs, held)
    opset = helper.make_opsetid("", model.opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


def _result_size(node: gs.Node, proto: onnx.ModelProto) -> tuple[int, int] | None:
    """Values and bytes that the node puts out, found without running it; None if not known."""
    if node.op in SELECTING:
        return 0, 0
    known = inferred(proto)
    if known is None:
        return None
    values = total = 0
    for info in known.graph.output:
        kind = info.type.tensor_type
        if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
            return None
        count = math.prod(d.dim_value for d in kind.shape.dim)
        values += count
        total += count * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return values, total


# ---------------------------------------------------------------------- operators without effect


def _is_neutral(model: Model, node: gs.Node) -> bool:
    """Whether the first output of a node always equals its first input."""
    test = _NEUTRAL.get(node.op)
    if test is None or not node.inputs or not node.inputs[0].name:
        return False
    unused = all(not t.outputs and not model.is_output(t) for t in node.outputs[1:])
    return unused and test(model, node)


def _remove(model: Model, node: gs.Node) -> bool:
    """Let the readers of a node read its first input; the node falls to `cleanup`."""
    source, result = node.inputs[0], node.outputs[0]
    if not model.is_output(result):
        for reader in [*result.outputs]:
            rewire(reader, result, source)
        return True
    if not model.can_bypass(node):
        return False
    model.bypass(node)
    return True


def _value(model: Model, node: gs.Node, index: int, attr: str = "") -> np.ndarray | None:
    """What a small input, or an attribute in old operator sets, holds; None if not known."""
    if attr in node.attrs:
        return np.asarray(node.attrs[attr])
    tensor = node.inputs[index] if len(node.inputs) > index else None
    if not isinstance(tensor, gs.Constant) or math.prod(tensor.shape) > VISIBLE:
        return None
    return model.array(tensor)


def _dropout(model: Model, node: gs.Node) -> bool:
    if model.opset < 7:
        return bool(node.attrs.get("is_test", 0))
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return True
    training = _value(model, node, 2)
    return training is not None and not training.any()


def _cast(model: Model, node: gs.Node) -> bool:
    dtype = node.inputs[0].dtype
    return dtype is not None and int(dtype_to_onnx(dtype)) == node.attrs.get("to")


def _reshape(model: Model, node: gs.Node) -> bool:
    shape, target = node.inputs[0].shape, _value(model, node, 1, "shape")
    if shape is None or target is None or len(shape) != target.size:
        return False
    copied = () if node.attrs.get("allowzero", 0) else (0,)
    free = target == -1
    kept = [
        new in copied or new == -1 or (isinstance(old, int) and new == old)
        for old, new in zip(shape, target.tolist(), strict=True)
    ]
    return all(kept) and free.sum() <= 1


def _transpose(model: Model, node: gs.Node) -> bool:
    perm = node.attrs.get("perm")
    return perm is not None and list(perm) == list(range(len(perm)))


def _flatten(model: Model, node: gs.Node) -> bool:
    shape = node.inputs[0].shape
    return shape is not None and len(shape) == 2 and node.attrs.get("axis", 1) in (1, -1)


def _pad(model: Model, node: gs.Node) -> bool:
    pads = _value(model, node, 1, "pads")
    return pads is not None and not pads.any()


def _pool(model: Model, node: gs.Node) -> bool:
    shape = node.inputs[0].shape
    return shape is not None and len(shape) > 2 and all(extent == 1 for extent in shape[2:])


def _alone(model: Model, node: gs.Node) -> bool:
    return len(node.inputs) == 1


def _with(value: float, *, commutes: bool = False) -> Callable[[Model, gs.Node], bool]:
    """Whether the other operand is one `value` that does not raise the rank."""

    def test(model: Model, node: gs.Node) -> bool:
        first = commutes and isinstance(node.inputs[0], gs.Constant)
        x, other = node.inputs[first].shape, _value(model, node, 1 - first)
        if other is None or other.size != 1 or other.reshape(-1)[0] != value:
            return False
        if other.ndim and (x is None or other.ndim > len(x)):
            return False
        if first:
            node.inputs = [node.inputs[1], node.inputs[0]]
        return True

    return test


_NEUTRAL: dict[str, Callable[[Model, gs.Node], bool]] = {
    "Identity": lambda model, node: True,
    "Dropout": _dropout,
    "Cast": _cast,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Pad": _pad,
    "GlobalAveragePool": _pool,
    **dict.fromkeys(("Concat", "Sum", "Mean", "Max", "Min"), _alone),
    "Add": _with(0, commutes=True),
    "Mul": _with(1, commutes=True),
    "Sub": _with(0),
    "Div": _with(1),
}


# ---------------------------------------------------------------------- Gemm


def _plain_gemm(model: Model, node: gs.Node) -> str:
    """Bring a Gemm with a constant weight to alpha = beta = 1 and a bias [N]; says what changed."""
    layer = Layer.of(model, node)
    if layer is None or layer.weight_tensor.dtype not in (np.float16, np.float32, np.float64):
        return ""
    changed = []
    alpha, beta = (float(node.attrs.get(key, 1.0)) for key in ("alpha", "beta"))
    if alpha != 1.0:
        layer.set_weight(_scaled(layer.weight, alpha))
        del node.attrs["alpha"]
        changed.append("alpha")
    if beta != 1.0 and (layer.bias_tensor is None or layer.bias is not None or beta == 0.0):
        if beta == 0.0 and len(node.inputs) > 2:
            del node.inputs[2]
        elif layer.bias is not None:
            layer.set_bias(_scaled(layer.bias, beta))
        del node.attrs["beta"]
        changed.append("beta")
    if layer.bias is not None and layer.side == 1:
        width = layer.output_channels
        shape = layer.bias.shape
        if shape != (width,) and (layer.bias.size == 1 or shape == (1, width)):
            layer.set_bias(np.broadcast_to(layer.bias.reshape(-1), (width,)))
            changed.append("shape of the bias")
    return ", ".join(changed)


def _scaled(values: np.ndarray, factor: float) -> np.ndarray:
    return (values.astype(np.float64) * factor).astype(values.dtype)
