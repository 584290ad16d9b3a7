"""The passes: each reads a graph and writes a graph, one file per pass, named as papers name it.

Passes load when first asked for, so that `from onnxq.passes import Clean` loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.passes.adaround import AdaRound
    from onnxq.passes.bias_correction import BiasCorrection
    from onnxq.passes.calibrate import Calibrate
    from onnxq.passes.channel_pruning import ChannelPruning
    from onnxq.passes.clean import Clean
    from onnxq.passes.compress import Compress
    from onnxq.passes.cross_layer_equalization import CrossLayerEqualization
    from onnxq.passes.fold_batch_norm import FoldBatchNorm
    from onnxq.passes.fold_dead_channels import FoldDeadChannels
    from onnxq.passes.gate_equalization import GateEqualization
    from onnxq.passes.gptq import GPTQ
    from onnxq.passes.high_bias_absorption import HighBiasAbsorption
    from onnxq.passes.insert_qdq import InsertQDQ
    from onnxq.passes.load_encodings import LoadEncodings
    from onnxq.passes.noise_equalization import NoiseEqualization
    from onnxq.passes.reduce_range import ReduceRange
    from onnxq.passes.residual_input import ResidualInput
    from onnxq.passes.space_to_depth import SpaceToDepth
    from onnxq.passes.spatial_svd import SpatialSVD
    from onnxq.passes.weight_svd import WeightSVD

__all__ = [
    "GPTQ",
    "PASSES",
    "AdaRound",
    "BiasCorrection",
    "Calibrate",
    "ChannelPruning",
    "Clean",
    "Compress",
    "CrossLayerEqualization",
    "FoldBatchNorm",
    "FoldDeadChannels",
    "GateEqualization",
    "HighBiasAbsorption",
    "InsertQDQ",
    "LoadEncodings",
    "NoiseEqualization",
    "ReduceRange",
    "ResidualInput",
    "SpaceToDepth",
    "SpatialSVD",
    "WeightSVD",
]

# name in recipes and on the command line -> where the class is
PASSES = {
    "clean": "onnxq.passes.clean:Clean",
    "space-to-depth": "onnxq.passes.space_to_depth:SpaceToDepth",
    "fold-batch-norm": "onnxq.passes.fold_batch_norm:FoldBatchNorm",
    "fold-dead-channels": "onnxq.passes.fold_dead_channels:FoldDeadChannels",
    "channel-pruning": "onnxq.passes.channel_pruning:ChannelPruning",
    "cross-layer-equalization": "onnxq.passes.cross_layer_equalization:CrossLayerEqualization",
    "noise-equalization": "onnxq.passes.noise_equalization:NoiseEqualization",
    "high-bias-absorption": "onnxq.passes.high_bias_absorption:HighBiasAbsorption",
    "compress": "onnxq.passes.compress:Compress",
    "spatial-svd": "onnxq.passes.spatial_svd:SpatialSVD",
    "weight-svd": "onnxq.passes.weight_svd:WeightSVD",
    "gate-equalization": "onnxq.passes.gate_equalization:GateEqualization",
    "calibrate": "onnxq.passes.calibrate:Calibrate",
    "load-encodings": "onnxq.passes.load_encodings:LoadEncodings",
    "residual-input": "onnxq.passes.residual_input:ResidualInput",
    "reduce-range": "onnxq.passes.reduce_range:ReduceRange",
    "gptq": "onnxq.passes.gptq:GPTQ",
    "adaround": "onnxq.passes.adaround:AdaRound",
    "bias-correction": "onnxq.passes.bias_correction:BiasCorrection",
    "insert-qdq": "onnxq.passes.insert_qdq:InsertQDQ",
}


def __getattr__(name: str) -> Any:
    for path in PASSES.values():
        module, _, class_name = path.partition(":")
        if class_name == name:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
