"""Quantize the models of the zoo, score float and quantized, print a table.

    ONNXQ_ZOO=PATH python benchmarks/zoo.py [MODEL...] [--weights FMT] [--format SELECTOR=FMT]...
                                            [--recipe NAME] [--readme]

With no option but models, that is how `onnxq quantize IN OUT --calib DIR` does.  The zoo is a
folder with models/, eval.py and calib.py.  Exit 1 if a model loses more than allowed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from _zoo import OUT, folder, samples, score

import onnxq
from onnxq.zoo import entry

HERE = Path(__file__).parent
# model -> allowed loss; tasks and metrics are those of onnxq's zoo
ALLOWED = {
    "cifar_resnet20": 0.3,
    "cifar_resnet56": 0.3,
    "cifar_vit": 0.3,
    "espcn_x3": 0.1,
    "espnet_camvid": 1.0,
    "m5_speech": 1.0,
    "magika": 1.0,
    "mobilenetv1_075": 1.0,
    "mobilenetv2": 1.0,
    "silero_vad": 2.0,
    "simplepose": 1.0,
    "ultraface_rfb320": 1.0,
    "vww_mobilenetv1_025": 1.0,
    "yolox_nano": 1.5,
}
# Of weights of 4 bits, those of the depthwise, first and last layers, too.
ALLOWED_INT4 = {
    "cifar_resnet20": 0.5,
    "cifar_resnet56": 0.5,
    "mobilenetv1_075": 6.0,
    "mobilenetv2": 4.0,
    "yolox_nano": 3.0,
    "simplepose": 3.0,
    "espnet_camvid": 3.0,
    "m5_speech": 3.0,
}
# The table of the README that a call of these options prints.
PLACES = {(): "zoo-table", (("weights", "int4/channel"),): "int4-table"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--weights", metavar="FMT")
    parser.add_argument("--format", action="append", dest="formats", metavar="SELECTOR=FMT")
    parser.add_argument("--recipe", metavar="NAME")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    args.formats = None if args.formats is None else tuple(args.formats)
    options = {
        name: value
        for name in ("weights", "formats", "recipe", "seed")
        if (value := getattr(args, name)) is not None
    }
    if args.readme and (args.models or tuple(options.items()) not in PLACES):
        parser.error("README.md has no table of these models and options")
    zoo = folder()
    few = args.weights is not None and args.weights.startswith("int4")
    allowed = ALLOWED_INT4 if few else ALLOWED
    names = args.models or [*allowed]
    rows = [measure(zoo, name, allowed.get(name), options) for name in names]
    OUT.mkdir(exist_ok=True)
    (OUT / "zoo.json").write_text(json.dumps(rows, indent=1))
    text = table(rows)
    print(text)
    if args.readme:
        into_readme(text, options)
    sys.exit(0 if all(r["kept"] for r in rows) else 1)


def measure(
    zoo: Path, name: str, allowed: float | None, options: dict[str, object]
) -> dict[str, object]:
    source = zoo / "models" / f"{name}.onnx"
    calib = samples(zoo, name)
    result = OUT / f"{name}.int8.onnx"
    start = time.perf_counter()
    _, report = onnxq.quantize(source, result, calib, **options)
    seconds = time.perf_counter() - start
    found, known = score(zoo, name, result), score(zoo, name, source)
    facts = report.facts
    return {
        "model": name,
        "metric": entry(name).evaluation.metric,
        "float": known,
        "int8": found,
        "allowed": allowed,
        "kept": allowed is None or bool(found >= known - allowed - 1e-9),
        "sqnr": [o["sqnr_db"] for o in facts["outputs"]],
        "share": facts["integers"]["share"],
        "possible": facts["integers"]["share_of_possible"],
        "seconds": seconds,
        "bytes": [facts["bytes"]["before"], facts["bytes"]["after"]],
    }


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| model | metric | float | quantized | difference | allowed | SQNR dB"
        " | MACs in integers, all / with kernels | seconds | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        before, after = (b / 1e6 for b in r["bytes"])
        sqnr = ", ".join(f"{s:.1f}" for s in r["sqnr"])
        bound = "" if r["allowed"] is None else f"-{r['allowed']}"
        missed = "" if r["kept"] else " **missed**"
        lines.append(
            f"| {r['model']} | {r['metric']} | {r['float']:.2f} | {r['int8']:.2f}"
            f" | {r['int8'] - r['float']:+.2f}{missed} | {bound} | {sqnr}"
            f" | {100 * r['share']:.1f} / {100 * r['possible']:.1f} % | {r['seconds']:.1f}"
            f" | {before:.2f} -> {after:.2f} |"
        )
    return "\n".join(lines)


def into_readme(text: str, options: dict[str, object]) -> None:
    path = HERE.parent / "README.md"
    place = PLACES[tuple(options.items())]  # type: ignore[index]
    head, rest = path.read_text().split(f"<!-- {place} -->")
    tail = rest.split(f"<!-- /{place} -->")[1]
    given = "".join(f" --{name} {value}" for name, value in options.items())
    and_so = f" and `{given[1:]}`" if given else ""
    told = (
        f"100 calibration samples, no option but `--calib`{and_so}, scored on onnxruntime's integer"
        " kernels; seconds on 2 cores; printed by"
        f" `ONNXQ_ZOO=PATH python benchmarks/zoo.py{given}`:"
    )
    path.write_text(f"{head}<!-- {place} -->\n\n{told}\n\n{text}\n\n<!-- /{place} -->{tail}")


if __name__ == "__main__":
    main()
