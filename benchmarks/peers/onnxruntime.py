"""onnxruntime.quantization: pre-processing, then static quantization to Q/DQ."""

from pathlib import Path

from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)

DISTRIBUTIONS = ("onnxruntime", "onnx")


class Reader:
    """Samples as it reads them."""

    def __init__(self, feeds):
        self._feeds = iter(feeds)

    def get_next(self):
        return next(self._feeds, None)


def quantize(model, feeds, output, *, method):
    prepared, note = Path("prepared.onnx"), None
    try:
        quant_pre_process(model, prepared)
    except Exception as error:  # whatever it is, it is what the row tells
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        note = f"pre-processing without symbolic shapes: {error}"
    quantize_static(
        prepared,
        output,
        Reader(feeds),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )
    return note
