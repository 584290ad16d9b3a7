"""Packed integers, against what onnx itself packs and unpacks."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq.kernels.pack import pack_nibbles


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 5), (4, 2, 3), (0,)])
@pytest.mark.parametrize(("kind", "low"), [(TensorProto.INT4, -8), (TensorProto.UINT4, 0)])
def test_onnx_reads_what_is_packed(shape, kind, low):
    values = np.random.default_rng(0).integers(low, low + 16, shape)
    packed = pack_nibbles(values)
    assert packed.dtype == np.uint8
    assert packed.size == (values.size + 1) // 2
    tensor = helper.make_tensor("t", kind, shape, packed.tobytes(), raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(int), values)


def test_every_pair():
    pairs = np.array([(a, b) for a in range(-8, 8) for b in range(-8, 8)], np.int8)
    wanted = [(a % 16) + 16 * (b % 16) for a, b in pairs.tolist()]
    assert pack_nibbles(pairs).tolist() == wanted
