"""Small models: ONNX text with weights drawn at random, random chains for hypothesis, the zoo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq.model import load

ZOO = (
    *("cifar_resnet20", "cifar_resnet56", "cifar_vit", "espcn_x3", "espnet_camvid", "m5_speech"),
    *("magika", "mobilenetv1_075", "mobilenetv2", "silero_vad", "simplepose", "ultraface_rfb320"),
    *("vww_mobilenetv1_025", "yolox_nano"),
)


def parse(text: str, *, opset: int = 17, seed: int = 0, **values: object) -> onnx.ModelProto:
    """A model from ONNX text, the part that begins with the name of the graph.

    Tensors declared in <...> after the signature that no node puts out become initializers: drawn
    at random, above zero where the name contains ``var``, or given as a keyword argument.  Outputs
    written as ``float[] y`` get the shape that onnx infers.

        parse("g (float[N,3,8,8] x) => (float[N,4,6,6] y) <float[4,3,3,3] w> { y = Conv(x, w) }")
    """
    head = f'<ir_version: 8, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{head}\n{text.replace('<>', '')}")
    made = {name for node in proto.graph.node for name in node.output}
    declared = [info for info in proto.graph.value_info if info.name not in made]
    kept = [info for info in proto.graph.value_info if info.name in made]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    rng = np.random.default_rng(seed)
    for info in declared:
        kind = info.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        array = np.asarray(values[info.name] if info.name in values else _draw(rng, info, shape))
        array = np.broadcast_to(array, shape).astype(dtype)
        proto.graph.initializer.append(numpy_helper.from_array(array, info.name))
    inferred = onnx.shape_inference.infer_shapes(proto)
    for info, known in zip(proto.graph.output, inferred.graph.output, strict=True):
        info.CopyFrom(known)
    return proto


def _draw(rng: np.random.Generator, info: onnx.ValueInfoProto, shape: list[int]) -> np.ndarray:
    if info.type.tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, 11):
        raise ValueError(f"{info.name}: give a value for what is not floating point")
    if "var" in info.name:
        return rng.uniform(0.5, 2.0, shape)
    return rng.normal(size=shape)


def feeds(
    model: onnx.ModelProto, *, seed: int = 1, batch: int = 2, size: int = 16
) -> dict[str, np.ndarray]:
    """Random inputs; free dimensions are `batch` in front or where so called, else `size`."""
    rng = np.random.default_rng(seed)
    constants = {t.name for t in model.graph.initializer}
    result = {}
    for info in model.graph.input:
        if info.name in constants:
            continue
        kind = info.type.tensor_type
        shape = [
            d.dim_value
            if d.HasField("dim_value")
            else (batch if axis == 0 or d.dim_param == "batch" else size)
            for axis, d in enumerate(kind.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype.kind == "f":
            result[info.name] = rng.normal(size=shape).astype(dtype)
        else:
            result[info.name] = rng.integers(0, 2, shape).astype(dtype)
    return result


def zoo(name: str) -> Path:
    """The file of a zoo model; skips the test where there is no zoo."""
    folder = os.environ.get("ONNXQ_ZOO")
    if not folder:
        pytest.skip("set ONNXQ_ZOO to the folder of the model zoo")
    return Path(folder) / "models" / f"{name}.onnx"


def zoo_samples(name: str, folder: Path, limit: int) -> Path:
    """Calibration samples of a zoo model, written into a folder by the zoo's own script."""
    source = zoo(name)
    script = source.parent.parent / "calib.py"
    command = [sys.executable, str(script), str(source), str(folder), "--limit", str(limit)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


# ---------------------------------------------------------------------- random chains


class ChainBuilder:
    """Builds a model node by node; keeps track of channels and sizes, so that every one is valid.

    Args:
        spatial: Sizes of the input's spatial axes.
        channels: Channels of the input.
        seed: Seed of the weights.
    """

    def __init__(self, spatial: tuple[int, ...], channels: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info(
            "x", TensorProto.FLOAT, ["N", channels, *spatial]
        )
        self.name, self.channels, self.spatial = "x", channels, spatial

    def constant(self, array: np.ndarray, dtype: type = np.float32) -> str:
        """Add an initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, op: str, *inputs: str, **attrs: object) -> str:
        """Add a node with one output; returns the name of the output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, inputs, [name], name=f"{op}_{len(self.nodes)}", **attrs)
        )
        return name

    def norm(self, name: str, channels: int) -> str:
        """Add a BatchNormalization with scales of either sign, one of them zero."""
        gamma, beta, mean = self.rng.normal(size=(3, channels))
        gamma[self.rng.integers(channels)] = 0
        parameters = [gamma, beta, mean, self.rng.uniform(0.3, 2, channels)]
        return self.node("BatchNormalization", name, *map(self.constant, parameters), epsilon=1e-3)

    def build(self) -> onnx.ModelProto:
        """The model, whose output is the tensor that the chain has come to."""
        shape = ["N", self.channels, *self.spatial]
        output = helper.make_tensor_value_info(self.name, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "chain", [self.input], [output], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@st.composite
def chains(draw: st.DrawFn, *, most: int = 7) -> onnx.ModelProto:
    """Random small chains of convolutions, normalizations and what stands between them."""
    spatial = draw(st.sampled_from([(9,), (9, 8)]))
    seed, channels = draw(st.integers(0, 999)), draw(st.sampled_from([2, 4]))
    chain = ChainBuilder(spatial, channels, seed)
    steps = (_conv, _conv, _norm, _norm, _activation, _residual, _concat, _transposed, _pool)
    for step in draw(st.lists(st.sampled_from(steps), min_size=1, max_size=most)):
        step(draw, chain)
    return chain.build()


@st.composite
def chains_with_dead_channels(draw: st.DrawFn) -> onnx.ModelProto:
    """Random chains of which some layers have channels of weights about zero on either side.

    What such weights put out is nothing even beside an output that is small by chance.
    """
    model = load(draw(chains()))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    for layer in model.layers():
        rows = rng.choice([0.0, 1e-20, 1.0], layer.output_channels, p=[0.2, 0.2, 0.6])
        columns = rng.choice([0.0, 1.0], layer.input_channels, p=[0.2, 0.8])
        weight = layer.weight * layer.along_outputs(rows) * layer.along_inputs(columns)
        layer.set_weight(weight.astype(np.float32))
    return model.to_proto()


def _conv(draw: st.DrawFn, chain: ChainBuilder) -> None:
    group = draw(st.sampled_from([g for g in (1, 2, chain.channels) if chain.channels % g == 0]))
    outputs = group * draw(st.sampled_from([1, 2])) if group > 1 else draw(st.integers(1, 5))
    attrs, spatial = _window(draw, chain)
    weight = chain.rng.normal(
        size=(outputs, chain.channels // group, *attrs["kernel_shape"])  # type: ignore[misc]
    )
    inputs = [chain.name, chain.constant(weight)]
    if draw(st.booleans()):
        inputs.append(chain.constant(chain.rng.normal(size=outputs)))
    chain.name = chain.node("Conv", *inputs, group=group, **attrs)
    chain.channels, chain.spatial = outputs, spatial


def _window(draw: st.DrawFn, chain: ChainBuilder) -> tuple[dict[str, object], tuple[int, ...]]:
    """Attributes of a convolution that leave at least one position, and what they leave."""
    rank = len(chain.spatial)
    kernel = draw(st.sampled_from([1, 2, 3]))
    stride = draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.sampled_from(["none", "none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    # onnxruntime has no auto_pad with dilations
    dilation = draw(st.sampled_from([1, 2])) if padding in ("none", "pads") else 1
    attrs: dict[str, object] = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank}
    before, after = 0, 0
    if padding == "pads":
        before, after = draw(st.sampled_from([(1, 1), (0, 1), (2, 0)]))
        attrs["pads"] = [before] * rank + [after] * rank
    elif padding != "none":
        attrs["auto_pad"] = padding
    if padding.startswith("SAME"):
        return attrs, tuple(-(-n // stride) for n in chain.spatial)
    extent = dilation * (kernel - 1) + 1
    if min(chain.spatial) + before + after < extent:
        return {"kernel_shape": [1] * rank}, chain.spatial
    attrs["dilations"] = [dilation] * rank
    return attrs, tuple((n + before + after - extent) // stride + 1 for n in chain.spatial)


def _norm(draw: st.DrawFn, chain: ChainBuilder) -> None:
    chain.name = chain.norm(chain.name, chain.channels)


def _activation(draw: st.DrawFn, chain: ChainBuilder) -> None:
    chain.name = chain.node(draw(st.sampled_from(["Relu", "Sigmoid", "Identity"])), chain.name)


def _residual(draw: st.DrawFn, chain: ChainBuilder) -> None:
    branch = chain.norm(chain.name, chain.channels) if draw(st.booleans()) else chain.name
    chain.name = chain.node("Add", branch, chain.name)


def _concat(draw: st.DrawFn, chain: ChainBuilder) -> None:
    names, total = [], 0
    for _ in range(draw(st.integers(1, 3))):
        outputs = draw(st.integers(1, 3))
        shape = (outputs, chain.channels, *[1] * len(chain.spatial))
        name = chain.node("Conv", chain.name, chain.constant(chain.rng.normal(size=shape)))
        names.append(chain.norm(name, outputs) if draw(st.booleans()) else name)
        total += outputs
    axis = draw(st.sampled_from([1, -1 - len(chain.spatial)]))
    chain.name, chain.channels = chain.node("Concat", *names, axis=axis), total


def _transposed(draw: st.DrawFn, chain: ChainBuilder) -> None:
    group = draw(st.sampled_from([g for g in (1, 2, chain.channels) if chain.channels % g == 0]))
    per_group = draw(st.integers(1, 2))
    rank = len(chain.spatial)
    weight = chain.rng.normal(size=(chain.channels, per_group, *[2] * rank))
    chain.name = chain.node(
        "ConvTranspose", chain.name, chain.constant(weight), group=group, strides=[2] * rank
    )
    chain.channels = group * per_group
    chain.spatial = tuple(2 * n for n in chain.spatial)


def _pool(draw: st.DrawFn, chain: ChainBuilder) -> None:
    rank = len(chain.spatial)
    if min(chain.spatial) >= 2:
        chain.name = chain.node("MaxPool", chain.name, kernel_shape=[2] * rank)
        chain.spatial = tuple(n - 1 for n in chain.spatial)


# ---------------------------------------------------------------------- random networks


@st.composite
def networks(draw: st.DrawFn, *, most: int = 8) -> onnx.ModelProto:
    """Random small networks: layers, and all that may join them in integers or break the flow."""
    spatial = draw(st.sampled_from([(9,), (9, 8)]))
    seed, channels = draw(st.integers(0, 999)), draw(st.sampled_from([2, 4]))
    chain = ChainBuilder(spatial, channels, seed)
    steps = (_conv, _conv, _nonlinear, _nonlinear, _residual, _concat, _pool, _average)
    steps = (*steps, _gate, _padded, _halves, _turned, _scaled_by, _island, _beside)
    picked = draw(st.lists(st.sampled_from(steps), min_size=1, max_size=most))
    picked.insert(draw(st.integers(0, len(picked))), _conv)
    for step in picked:
        step(draw, chain)
    if draw(st.booleans()):
        _head(draw, chain)
    return chain.build()


def _nonlinear(draw: st.DrawFn, chain: ChainBuilder) -> None:
    op = draw(st.sampled_from(["Relu", "Clip", "Clip", "LeakyRelu", "Sigmoid"]))
    limits = draw(st.sampled_from([(0, 6), (0.5, 3), (-0.3, 2.7)])) if op == "Clip" else ()
    chain.name = chain.node(op, chain.name, *(chain.constant(np.array(n)) for n in limits))


def _average(draw: st.DrawFn, chain: ChainBuilder) -> None:
    if min(chain.spatial) >= 2:
        size = [2] * len(chain.spatial)
        chain.name = chain.node("AveragePool", chain.name, kernel_shape=size)
        chain.spatial = tuple(n - 1 for n in chain.spatial)


def _gate(draw: st.DrawFn, chain: ChainBuilder) -> None:
    gate = chain.node(draw(st.sampled_from(["Sigmoid", "HardSigmoid", "Tanh"])), chain.name)
    chain.name = chain.node("Mul", *draw(st.permutations([chain.name, gate])))


def _padded(draw: st.DrawFn, chain: ChainBuilder) -> None:
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    rank = len(chain.spatial)
    pads = np.array([0, 0, *[before] * rank, 0, 0, *[after] * rank])
    mode = draw(st.sampled_from(["constant", "edge", "reflect"]))
    if mode == "reflect" and max(before, after) >= min(chain.spatial):
        mode = "edge"
    chain.name = chain.node("Pad", chain.name, chain.constant(pads, np.int64), mode=mode)
    chain.spatial = tuple(n + before + after for n in chain.spatial)


def _halves(draw: st.DrawFn, chain: ChainBuilder) -> None:
    """Split channels, do something to the first half, put both together in another order."""
    first = draw(st.integers(1, chain.channels))
    if first == chain.channels:
        return
    sizes = chain.constant(np.array([first, chain.channels - first]), np.int64)
    one = chain.node("Split", chain.name, sizes, axis=1)
    two = f"{one}_rest"
    chain.nodes[-1].output.append(two)
    one = chain.node(draw(st.sampled_from(["Relu", "Tanh", "Identity"])), one)
    chain.name = chain.node("Concat", *draw(st.permutations([one, two])), axis=1)


def _turned(draw: st.DrawFn, chain: ChainBuilder) -> None:
    order = [0, 1, *reversed(range(2, 2 + len(chain.spatial)))]
    chain.name = chain.node("Transpose", chain.name, perm=order)
    chain.spatial = chain.spatial[::-1]


def _scaled_by(draw: st.DrawFn, chain: ChainBuilder) -> None:
    values = chain.rng.uniform(0.5, 2, (chain.channels, *[1] * len(chain.spatial)))
    op = draw(st.sampled_from(["Add", "Mul"]))
    chain.name = chain.node(op, *draw(st.permutations([chain.name, chain.constant(values)])))


def _island(draw: st.DrawFn, chain: ChainBuilder) -> None:
    chain.name = chain.node(draw(st.sampled_from(["Tanh", "Abs", "Erf", "Softsign"])), chain.name)


def _beside(draw: st.DrawFn, chain: ChainBuilder) -> None:
    """A tensor that a layer and a float operator read, side by side."""
    shape = (chain.channels, chain.channels, *[1] * len(chain.spatial))
    layer = chain.node("Conv", chain.name, chain.constant(chain.rng.normal(size=shape)))
    other = chain.node(draw(st.sampled_from(["Tanh", "Relu"])), chain.name)
    chain.name = chain.node("Add", *draw(st.permutations([layer, other])))


def _head(draw: st.DrawFn, chain: ChainBuilder) -> None:
    chain.name = chain.node("Flatten", chain.node("GlobalAveragePool", chain.name))
    weight = chain.constant(chain.rng.normal(size=(chain.channels, 3)))
    if draw(st.booleans()):
        chain.name = chain.node(
            "Gemm", chain.name, weight, chain.constant(chain.rng.normal(size=3))
        )
    else:
        chain.name = chain.node("MatMul", chain.name, weight)
    chain.channels, chain.spatial = 3, ()
