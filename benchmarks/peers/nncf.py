"""NNCF: post-training quantization of ONNX models."""

import nncf
import onnx

DISTRIBUTIONS = ("nncf", "onnx", "onnxruntime")


def quantize(model, feeds, output, *, preset=None, fast_bias_correction=True):
    result = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        preset=None if preset is None else nncf.QuantizationPreset(preset),
        fast_bias_correction=fast_bias_correction,
    )
    onnx.save(result, output)
