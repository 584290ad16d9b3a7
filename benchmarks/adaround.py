"""Solvers of rounding to 4 bits against one another, on the layers of real models.

    ONNXQ_ZOO=PATH python benchmarks/adaround.py [MODEL...] [--iterations N] [--macs N] [--quick]
    python benchmarks/adaround.py FILE.onnx --calib FOLDER

All solve the same problem, the layer's squared output error with weights as int4 per channel and
scales by output error, on the same second moments of the float model's inputs, drawn towards their
diagonals as `gptq` does.  Shown are the errors relative to rounding to nearest, and processor
seconds: GPTQ, the relaxation of the AdaRound paper at a tenth of its iterations and at all of them,
both with a final descent, and the search.  Layers whose relaxation would take more than --macs
multiply-adds an iteration are left out, and counted.  Everything runs on one thread.

Last, what statistics and search of a layer of 512 rows make of the machine: the float32 arithmetic
of second moments beside numpy's product of matrices of the same shape, and the bytes of H that
moves read beside those that a copy of as much reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _one_thread  # noqa: F401
import _zoo
import numpy as np
from _zoo import stream

import onnxq
from onnxq.kernels.objective import CACHED, objective
from onnxq.kernels.relaxation import Relaxation, relax
from onnxq.kernels.rounding import gptq, inverse_factor, shrink
from onnxq.kernels.scales import output_scales
from onnxq.kernels.tabu import choices, tabu_search
from onnxq.passes import Clean, FoldBatchNorm
from onnxq.patches import PatchSource
from onnxq.second_order import (
    Accumulator,
    SecondOrder,
    collect,
    input_session,
    rows_of,
    supports,
)

MODELS = ("cifar_resnet20", "mobilenetv1_075", "m5_speech", "espnet_camvid")
QMIN, QMAX = -8, 7
# Shares of layers and ratio of times that the search is held to.
SHARE, RATIO = 0.95, 1 / 50


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of the zoo, or an .onnx file")
    parser.add_argument("--calib", type=Path, help="folder of .npz samples for an .onnx file")
    parser.add_argument("--samples", type=int, default=32, help="to collect moments from")
    parser.add_argument("--iterations", type=int, default=10_000, help="of the relaxation")
    parser.add_argument("--macs", type=float, default=120e6, help="an iteration, at most")
    parser.add_argument("--quick", action="store_true", help="few iterations: does it run?")
    args = parser.parse_args(arguments)
    if args.quick:
        args.samples, args.iterations = 8, 50
    if args.calib is not None:
        if not args.models:
            parser.error("--calib is for .onnx files: name some")
        pairs = [(Path(name), args.calib) for name in args.models]
    else:
        zoo = _zoo.folder()
        names = args.models or MODELS
        pairs = [(zoo / "models" / f"{name}.onnx", _zoo.samples(zoo, name)) for name in names]
    warm_up()
    rows: list[dict[str, Any]] = []
    left_out = 0
    for pair in pairs:
        for name, weight, gram in problems(*pair, args.samples):
            if weight.size * weight.shape[-1] > args.macs:
                left_out += 1
                continue
            rows.append(measure(pair[0].stem, name, weight, gram, args.iterations))
            print(f"{rows[-1]['model']} {name}", file=sys.stderr)
    print(table(rows, args.iterations))
    print(f"\n{summary(rows)}; {left_out} layers left out\n")
    for columns in (64, 144) if args.quick else (576, 1152, 2304, 4608):
        print(limits(columns))
    _zoo.OUT.mkdir(exist_ok=True)
    (_zoo.OUT / "adaround.json").write_text(json.dumps(rows, indent=1))


def problems(source: Path, calib: Path, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Weights [G, O/G, K] and second moments [G, K, K] of all layers that have them."""
    model, _ = onnxq.PassManager(Clean(), FoldBatchNorm())(onnxq.load(source))
    layers = [layer for layer in model.layers() if supports(layer)]
    statistics = collect(
        layers,
        input_session(model, layers, 1),
        stream(calib, count),
        expected=count,
        rng=np.random.default_rng(0),
    )
    found = []
    for layer in layers:
        if layer.name in statistics:
            known = statistics[layer.name]
            gram = np.stack([shrink(h, known.sampled) for h in known.covariance])
            found.append((layer.name, np.ascontiguousarray(rows_of(layer), np.float32), gram))
    return found


def warm_up() -> None:
    """Compile all kernels."""
    rng = np.random.default_rng(0)
    weight, gram = rng.normal(size=(1, 2, 16)).astype(np.float32), np.eye(16)[None]
    measure("", "", weight, gram, 2)


