"""AMD Quark for ONNX: a configuration by name, or uint8 with int8 per channel."""

from quark.onnx import Int8Spec, ModelQuantizer, QConfig, QLayerConfig, UInt8Spec
from quark.onnx.quantization.config.spec import CalibMethod, QuantGranularity

DISTRIBUTIONS = ("amd-quark", "onnxruntime")


class Reader:
    """Samples as it reads them."""

    def __init__(self, feeds):
        self._feeds, self._left = feeds, iter(feeds)

    def __len__(self):
        return len(self._feeds)

    def get_next(self):
        return next(self._left, None)

    def rewind(self):
        self._left = iter(self._feeds)

    def reset_iter(self):
        self.rewind()


def quantize(model, feeds, output, *, name=None, method=None):
    if name is not None:
        config = QConfig.get_default_config(name)
    else:
        layers = QLayerConfig(
            activation=UInt8Spec(calibration_method=CalibMethod[method]),
            weight=Int8Spec(
                calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel
            ),
        )
        config = QConfig(global_config=layers)
    ModelQuantizer(config).quantize_model(str(model), str(output), Reader(feeds))
