"""One scale per weight: what each step of the flow brings back, without samples and with them.

    ONNXQ_ZOO=PATH python benchmarks/data_free.py [MODEL...] [--samples]

Weights int8 per tensor, activations uint8, scored by the zoo's eval.py on onnxruntime's integer
kernels. Without --samples everything comes from batch normalization and from samples that are made
up; with it, from 100 calibration samples. The last line is the recipe as the command line runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import _zoo
from _zoo import OUT, score

import onnxq
from onnxq.passes import (
    GPTQ,
    BiasCorrection,
    Calibrate,
    Clean,
    CrossLayerEqualization,
    FoldBatchNorm,
    FoldDeadChannels,
    GateEqualization,
    HighBiasAbsorption,
    InsertQDQ,
)
from onnxq.synthetic import synthesize
from onnxq.zoo import entry

MODELS = (
    "mobilenetv1_075",
    "mobilenetv2",
    "vww_mobilenetv1_025",
    "simplepose",
    "ultraface_rfb320",
    "espnet_camvid",
    "yolox_nano",
)


def steps(*, made_up: bool) -> dict[str, list[Any]]:
    """Name of each row -> the passes up to it."""
    fold = [Clean(), FoldBatchNorm(standalone="conv")]
    dead = [*fold, FoldDeadChannels()]
    even = [*dead, CrossLayerEqualization(balance="both"), GateEqualization()]
    ranges = "batch-norm" if made_up else "samples"
    calibrate, correct = Calibrate(weights="int8/tensor", ranges=ranges), BiasCorrection()
    absorbed = [*even[:-1], HighBiasAbsorption(), GateEqualization()]
    rows = {
        "nothing": [*fold, calibrate],
        "+ dead channels": [*dead, calibrate],
        "+ equalization": [*even, calibrate],
        "+ absorption": [*absorbed, calibrate],
        "+ absorption + correction": [*absorbed, calibrate, correct],
        "+ correction, no absorption": [*even, calibrate, correct],
    }
    if not made_up:
        rows["+ rounding by output error"] = [*even, calibrate, GPTQ()]
    return {name: [*passes, InsertQDQ()] for name, passes in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["mobilenetv1_075", "mobilenetv2"])
    parser.add_argument("--samples", action="store_true", help="calibrate on real samples")
    args = parser.parse_args()
    if unknown := [m for m in args.models if m not in MODELS]:
        parser.error(f"no model {unknown[0]}; there are {', '.join(MODELS)}")
    zoo = _zoo.folder()
    columns = {name: measure(zoo, name, real=args.samples) for name in args.models}
    names = [f"{name} ({entry(name).evaluation.metric})" for name in columns]
    print(f"| step | {' | '.join(names)} |")
    print("| --- " * (len(names) + 1) + "|")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(str(c[row]) for c in columns.values())} |")
    (OUT / f"data_free{'_samples' if args.samples else ''}.json").write_text(json.dumps(columns))


def measure(zoo: Path, name: str, *, real: bool) -> dict[str, str]:
    """The column of a model."""
    source = zoo / "models" / f"{name}.onnx"
    result = OUT / f"{name}.tensor.onnx"
    OUT.mkdir(exist_ok=True)
    found = {"float": f"{score(zoo, name, source):.2f}"}
    model = onnxq.load(source)
    data = _zoo.samples(zoo, name) if real else synthesize(model, count=32)
    for row, passes in steps(made_up=not real).items():
        small, _ = onnxq.PassManager(*passes)(model, onnxq.Calibration(data))
        small.save(result)
        found[row] = f"{score(zoo, name, result):.2f}"
        print(name, row, found[row], file=sys.stderr, flush=True)
    start = time.perf_counter()
    calib = {"calib": data} if real else {"data_free": True}
    _, report = onnxq.quantize(source, result, weights="int8/tensor", **calib)
    seconds = time.perf_counter() - start
    found["the recipe, seconds (of passes)"] = (
        f"{score(zoo, name, result):.2f}, {seconds:.1f} s ({report.seconds:.1f} s)"
    )
    return found


if __name__ == "__main__":
    main()