def measure(
    model: str, name: str, weight: np.ndarray, gram: np.ndarray, iterations: int
) -> dict[str, Any]:
    rows = weight.shape[0] * weight.shape[1]
    zero = np.zeros(rows, np.int32)
    base = np.maximum(np.abs(weight).max(axis=-1).reshape(-1) / QMAX, 1e-12)
    scale = output_scales(weight, zero, QMIN, QMAX, gram, base=base)
    problem = (weight, scale, zero, QMIN, QMAX, gram)

    def relaxed(count: int) -> np.ndarray:
        return relax(*problem, options=Relaxation(iterations=count))

    solvers: dict[str, Callable[[], np.ndarray]] = {
        "gptq": lambda: by_gptq(*problem),
        "relaxation, tenth": lambda: relaxed(max(iterations // 10, 1)),
        "relaxation": lambda: relaxed(iterations),
        "search": lambda: tabu_search(*problem),
    }
    nearest = cost(choices(*problem[:-1]).nearest, weight, gram)
    errors, seconds = {}, {}
    worse = 0
    for solver, solve in solvers.items():
        before = time.process_time()
        values = solve()
        seconds[solver] = time.process_time() - before
        reached = cost(values, weight, gram)
        errors[solver] = float(reached.sum() / max(nearest.sum(), 1e-300))
        if solver == "search":
            worse = int((reached > nearest).sum())
    return {
        "model": model,
        "layer": name,
        "shape": list(weight.shape),
        "error": errors,
        "seconds": seconds,
        "rows worse than nearest": worse,
    }


def by_gptq(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
) -> np.ndarray:
    out = np.empty_like(weight)
    each = weight.shape[1]
    for g, h in enumerate(gram):
        part = slice(g * each, (g + 1) * each)
        factor = inverse_factor(h, 1e-2 * float(np.trace(h)) / len(h) + 1e-30)
        gptq(weight[g].copy(), scale[part], zero[part], qmin, qmax, factor, out[g])
    return out


def cost(values: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> np.ndarray:
    return objective(values.astype(np.float64) - weight, gram)


def table(rows: list[dict[str, Any]], iterations: int) -> str:
    lines = [
        "| model | layer | groups x rows x K | GPTQ | relaxation, "
        f"{max(iterations // 10, 1):,} | relaxation, {iterations:,} | search |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row['error'][s]:.3f} ({row['seconds'][s]:.2f} s)" for s in row["error"]]
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {row['model']} | {row['layer']} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def limits(columns: int, each: int = 512, patches: int = 4096, moves: int = 20_000) -> str:
    """What statistics and search of a layer reach, and what the machine gives for their shapes."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(1, each, columns)).astype(np.float32)
    x = [np.abs(rng.normal(size=(patches, columns)).astype(np.float32)) for _ in range(2)]
    few = 4 * each <= columns
    source = PatchSource("x", "rows", 1, (), (), columns)

    def collected() -> SecondOrder | None:
        total = Accumulator(source, patches, rng, shifted=True, rows=weight if few else None)
        total.add(*x)
        return total.result()

    asked = patches * columns * (columns + (4 * each if few else 2 * columns))
    seconds = min(timed(collected) for _ in range(2))
    wide = np.empty((columns, columns), np.float32)
    peak = min(timed(lambda: np.dot(x[0].T, x[1], out=wide)) for _ in range(2))
    found = collected()
    assert found is not None
    gram = found.covariance
    scale = np.abs(weight).max(axis=-1).reshape(-1) / QMAX
    given = (weight[:, :64], scale[:64], np.zeros(64, np.int32), QMIN, QMAX, gram)
    sweeps = (0.01, 1.0, 1.0 + moves / columns)  # the first compiles
    spent = [timed(lambda s=s: tabu_search(*given, pairs=False, sweeps=s)) for s in sweeps]
    read = moves * 64 * columns * (2 if columns > CACHED else 4) / (spent[2] - spent[1])
    copied = gram.nbytes / min(timed(gram.copy) for _ in range(3))
    return (
        f"K = {columns}: statistics at {asked / seconds / 1e9:.0f} GFLOP/s, numpy's product at "
        f"{2 * patches * columns**2 / peak / 1e9:.0f}; moves read H at {read / 1e9:.1f} GB/s, "
        f"a copy of it reads at {copied / 1e9:.1f}"
    )


def timed(work: Callable[[], object]) -> float:
    """Processor seconds."""
    before = time.process_time()
    work()
    return time.process_time() - before


def summary(rows: list[dict[str, Any]]) -> str:
    """What the search is held to."""
    ratios = [(r["error"]["search"] / max(r["error"]["relaxation"], 1e-12), r) for r in rows]
    # where both find the optimum they differ by rounding
    share = sum(ratio <= 1 + 1e-6 for ratio, _ in ratios) / len(rows)
    worst, row = max(ratios, key=lambda pair: pair[0])
    seconds = {s: sum(r["seconds"][s] for r in rows) for s in ("search", "relaxation")}
    time_ratio = seconds["search"] / seconds["relaxation"]
    missed = " **missed**"
    return (
        f"search no worse than the relaxation on {share:.1%} of {len(rows)} layers"
        f"{'' if share >= SHARE else missed}, worst {worst:.3f} of its error "
        f"({row['model']} {row['layer']}), in 1/{1 / time_ratio:.0f} of its time"
        f"{'' if time_ratio <= RATIO else missed} ({seconds['search']:.1f} s); rows worse than "
        f"nearest: {sum(r['rows worse than nearest'] for r in rows)}"
    )


if __name__ == "__main__":
    main()
