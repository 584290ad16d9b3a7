"""Analyses of models that do not exist, for tests of what shows them."""

import math

import numpy as np

from onnxq.analysis.findings import (
    ActivationFindings,
    Advice,
    Agreement,
    Analysis,
    Histogram,
    LayerFindings,
    Outlier,
    TensorFindings,
    WeightFindings,
)
from onnxq.analysis.sensitivity import Sensitivity

# Share of a layer's effect that each format has.
FORMATS = {
    ("weights", "int8/tensor"): 2.0,
    ("weights", "int8/channel"): 0.5,
    ("weights", "int4/channel"): 100.0,
    ("weights", "int16/channel"): 1e-5,
    ("activations", "uint8"): 0.5,
    ("activations", "int16"): 1e-5,
}


def layer(name, share, rank, *, seed=0, executed=True, broken=False, channels=32):
    """A layer that adds so much to the noise; None: not known."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(channels, 64)) * rng.lognormal(0, 0.5, (channels, 1))
    if broken:
        weight[0] = np.nan
    sides = [
        [v if math.isfinite(v) else None for v in f(1).tolist()] for f in (weight.min, weight.max)
    ]
    counts, ends = np.histogram(np.nan_to_num(weight), 64)
    read = np.maximum(rng.normal(size=4000), 0)
    held, edges = np.histogram(read, 128)
    effect = None if share is None else share * 1e-2
    sensitivities = tuple(
        Sensitivity(
            part,
            written,
            30.0,
            None if effect is None else effect * factor,
            None if effect is None else effect * factor * 1.1,
            note="" if executed else "no sample reached it",
        )
        for (part, written), factor in FORMATS.items()
    )
    helped = Advice("Give its weight 16 bits.", f"onnxq quantize --format '{name}=int16'", share)
    return LayerFindings(
        name=name,
        op="Conv",
        input_shape=(1, 64, 28, 28),
        output_shape=(1, channels, 28, 28),
        parameters=weight.size,
        bytes=4 * weight.size,
        macs=784 * weight.size,
        bit_operations=64 * 784 * weight.size,
        activation_bytes=4 * 784 * channels,
        executed=executed,
        weights=WeightFindings(
            (channels, 64, 1, 1),
            *map(tuple, sides),
            None if broken else Histogram(float(ends[0]), float(ends[-1]), tuple(counts.tolist())),
            None if broken else 3.0 + seed % 7,
            4.0,
            (Outlier(3, 7.25),),
        ),
        activation=ActivationFindings(
            f"{name}_x", False, 0.0, float(read.max()),
            Histogram(0.0, float(edges[-1]), tuple(held.tolist())),
            0.0, 2.5, 0.006, 0.5, 0.7, (0.0,) * 16, tuple(rng.random(16).tolist()), (),
        )
        if executed
        else None,
        sensitivities=sensitivities,
        gain=1.25,
        share=share,
        fragility=rank,
        reason="" if share is None else f"Channel 3 sets the scale of {rank}.",
        advice=() if share is None else (helped,),
    )  # fmt: skip


def analysis(layers, **others):
    """An analysis of layers, each followed by an activation function."""
    tensors = []
    for index, found in enumerate(layers):
        sqnr = 40 - 20 * index / len(layers)
        tensors += [
            TensorFindings(f"{found.name}_y", found.name, found.op, sqnr, None, sqnr + 1),
            TensorFindings(f"{found.name}_z", f"relu{index}", "Relu", sqnr, sqnr - 0.5, sqnr),
        ]
    return Analysis(
        model={"name": "g", "opset": 17, "bytes": 1_234_567, "sha256": "ab" * 32},
        versions={"onnxq": "0.1.0", "onnxruntime": "1.32.0"},
        recipe='[[pass]]\nname = "clean"\n',
        weights="int8/channel",
        activations="uint8",
        samples={"calibration": 16},
        layers=layers,
        tensors=tensors,
        agreement=[Agreement("weights", "int8/channel", len(layers), 0.97)],
        totals={"sqnr_db": 20.0},
        seconds={"calibration": 1.5},
        **others,
    )


def many(count):
    """An analysis of so many layers, no two alike."""
    rng = np.random.default_rng(0)
    shares = rng.pareto(1.2, count)
    shares /= shares.sum()
    ranks = np.argsort(np.argsort(-shares)) + 1
    return analysis(
        [
            layer(f"backbone/stage.{i}/conv/Conv", float(s), int(r), seed=i)
            for i, (s, r) in enumerate(zip(shares, ranks, strict=True))
        ]
    )
