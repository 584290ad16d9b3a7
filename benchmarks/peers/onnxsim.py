"""onnxsim: simplification, and the static quantization that it has besides."""

import onnx
import onnxsim

DISTRIBUTIONS = ("onnxsim", "onnxruntime")


def simplify(model, feeds, output):
    simple, same = onnxsim.simplify(onnx.load(model))
    if not same:
        raise ValueError("onnxsim's own check failed")
    onnx.save(simple, output)


def quantize(model, feeds, output, *, full_graph):
    simple, _ = onnxsim.simplify(onnx.load(model))
    onnx.save(onnxsim.quantize_static(simple, feeds, full_graph=full_graph), output)
