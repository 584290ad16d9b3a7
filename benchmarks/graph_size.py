"""What a graph's size costs: processor seconds of verbs and passes, and how they grow.

    python benchmarks/graph_size.py [NODES...]

Residual convolutional networks with BatchNormalization and a dynamic batch are generated, 8
channels wide on 8 x 8 pixels, so that the graph is what costs, not arithmetic. Seconds are those of
the processor, all threads, after a first run on a small graph that compiles kernels; passes are
shown where they take a tenth of a second. Growth is the exponent between the smallest and the
largest graph: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxq
from onnxq import api, compression
from onnxq.examination import doctor
from onnxq.pass_manager import Pass, PassManager
from onnxq.passes import Clean

NODES = (500, 1000, 2000, 5000)
CHANNELS, SAMPLES = 8, 4


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    sizes = sorted(map(int, given)) or list(NODES)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), 60)
        for size in sizes:
            for name, value in measure(Path(folder), size).items():
                seconds.setdefault(name, []).append(value)
    heads = [f"{size:,} nodes" for size in sizes]
    print(f"| | {' | '.join(heads)} | growth |\n| --- |{' --- |' * (len(sizes) + 1)}")
    for name, row in seconds.items():
        if max(row) >= 0.1:
            growth = math.log(row[-1] / row[0]) / math.log(sizes[-1] / sizes[0]) if row[0] else 0
            shown = f"{growth:.2f}" if len(sizes) > 1 else ""
            print(f"| {name} | {' | '.join(f'{s:.2f}' for s in row)} | {shown} |")


def measure(folder: Path, nodes: int) -> dict[str, float]:
    """Processor seconds of each verb, and of the passes of quantize."""
    source, small = folder / "in.onnx", folder / "out.onnx"
    onnx.save(network(nodes), source)
    draw = np.random.default_rng(0)
    data = [{"x": draw.standard_normal((1, 3, 8, 8), np.float32)} for _ in range(SAMPLES)]
    found: dict[str, float] = {}
    with passes_timed(found):
        found |= timed("quantize", lambda: api.quantize(source, small, data, threads=1))
    found |= timed("inspect", lambda: api.inspect(source))
    found |= timed("doctor", lambda: doctor(small, data=data, threads=1))
    found |= timed("clean", lambda: PassManager(Clean())(source))
    if nodes <= 1000:  # beyond it, the choice of ranks is what takes the time
        found |= timed(
            "compress", lambda: compression.compress(source, None, data, macs=0.9, threads=1)
        )
    found |= timed("load and save", lambda: onnxq.load(source).save(folder / "copy.onnx"))
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("  ")))


def timed(name: str, work: Callable[[], object]) -> dict[str, float]:
    start = time.process_time()
    work()
    return {name: time.process_time() - start}


@contextmanager
def passes_timed(found: dict[str, float]) -> Iterator[None]:
    """Add up the processor seconds of each pass that a manager runs."""
    apply = PassManager.apply
    start = [time.process_time()]

    def step(done: Pass, model: object, changes: object) -> None:
        now = time.process_time()
        found[f"  {done.name}"] = found.get(f"  {done.name}", 0) + now - start[0]
        start[0] = now

    def watched(manager: PassManager, model: onnxq.Model, ctx: object) -> object:
        usual = manager.after

        def after(*arguments: object) -> None:
            step(*arguments)  # type: ignore[arg-type]
            if usual is not None:
                usual(*arguments)  # type: ignore[arg-type]
            start[0] = time.process_time()

        start[0] = time.process_time()
        return apply(PassManager(*manager.passes, after=after), model, ctx)  # type: ignore[arg-type]

    PassManager.apply = watched  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        PassManager.apply = apply  # type: ignore[method-assign]


def network(nodes: int, channels: int = CHANNELS) -> onnx.ModelProto:
    """A residual network of about so many nodes."""
    draw = np.random.default_rng(0)
    made: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def add(op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op}{len(made)}"
        made.append(helper.make_node(op, inputs, [f"{name}.y"], name=name, **attributes))
        return f"{name}.y"

    def convolution(x: str, reads: int) -> str:
        at, size = len(made), (channels, reads, 3, 3)
        weight = constant(f"w{at}", draw.standard_normal(size) / math.sqrt(9 * reads))
        y = add("Conv", x, weight, pads=[1, 1, 1, 1])
        rows = (1 + draw.random(channels) / 10, *draw.standard_normal((2, channels)) / 10)
        norm = [constant(f"{n}{at}", v) for n, v in zip("gbm", rows, strict=True)]
        norm.append(constant(f"v{at}", 1 + draw.random(channels) / 10))
        return add("BatchNormalization", y, *norm)

    x = add("Relu", convolution("x", 3))
    while len(made) < nodes - 3:
        y = convolution(add("Relu", convolution(x, channels)), channels)
        x = add("Relu", add("Add", x, y))
    flat = add("Flatten", add("GlobalAveragePool", x))
    y = add("Gemm", flat, constant("w", draw.standard_normal((channels, 10))))
    made[-1].output[0] = "y"
    shapes = (("x", ["N", 3, 8, 8]), ("y", ["N", 10]))
    given, result = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes)
    graph = helper.make_graph(made, "residual", [given], [result], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    main()
