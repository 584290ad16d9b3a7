"""What makes models of the wild odd: steps within a graph, ends of it, and finishing touches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.corpus.builder import BOOL, INT64, STRING, Builder, tensor_type

__all__ = ["ENDS", "FINISHES", "STEPS"]


def _graph(
    b: Builder, nodes: list[onnx.NodeProto], result: str, **parts: object
) -> onnx.GraphProto:
    """A subgraph with one output of the element type of the graph."""
    outputs = parts.pop("outputs", None) or [helper.make_tensor_value_info(result, b.kind, None)]
    inputs = parts.pop("inputs", [])
    return helper.make_graph(nodes, b.free("body"), inputs, outputs, **parts)


def _inner_conv(b: Builder, source: str, *, outside: bool) -> tuple[list, list, str]:
    """Nodes and initializers of a convolution inside of a subgraph that keeps the shape."""
    c = b.shape[1]
    weight = b.free("inner_w")
    array = numpy_helper.from_array(b.weight((c, c, 1, 1)).astype(b.dtype), weight)
    if outside:
        b.constants.append(array)
    names = [b.free("inner") for _ in range(2)]
    nodes = [
        helper.make_node("Conv", [source, weight], [names[0]], name=b.free("inner_conv")),
        helper.make_node("Relu", [names[0]], [names[1]]),
    ]
    return nodes, [] if outside else [array], names[1]


# ---------------------------------------------------------------------- control flow


def branch_on_value(b: Builder) -> None:
    """If on a number of the graph, a layer in each branch."""
    condition = b.node("Less", b.scalar(b.name), b.constant(0.0))
    _branch(b, condition)


def branch_on_constant(b: Builder) -> None:
    """If on a constant."""
    _branch(b, b.constant(bool(b.rng.integers(2)), bool))


def branch_on_input(b: Builder) -> None:
    """If on an input of its own."""
    _branch(b, b.input(b.free("flag"), [], BOOL))


def _branch(b: Builder, condition: str) -> None:
    branches = []
    for outside in (True, False):
        nodes, constants, result = _inner_conv(b, b.name, outside=outside)
        branches.append(_graph(b, nodes, result, initializer=constants))
    b.name = b.node("If", condition, then_branch=branches[0], else_branch=branches[1])


def branch_without_layers(b: Builder) -> None:
    """If that hands one of two tensors on; both are read within only."""
    one, two = b.node("Abs", b.name), b.node("Neg", b.name)
    graphs = []
    for source in (one, two):
        name = b.free("handed")
        graphs.append(_graph(b, [helper.make_node("Identity", [source], [name])], name))
    condition = b.node("Less", b.scalar(b.name), b.constant(0.0))
    b.name = b.node("If", condition, then_branch=graphs[0], else_branch=graphs[1])


def loop(b: Builder) -> None:
    """Loop that applies one layer three times."""
    names = {n: b.free(n) for n in ("i", "go", "go_on", "state")}
    nodes, constants, result = _inner_conv(b, names["state"], outside=bool(b.rng.integers(2)))
    nodes.insert(0, helper.make_node("Identity", [names["go"]], [names["go_on"]]))
    body = _graph(
        b,
        nodes,
        result,
        inputs=[
            helper.make_tensor_value_info(names["i"], INT64, []),
            helper.make_tensor_value_info(names["go"], BOOL, []),
            helper.make_tensor_value_info(names["state"], b.kind, None),
        ],
        outputs=[
            helper.make_tensor_value_info(names["go_on"], BOOL, []),
            helper.make_tensor_value_info(result, b.kind, None),
        ],
        initializer=constants,
    )
    count, go = b.constant(3, np.int64), b.constant(True, bool)
    b.name = b.node("Loop", count, go, b.name, body=body)


def scan(b: Builder) -> None:
    """Scan over channels that adds them up."""
    if b.opset < 9:
        return
    total, row, added, given = (b.free(n) for n in ("total", "row", "added", "given"))
    infos = [helper.make_tensor_value_info(n, b.kind, None) for n in (total, row, added, given)]
    body = _graph(
        b,
        [
            helper.make_node("Add", [total, row], [added]),
            helper.make_node("Identity", [added], [given]),
        ],
        given,
        inputs=infos[:2],
        outputs=infos[2:],
    )
    turned = b.node("Transpose", b.name, perm=[1, 0, 2, 3])
    start = b.squeeze(b.slice(turned, 0, 1, 0), [0])
    b.node("Scan", start, turned, outputs=2, body=body, num_scan_inputs=1)
    b.name = b.node("Transpose", b.nodes[-1].output[1], perm=[1, 0, 2, 3])
    b.conv(b.shape[1], 1)


# ---------------------------------------------------------------------- sequences, text, optionals


def sequence(b: Builder) -> None:
    """A tensor that goes through a sequence."""
    if b.opset < 11:
        return
    parts = b.node("SequenceConstruct", b.name, b.node("Relu", b.name))
    if b.rng.random() < 0.5:
        b.name = b.node("ConcatFromSequence", parts, axis=1)
        b.shape = (b.shape[0], 2 * b.shape[1], *b.shape[2:])
    else:
        b.name = b.node("SequenceAt", parts, b.constant(1, np.int64))


def sequence_output(b: Builder) -> None:
    """A sequence as an output."""
    if b.opset < 11:
        return
    b.nodes.append(helper.make_node("SequenceConstruct", [b.name, b.name], ["parts"]))
    kind = helper.make_sequence_type_proto(tensor_type(b.kind, None))
    b.outputs.append(helper.make_value_info("parts", kind))


def sequence_input(b: Builder) -> None:
    """A sequence as an input."""
    if b.opset < 11:
        return
    kind = helper.make_sequence_type_proto(tensor_type(b.kind, None))
    b.inputs.append(helper.make_value_info("given_parts", kind))
    b.nodes.append(helper.make_node("SequenceLength", ["given_parts"], ["given_count"]))
    b.output("given_count", [], INT64)


def text_input(b: Builder) -> None:
    """Text beside the numbers."""
    b.input("words", ["W"], STRING)
    b.nodes.append(helper.make_node("Identity", ["words"], ["same_words"]))
    b.output("same_words", ["W"], STRING)


def text_constant(b: Builder) -> None:
    """Names of classes in the model."""
    b.constants.append(helper.make_tensor("labels", STRING, [2], [b"cat", "dög".encode()]))
    index = b.ints([0, 1, 1])
    b.nodes.append(helper.make_node("Gather", ["labels", index], ["names"]))
    b.output("names", [3], STRING)


def optional_value(b: Builder) -> None:
    """A tensor that goes through an optional."""
    if b.opset < 16:
        return
    b.name = b.node("OptionalGetElement", b.node("Optional", b.name))


def absent_inputs(b: Builder) -> None:
    """Operators whose optional inputs are left out in the middle."""
    if b.opset >= 11:
        b.apply("Clip", "", b.constant(4.0))
    if b.opset >= 13:
        sizes = b.constant([1, 1, 2, 2], np.float32)
        b.apply("Resize", "", sizes, mode="nearest")
        b.shape = (*b.shape[:2], *(2 * n for n in b.shape[2:]))
    b.conv(3, bias=False)
    b.nodes[-1].input.append("")


# ---------------------------------------------------------------------- sizes


def empty_part(b: Builder) -> None:
    """A tensor without values that is concatenated with others."""
    b.name = b.node("Concat", b.slice(b.name, 0, 0, 1), b.name, axis=1)
    b.conv(3)


def empty_output(b: Builder) -> None:
    """An output without values."""
    b.slice(b.name, 0, 0, 0)
    b.nodes[-1].output[0] = "nothing"
    b.output("nothing", None)


def empty_constant(b: Builder) -> None:
    """A constant without values."""
    empty = b.constant(np.zeros((0,)))
    flat = b.node("Reshape", b.name, b.ints([-1]))
    b.nodes.append(helper.make_node("Concat", [flat, empty], ["flat"], axis=0))
    b.output("flat", [None])


def found_positions(b: Builder) -> None:
    """A result whose size depends on values."""
    if b.opset < 9:
        return
    b.nodes.append(helper.make_node("NonZero", [b.node("Relu", b.name)], ["positions"]))
    b.output("positions", None, INT64)


def computed_shape(b: Builder) -> None:
    """Reshape to a size that the graph computes."""
    size = b.node("Shape", b.name)
    flat = b.node("Reshape", b.name, b.ints([0, b.shape[1], -1]))
    b.name = b.node("Reshape", b.node("Relu", flat), size)
    b.conv(4)


def expanded(b: Builder) -> None:
    """A constant that is expanded to the size of a tensor."""
    if b.opset >= 8:
        b.apply("Add", b.node("Expand", b.constant([0.5]), b.node("Shape", b.name)))


# ---------------------------------------------------------------------- weights


def shared_weight(b: Builder) -> None:
    """Two layers and another operator that read one weight, and one bias."""
    c = b.shape[1]
    weight, bias = b.constant(b.weight((c, c, 3, 3))), b.constant(b.rng.normal(0, 0.2, c))
    b.apply("Conv", weight, bias, pads=[1] * 4)
    b.apply("Relu")
    b.apply("Conv", weight, bias, pads=[2] * 4, dilations=[2, 2])
    b.apply("Mul", b.scalar(weight))
    b.apply("Add", b.unsqueeze(bias, [1, 2]))


def computed_weight(b: Builder) -> None:
    """A weight that constants make, one way or another."""
    c = b.shape[1]
    array = b.weight((c, c, 1, 1))
    how = int(b.rng.integers(6))
    if how == 0:
        name = b.free("made")
        value = numpy_helper.from_array(array.astype(b.dtype), name)
        b.nodes.append(helper.make_node("Constant", [], [name], value=value))
    elif how == 1:
        name = b.node("Transpose", b.constant(array), perm=[1, 0, 2, 3])
    elif how == 2:
        name = b.node("Identity", b.constant(array))
    elif how == 3:
        name = b.node("Cast", b.constant(array, np.float64), to=b.kind)
    elif how == 4 and b.opset >= 9:
        value = numpy_helper.from_array(np.array([0.3], b.dtype))
        name = b.node("ConstantOfShape", b.ints([c, c, 1, 1]), value=value)
    else:
        name = b.node("Mul", b.constant(array), b.constant(0.7))
    b.apply("Conv", name)


def dynamic_weight(b: Builder) -> None:
    """A convolution whose weight the input decides about."""
    gain = b.node("Sigmoid", b.scalar(b.name))
    c = b.shape[1]
    b.apply("Conv", b.node("Mul", b.constant(b.weight((c, c, 1, 1))), gain))


def weight_from_input(b: Builder) -> None:
    """A convolution whose weight is an input."""
    c = b.shape[1]
    b.apply("Conv", b.input(b.free("kernel"), [c, c, 1, 1], b.kind))
    b.apply("Mul", b.constant(0.3))


def unusual_weight(b: Builder) -> None:
    """Weights that are zero, tiny, or alike."""
    c = b.shape[1]
    array = b.weight((c, c, 1, 1))
    how = int(b.rng.integers(5))
    if how == 0:
        array[:] = 0
    elif how == 1:
        array *= 1e-12
    elif how == 2:
        array[0] = 0
    elif how == 3:
        array[:] = 0.5
    else:
        array[0] *= 1e-9
    source = b.name
    b.apply("Conv", b.constant(array), b.constant(b.rng.normal(0, 0.3, c)))
    b.apply("Add", source)


def large_weight(b: Builder) -> None:
    """Weights of a size that integers of 32 bits do not hold beside their inputs."""
    c = b.shape[1]
    scale = 1e4 if b.dtype == np.float16 else 1e9
    b.apply("Conv", b.constant(b.weight((c, c, 1, 1)) * scale / 100))
    b.apply("Mul", b.constant(100 / scale))


def not_a_number(b: Builder) -> None:
    """A weight with NaN."""
    array = b.weight((b.shape[1], b.shape[1], 1, 1))
    array.flat[0] = np.nan
    b.apply("Conv", b.constant(array))


def packed_gemm(b: Builder) -> None:
    """Gemm with alpha, beta, transposed inputs and a scalar bias, over flattened positions."""
    n, c, h, w = b.shape
    flat = b.node("Reshape", b.name, b.ints([c, -1]))
    weight = b.constant(b.weight((5, c)))
    bias = b.constant(b.rng.normal(0, 0.3, (1, 5)))
    name = b.node("Gemm", flat, weight, bias, alpha=0.5, beta=2.0, transA=1, transB=1)
    b.name = b.node("Reshape", name, b.ints([-1, 5, 1, 1]))
    b.shape = (n * h * w, 5, 1, 1)


def vectors(b: Builder) -> None:
    """MatMul with a vector, and with a batch of matrices."""
    width = b.shape[3]
    b.apply("MatMul", b.constant(b.weight((b.shape[1], width, width))))
    vector = b.node("MatMul", b.name, b.constant(b.weight((width,))))
    b.name = b.node("Add", b.name, b.unsqueeze(vector, [3]))


def attention(b: Builder) -> None:
    """Attention over positions."""
    c = b.shape[1]
    rows = b.node("Transpose", b.node("Reshape", b.name, b.ints([0, c, -1])), perm=[0, 2, 1])
    q, k, v = (b.node("MatMul", rows, b.constant(b.weight((c, c)))) for _ in range(3))
    scores = b.node("MatMul", q, b.node("Transpose", k, perm=[0, 2, 1]))
    mixed = b.node("MatMul", b.node("Softmax", scores, axis=2), v)
    back = b.node("Transpose", mixed, perm=[0, 2, 1])
    b.name = b.node("Reshape", back, b.node("Shape", b.name))


def layer_norm(b: Builder) -> None:
    """LayerNormalization, as an operator where there is one."""
    size = b.shape[-1:]
    values = b.constant(b.rng.normal(1, 0.2, size)), b.constant(b.rng.normal(0, 0.2, size))
    if b.opset >= 17:
        b.apply("LayerNormalization", *values, axis=-1)
        return
    centred = b.node("Sub", b.name, b.reduce_mean(b.name, [-1]))
    square = b.reduce_mean(b.node("Mul", centred, centred), [-1])
    deviation = b.node("Sqrt", b.node("Add", square, b.constant(1e-4)))
    b.name = b.node("Div", centred, deviation)
    b.apply("Mul", values[0])
    b.apply("Add", values[1])


def recurrent(b: Builder) -> None:
    """An LSTM or a GRU over positions."""
    c, gates = b.shape[1], {"LSTM": 4, "GRU": 3, "RNN": 1}
    op = str(b.rng.choice([*gates]))
    rows = b.node("Reshape", b.name, b.ints([0, c, -1]))
    steps = b.node("Transpose", rows, perm=[2, 0, 1])
    shapes = [(1, gates[op] * 4, n) for n in (c, 4)]
    weights = [b.constant(b.weight(s) * 0.5) for s in shapes]
    found = b.squeeze(b.node(op, steps, *weights, hidden_size=4), [1])
    b.name = b.unsqueeze(b.node("Transpose", found, perm=[1, 2, 0]), [3])
    b.shape = (b.shape[0], 4, int(np.prod(b.shape[2:])), 1)


def einsum(b: Builder) -> None:
    """A layer written as Einsum."""
    if b.opset >= 12:
        c = b.shape[1]
        b.name = b.node("Einsum", b.name, b.constant(b.weight((c, c))), equation="nchw,cd->ndhw")


def odd_convolutions(b: Builder) -> None:
    """Convolutions with automatic and uneven padding, dilation, and of one dimension."""
    c = b.shape[1]
    b.apply("Conv", b.constant(b.weight((c, c, 2, 2))), auto_pad="SAME_UPPER")
    b.apply("Conv", b.constant(b.weight((c, c, 3, 3))), dilations=[2, 2], pads=[1, 2, 3, 2])
    rows = b.node("Reshape", b.name, b.ints([0, c, -1]))
    rows = b.node("Conv", rows, b.constant(b.weight((c, c, 3))), pads=[1, 1])
    b.name = b.node("Reshape", rows, b.node("Shape", b.name))


def upsampling(b: Builder) -> None:
    """Resize, as each operator set has it."""
    scales = [1.0, 1.0, 2.0, 2.0]
    if b.opset < 9:
        b.apply("Upsample", scales=scales, mode="nearest")
    elif b.opset < 10:
        b.apply("Upsample", b.constant(scales, np.float32), mode="nearest")
    elif b.opset < 11:
        b.apply("Resize", b.constant(scales, np.float32), mode="linear")
    else:
        empty = b.constant(np.zeros(0), np.float32)
        b.apply("Resize", empty, b.constant(scales, np.float32), mode="linear")
    b.shape = (*b.shape[:2], *(2 * n for n in b.shape[2:]))


def movement(b: Builder) -> None:
    """Data that is moved to and fro between layers."""
    b.conv(4)
    one, two = b.split(b.name, [1, 3], 1)
    b.name = b.node("Concat", two, one, axis=1)
    b.pad([0, 0, 1, 1, 0, 0, 1, 1], str(b.rng.choice(["constant", "reflect", "edge"])))
    b.apply("Transpose", perm=[0, 1, 3, 2])
    b.name = b.slice(b.name, 1, -1, 2)
    b.name = b.slice(b.name, 1, -1, 3)
    b.apply("SpaceToDepth", blocksize=2)
    b.apply("DepthToSpace", blocksize=2)
    b.conv(4)


def integers(b: Builder) -> None:
    """A detour through integers and booleans."""
    mask = b.node("Greater", b.name, b.constant(0.0))
    b.apply("Mul", b.node("Cast", mask, to=b.kind))
    b.conv(3)


def chosen(b: Builder) -> None:
    """Where, Min, Max, Sum of several tensors."""
    b.conv(3)
    other = b.node("Tanh", b.name)
    if b.opset >= 9:
        mask = b.node("Greater", b.name, b.constant(0.0))
        b.name = b.node("Where", mask, b.name, other)
    b.apply("Max", other, b.node("Neg", other))
    b.apply("Sum", other, other)
    b.conv(3)


def functions_of_numbers(b: Builder) -> None:
    """Functions that are applied to each number."""
    ops = ["Erf", "Softplus", "Softsign", "Elu", "Selu", "HardSigmoid", "Abs", "Exp", "Celu"]
    for op in b.rng.choice(ops, 3):
        b.conv(4)
        if (op == "Erf" and b.opset < 9) or (op == "Celu" and b.opset < 12):
            continue
        if op == "Exp":
            b.apply("Tanh")
        b.apply(str(op))


def dropout(b: Builder) -> None:
    """Dropout and its mask."""
    b.conv(3)
    b.apply("Dropout", outputs=2 if b.opset >= 10 else 1)
    b.apply("Identity")


def normalizations(b: Builder) -> None:
    """InstanceNormalization, LRN, LpNormalization."""
    c = b.shape[1]
    b.apply("InstanceNormalization", b.constant(np.ones(c)), b.constant(np.zeros(c)))
    b.conv(4)
    b.apply("LRN", size=3)
    b.apply("LpNormalization", axis=1)


# ---------------------------------------------------------------------- domains and functions


def microsoft(b: Builder) -> None:
    """Operators of onnxruntime's own."""
    b.domains["com.microsoft"] = 1
    b.conv(4)
    b.apply("QuickGelu", domain="com.microsoft", alpha=1.702)
    b.apply("Gelu", domain="com.microsoft")
    b.conv(4)
    c = b.shape[1]
    b.apply(
        "FusedConv",
        b.constant(b.weight((c, c, 1, 1))),
        domain="com.microsoft",
        activation="Relu",
    )


