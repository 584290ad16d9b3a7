"""Equalize, simulate, compute encodings, evaluate, export: the flow of AIMET, on the digits model.

    python examples/digits/simulate.py [OUTPUT FOLDER]

The output folder is `build/simulate` unless named.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import score

import onnxq

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def calibrate(session, count: int) -> None:
    """Feed the session the first samples; it observes what runs through it."""
    for file in sorted((HERE / "calib").glob("*.npz"))[:count]:
        with np.load(file) as sample:
            session.run(None, dict(sample))


def evaluate(session) -> float:
    """Right predictions on the test pictures, in percent."""
    name = session.get_inputs()[0].name
    with np.load(score.TEST) as test:
        return score.top1(session.run(None, {name: test["input"]})[0].argmax(axis=1))


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = onnxq.equalize_model(HERE / "digits.onnx", HERE / "calib")
    print(f"float: {score.top1(score.predictions(HERE / 'digits.onnx')):.1f} % right")

    for param_type, activation_type in (("int8", "int8"), ("int4", "int8"), ("int3", "int4")):
        sim = onnxq.QuantizationSimModel(
            model, param_type=param_type, activation_type=activation_type
        )
        sim.compute_encodings(calibrate, 64)
        what = f"{param_type} weights, {activation_type} activations"
        alone = " (no runtime computes so)" if sim.simulated_only else ""
        print(f"{what}: {evaluate(sim.session):.1f} % right in the simulation{alone}")
        files = sim.export(folder, f"digits.{param_type}.{activation_type}")
        if not sim.simulated_only:
            right = score.top1(score.predictions(files.qdq))
            print(f"  as integers: {right:.1f} % right, {files.qdq.stat().st_size:,} bytes")
    print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        sys.exit(__doc__)
    sys.exit(main(Path(arguments[0]).resolve() if arguments else ROOT / "build" / "simulate"))
