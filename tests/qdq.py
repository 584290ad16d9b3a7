"""Small Q/DQ models: ONNX text around constants that all of them share."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

RNG = np.random.default_rng(0)


def scale(value: float, *shape: int) -> np.ndarray:
    """A scale, or as many equal ones."""
    return np.full(shape, value, np.float32)


def integers(*shape: int, dtype: type = np.int8) -> np.ndarray:
    """Integers drawn at random."""
    low = -100 if np.dtype(dtype).kind == "i" else 0
    return RNG.integers(low, 100, shape).astype(dtype)


def packed(*shape: int) -> np.ndarray:
    """4-bit integers drawn at random."""
    values = RNG.integers(-7, 8, shape)
    tensor = onnx.helper.make_tensor("i", onnx.TensorProto.INT4, shape, values.reshape(-1))
    return numpy_helper.to_array(tensor)


# Grids of the input, of results, of something else, of weights; a bias of scale 0.001 = s_x * s_w.
CONSTANTS = {
    "xs": scale(0.02),
    "xz": np.uint8(128),
    "ys": scale(0.03),
    "yz": np.uint8(0),
    "zs": scale(0.04),
    "zz": np.uint8(10),
    "ws": scale(0.05, 4),
    "wz": np.zeros(4, np.int8),
    "wst": scale(0.05),
    "wzt": np.int8(0),
    "bs": scale(0.001, 4),
    "bst": scale(0.001),
    "bz": np.zeros(4, np.int32),
    "b": np.array([300, -200, 0, 500], np.int32),
    "fb": np.array([0.3, -0.2, 0.0, 0.5], np.float32),
    "w": integers(4, 3, 3, 3) // 10,  # so that results lie in the range of ys
    "g": integers(8, 4) // 10,
    "fw": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "fg": RNG.normal(size=(8, 4)).astype(np.float32),
}
X = "xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz) "
Y = " yq = QuantizeLinear(r, ys, yz) y = DequantizeLinear(yq, ys, yz)"
# The pieces that a text may name without defining them.
PIECES = {
    "xd": X,
    "wd": "wd = DequantizeLinear<axis=0>(w, ws, wz) ",
    "gd": "gd = DequantizeLinear<axis=1>(g, ws, wz) ",
    "bd": "bd = DequantizeLinear<axis=0>(b, bs) ",
}
SIGNED = {"xz": np.int8(3), "yz": np.int8(-128), "zz": np.int8(10)}


def build(
    body: str,
    inputs: str = "float[N,3,8,8] x",
    outputs: str = "float[] y",
    *,
    opset: int = 21,
    **constants: object,
) -> onnx.ModelProto:
    """A model whose text may name the constants and pieces above, and given constants.

    Unless it says what `y` is, it ends in a Q/DQ pair behind `r`.
    """
    pieces = "".join(
        text for name, text in PIECES.items() if _names(body, name) and f"{name} =" not in body
    )
    end = "" if " y = " in f" {body}" else Y
    text = f"({inputs}) => ({outputs}) {{ {pieces}{body}{end} }}"
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head} g {text}")
    read = {name for node in proto.graph.node for name in node.input}
    for name, value in {**CONSTANTS, **constants}.items():
        if name in read:
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    inferred = onnx.shape_inference.infer_shapes(proto)
    for info, known in zip(proto.graph.output, inferred.graph.output, strict=True):
        info.CopyFrom(known)
    return proto


def _names(body: str, name: str) -> bool:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return name in words


def rows(body: str, outputs: str = "float[] y", **constants: object) -> onnx.ModelProto:
    """Like `build`, of an input [N, 8]."""
    return build(body, "float[N,8] x", outputs, **constants)
