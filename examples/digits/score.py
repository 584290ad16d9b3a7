"""Score models on the held-out digits.

python examples/digits/score.py MODEL [MODEL ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

TEST = Path(__file__).parent / "test.npz"


def predictions(model: Path) -> np.ndarray:
    """The digit that the model sees in each test picture."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    with np.load(TEST) as test:
        return session.run(None, {name: test["input"]})[0].argmax(axis=1)


def labels() -> np.ndarray:
    with np.load(TEST) as test:
        return test["labels"]


def top1(predicted: np.ndarray) -> float:
    """Right predictions, in percent."""
    return 100 * float(np.mean(predicted == labels()))


def main(models: list[str]) -> int:
    if not models:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    print(f"{'top-1 %':>7}  {'bytes':>9}  model")
    for model in map(Path, models):
        if not model.is_file():
            print(f"error: no such file: {model}", file=sys.stderr)
            return 1
        print(f"{top1(predictions(model)):7.1f}  {model.stat().st_size:9,}  {model}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