def unknown_domain(b: Builder) -> None:
    """An operator that nothing knows."""
    b.domains["my.own"] = 1
    b.apply("Mystery", domain="my.own", level=3)


def function(b: Builder) -> None:
    """A local function with a layer in it, called twice."""
    if b.opset < 16:
        return
    b.ir_version = max(b.ir_version, 8)
    b.domains["local"] = 1
    nodes = [
        helper.make_node("Conv", ["a", "weight"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
    ]
    if not any(f.name == "Block" for f in b.functions):
        made = helper.make_function(
            "local", "Block", ["a", "weight"], ["d"], nodes, [helper.make_opsetid("", b.opset)]
        )
        b.functions.append(made)
    c = b.shape[1]
    for _ in range(2):
        b.apply("Block", b.constant(b.weight((c, c, 1, 1))), domain="local")


def function_named_like_an_operator(b: Builder) -> None:
    """A local function called Relu that is another one; and one that calls it."""
    if b.opset < 16:
        return
    b.domains["own.relu"] = 1
    opset = [helper.make_opsetid("", b.opset), helper.make_opsetid("own.relu", 1)]
    inner = [helper.make_node("Tanh", ["a"], ["b"])]
    outer = [helper.make_node("Relu", ["a"], ["b"], domain="own.relu")]
    for name, nodes in (("Relu", inner), ("Conv", outer)):
        made = helper.make_function("own.relu", name, ["a"], ["b"], nodes, opset)
        b.functions.append(made)
    b.conv(3)
    b.apply("Conv", domain="own.relu")
    b.conv(3)


# ---------------------------------------------------------------------- ends


def output_is_input(b: Builder) -> None:
    """An input that is an output, too."""
    b.outputs.append(onnx.ValueInfoProto.FromString(b.inputs[0].SerializeToString()))


def output_is_constant(b: Builder) -> None:
    """Constants that are outputs."""
    b.output(b.constant([1.0, 2.0], name="anchors"), [2])
    if b.opset < 9:
        return
    value = numpy_helper.from_array(np.array([3, 4]), "v")
    b.nodes.append(helper.make_node("Constant", [], ["strides"], value=value))
    b.output("strides", [2], INT64)


def weight_is_output(b: Builder) -> None:
    """A weight that is an output."""
    weights = [t for t in b.constants if len(t.dims) == 4 and t.data_type == b.kind]
    if weights:
        b.output(weights[0].name, list(weights[0].dims))


def inner_outputs(b: Builder) -> None:
    """Every tensor behind a layer is an output."""
    for node in b.nodes[:-1]:
        if node.op_type == "Conv" and not node.domain:
            b.output(node.output[0], None)


def classes(b: Builder) -> None:
    """The best class and the best three."""
    b.nodes.append(helper.make_node("ArgMax", [b.name], ["best"], axis=1, keepdims=0))
    b.output("best", None, INT64)
    b.nodes.append(helper.make_node("Identity", [b.name], ["same"]))
    b.output("same", None)


def unused_parts(b: Builder) -> None:
    """Initializers, nodes and inputs that nothing reads."""
    b.constant(np.ones((3, 3)), name="nobody_reads_me")
    b.input("nobody_either", [2, 2], b.kind)
    b.nodes.append(helper.make_node("Relu", [b.inputs[0].name], ["dead_end"]))


def more_inputs(b: Builder) -> None:
    """An input that joins late, of another size."""
    b.input("bias_of_the_day", [1], b.kind)
    b.nodes.append(helper.make_node("Add", [b.name, "bias_of_the_day"], ["late"]))
    b.output("late", None)


def indices(b: Builder) -> None:
    """A table that integers index."""
    b.input("tokens", ["N", 4], INT64)
    rows = b.node("Gather", b.constant(b.rng.normal(0, 1, (11, 6))), "tokens")
    b.nodes.append(helper.make_node("MatMul", [rows, b.constant(b.weight((3, 6)).T)], ["embedded"]))
    b.output("embedded", None)


def quantized_part(b: Builder) -> None:
    """A part that is quantized already."""
    if b.opset < 10 or b.dtype != np.float32:
        return
    scale, zero = b.constant(0.1), b.constant(128, np.uint8)
    codes = b.node("QuantizeLinear", b.name, scale, zero)
    b.nodes.append(helper.make_node("DequantizeLinear", [codes, scale, zero], ["rounded"]))
    b.output("rounded", None)


STEPS: tuple[Callable[[Builder], None], ...] = (
    *(branch_on_value, branch_on_constant, branch_on_input, branch_without_layers, loop, scan),
    *(sequence, optional_value, absent_inputs, empty_part, computed_shape, expanded),
    *(shared_weight, computed_weight, dynamic_weight, weight_from_input, unusual_weight),
    *(large_weight, not_a_number, packed_gemm, vectors, attention, layer_norm, recurrent, einsum),
    *(odd_convolutions, upsampling, movement, integers, chosen, functions_of_numbers, dropout),
    *(normalizations, microsoft, unknown_domain, function, function_named_like_an_operator),
)
ENDS: tuple[Callable[[Builder], None], ...] = (
    *(sequence_output, sequence_input, text_input, text_constant, empty_output, empty_constant),
    *(found_positions, output_is_input, output_is_constant, weight_is_output, inner_outputs),
    *(classes, unused_parts, more_inputs, indices, quantized_part),
)

# ---------------------------------------------------------------------- finishing touches


def unnamed_nodes(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """No node has a name."""
    for node in model.graph.node:
        node.name = ""


def duplicate_names(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """All nodes have one name, that of a tensor."""
    for node in model.graph.node:
        node.name = model.graph.output[0].name


def strange_names(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Names with separators, spaces and letters of other languages."""
    for number, node in enumerate(model.graph.node):
        node.name = f"/módulo {number}/::{node.op_type}[0]*?"
    renamed = {}
    inner = {a.g.name for n in model.graph.node for a in n.attribute if a.HasField("g")}
    if inner:
        return
    for tensor in model.graph.initializer:
        renamed[tensor.name] = f"net.0/重み:{tensor.name} *"
        tensor.name = renamed[tensor.name]
    for node in model.graph.node:
        node.input[:] = [renamed.get(n, n) for n in node.input]
    for info in model.graph.output:
        info.name = renamed.get(info.name, info.name)


def names_of_ours(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Names that onnxq likes to give itself."""
    for number, node in enumerate(model.graph.node):
        node.name = ("QuantizeLinear", "x_quantized", "DequantizeLinear")[number % 3] + str(number)
    model.graph.input[0].doc_string = "what comes in"


def initializers_are_inputs(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """As before IR version 4."""
    if model.opset_import[0].version <= 8 and not model.functions:
        model.ir_version = 3
    have = {i.name for i in model.graph.input}
    for t in model.graph.initializer:
        if t.name not in have:
            info = helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
            model.graph.input.append(info)


def sparse_weight(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A weight in sparse form."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4 and array.dtype == np.float32 and np.isfinite(array).all():
            places = np.flatnonzero(array)
            values = numpy_helper.from_array(array.flat[places], tensor.name)
            index = numpy_helper.from_array(places.astype(np.int64))
            made = helper.make_sparse_tensor(values, index, list(array.shape))
            model.graph.sparse_initializer.append(made)
            model.graph.initializer.remove(tensor)
            return


def metadata(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Documentation and properties everywhere."""
    model.doc_string, model.domain, model.model_version = "a model", "org.example", 7
    helper.set_model_props(model, {"classes": "a,b", "": "empty key", "unicode": "ß"})
    model.graph.doc_string = "a graph"
    for node in model.graph.node:
        node.doc_string = f"line one\nline two of {node.op_type}"


def no_output_shapes(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Outputs of which nothing but the element type is known."""
    for info in model.graph.output:
        if info.type.WhichOneof("value") == "tensor_type":
            info.type.tensor_type.ClearField("shape")


def inferred_shapes(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """The shapes of all tensors that onnx infers."""
    inferred = onnx.shape_inference.infer_shapes(model)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)


def wrong_shapes(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Outputs and tensors that are said to be of symbolic sizes that nothing knows."""
    for info in model.graph.output:
        kind = info.type.tensor_type
        if info.type.WhichOneof("value") == "tensor_type" and kind.HasField("shape"):
            for number, dim in enumerate(kind.shape.dim):
                dim.dim_param = f"unk__{number}"


def long_domain(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """The standard domain by its long name."""
    if model.functions or len(model.opset_import) > 1:
        return
    for node in model.graph.node:
        node.domain = "ai.onnx"
    model.opset_import[0].domain = "ai.onnx"


FINISHES: tuple[Callable[[onnx.ModelProto, np.random.Generator], None], ...] = (
    *(
        inferred_shapes,
        unnamed_nodes,
        duplicate_names,
        strange_names,
        names_of_ours,
        initializers_are_inputs,
    ),
    *(sparse_weight, metadata, no_output_shapes, wrong_shapes, long_domain),
)
