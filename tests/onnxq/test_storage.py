"""How weights lie in a file, of models that any tool may have written."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq.analysis.cost import layer_costs
from onnxq.analysis.fusion import integer_share
from onnxq.analysis.storage import Storage, storage
from onnxq.model import load

HEAD = "(float[N,8] x) => (float[N,4] y)"
Q = "xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)"


def build(body, *constants):
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g {HEAD} {{ {body} }}'
    )
    grid = [
        numpy_helper.from_array(np.float32(0.1), "s"),
        numpy_helper.from_array(np.uint8(7), "z"),
    ]
    proto.graph.initializer.extend([*grid, *constants])
    onnx.checker.check_model(proto)
    return proto


def weight(kind, values):
    return helper.make_tensor("w", kind, (8, 4), np.resize(values, 32))


def blocks(*values):
    return numpy_helper.from_array(np.resize(np.float32(values), (2, 4)), "b")


@pytest.mark.parametrize(
    ("values", "bits"),
    [([0], 1), ([-1], 1), ([1], 2), ([-2, 1], 2), ([-3, 1], 3), ([3], 3), ([4], 4), ([-8, 7], 4)],
)
def test_bits_are_those_of_the_values(values, bits):
    body = "wd = DequantizeLinear(w, s) y = MatMul(x, wd)"
    wanted = [Storage("int4", "", 0, bits, 1, 32)]
    assert storage(load(build(body, weight(TensorProto.INT4, values)))) == wanted


@pytest.mark.parametrize(("values", "bits"), [([0, 3], 2), ([15], 4), ([128], 8)])
def test_bits_of_unsigned_values(values, bits):
    body = "wd = DequantizeLinear(w, s) y = MatMul(x, wd)"
    (found,) = storage(load(build(body, weight(TensorProto.UINT8, values))))
    assert (found.stored, found.bits) == ("uint8", bits)
    assert str(found) == f"1 of 32 values, {bits}-bit, uint8 in the file"


def test_unpacked_weights():
    body = f"{Q} u = Cast<to=3>(w) wd = DequantizeLinear(u, s) [fc] y = MatMul(xd, wd)"
    model = load(build(body, weight(TensorProto.INT4, np.arange(-8, 8))))
    (found,) = storage(model)
    assert found == Storage("int4", "int8", 0, 4, 1, 32)
    assert str(found) == (
        "1 of 32 values, 4-bit, packed in the file, unpacked to int8 when the model is loaded"
    )
    (cost,) = layer_costs(model, {})
    assert (cost.parameters, cost.nbytes) == (32, 16)
    assert (cost.weight_bits, cost.activation_bits) == (4, 8)
    (layer,) = integer_share(model).layers
    assert (layer.integer, layer.kernel, layer.macs) == (True, "MatMulIntegerToFloat", 32)


def test_an_unpacked_weight_whose_layer_onnxruntime_renames():
    # one Gemm of the two, called otherwise, found by its weight
    body = (
        f"{Q} u = Cast<to=3>(w) wd = DequantizeLinear(u, s, wz) [fc] m = MatMul(xd, wd)"
        " a = Add(m, b) yq = QuantizeLinear(a, s, z) y = DequantizeLinear(yq, s, z)"
    )
    bias = numpy_helper.from_array(np.ones(4, np.float32), "b")
    zero = numpy_helper.from_array(np.int8(0), "wz")
    (layer,) = integer_share(build(body, weight(TensorProto.INT4, [1, 2]), bias, zero)).layers
    assert (layer.name, layer.integer, layer.kernel) == ("fc", True, "QGemm")


def test_weights_in_blocks_and_weights_read_twice():
    body = (
        "wd = DequantizeLinear<axis=0, block_size=4>(w, b) [a] p = MatMul(x, wd)"
        " [b] q = MatMul(x, wd) y = Add(p, q)"
    )
    model = load(build(body, weight(TensorProto.INT4, [3, -5]), blocks(0.1, 0.2)))
    (found,) = storage(model)
    assert found == Storage("int4", "", 4, 4, 1, 32)
    assert str(found) == "1 of 32 values, 4-bit in blocks of 4, packed in the file"


def test_float_weights_are_left_out():
    values = numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    assert storage(load(build("y = MatMul(x, w)", values))) == []
    assert storage(load(build(f"{Q} y = MatMul(xd, w)", values))) == []
