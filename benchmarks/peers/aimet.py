"""aimet-onnx: fold batch normalization, simulate, compute encodings, write Q/DQ.

Its own runtime simulates integers; what is written here is its Q/DQ export, which onnxruntime runs.
"""

from pathlib import Path

import aimet_onnx
import onnx
from aimet_onnx import QuantizationSimModel
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.cross_layer_equalization import equalize_model

DISTRIBUTIONS = ("aimet-onnx",)
CONFIGS = Path(aimet_onnx.__file__).parent / "common" / "quantsim_config"


def quantize(model, feeds, output, *, scheme, config, equalize=False):
    proto = onnx.load(model)
    (equalize_model if equalize else fold_all_batch_norms_to_weight)(proto)
    sim = QuantizationSimModel(
        proto,
        param_type="int8",
        activation_type="int8",
        quant_scheme=scheme,
        config_file=str(CONFIGS / f"{config}.json"),
    )
    sim.compute_encodings(feeds)
    onnx.save(sim.to_onnx_qdq(export_int32_bias=True, prequantize_constants=True), output)
