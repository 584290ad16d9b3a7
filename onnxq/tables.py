"""What the command line prints: summaries and tables on stdout."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from onnxq.analysis.error import OutputError
from onnxq.analysis.findings import SPARED, Analysis, LayerFindings
from onnxq.analysis.latency import WARM_UP, Latency
from onnxq.analysis.sensitivity import decibel
from onnxq.comparison import Comparison
from onnxq.console import echo
from onnxq.console import show as _print
from onnxq.console import table as _table
from onnxq.deployment import MANIFEST, Deployment
from onnxq.encoding_files import Differences
from onnxq.inspection import Inspection
from onnxq.pages import page
from onnxq.passes import PASSES
from onnxq.recipe import RECIPES
from onnxq.report import Report, error_line, megabytes, millions, weight_only_share

__all__ = [
    "analysis",
    "comparison",
    "compression",
    "deployment",
    "differences",
    "inspection",
    "pass_list",
    "pass_page",
    "summary",
]

# What the files of a deployed folder are for.
_PURPOSES = {
    ("onnx", None): "full packages of onnxruntime",
    ("ort", "fixed"): "full packages and custom builds, on the CPU",
    ("ort", "runtime"): "the same, where other providers take nodes",
    ("operators", "fixed"): "custom builds that run the .ort",
    ("operators", "runtime"): "custom builds that run the .with_runtime_opt.ort",
}
# Refusals listed one by one before the rest is counted.
LISTED = 8
# The most fragile layers, the cheapest to compress, and the greatest losses along the graph.
FRAGILE, CHEAP, DROPS = 5, 5, 3


def summary(report: Report, source: Path, destination: Path) -> None:
    """What a run achieved and what it declined."""
    facts = report.facts
    table = _table("", "")
    before, after = facts["bytes"]["before"], facts["bytes"]["after"]
    share = f"{before / after:.1f} times smaller" if after else ""
    table.add_row("bytes", f"{megabytes(before)} -> {megabytes(after)}, {share}")
    integers = facts["integers"]
    if integers["macs"]:
        table.add_row(
            "MACs in integers",
            f"{100 * integers['share']:.1f} % of {millions(integers['macs'])} a sample"
            + (
                f" (measured on the graph that onnxruntime {facts['versions']['onnxruntime']} runs)"
                if integers["measured"]
                else f" (by the contract of {facts['target']})"
            ),
        )
    if alone := weight_only_share(report):
        table.add_row(
            "MACs on integer weights", f"{100 * alone:.1f} %, activations in float (MatMulNBits)"
        )
    for stored in facts["storage"]:
        table.add_row("weights", stored["text"])
    for output in facts.get("outputs", []):
        table.add_row(f"output {output['name']}", error_line(output))
    seconds = ", ".join(f"{p.name} {p.seconds:.1f}" for p in report.passes if p.seconds >= 0.05)
    table.add_row("seconds", f"{facts['seconds']:.1f}" + (f" ({seconds})" if seconds else ""))
    echo(f"{source} -> {destination}")
    _print(table)
    for line in refusals(report):
        echo(line)


def refusals(report: Report) -> list[str]:
    """What stayed in float or was left alone, and why, one line each."""
    lines = [f"note: {note}" for note in report.notes]
    listed, skipped = report.in_float, report.left_alone
    for name, kind, why in listed[:LISTED]:
        lines.append(f"in float: {name} ({kind}): {why}")
    if len(listed) > LISTED:
        lines.append(f"in float: {len(listed) - LISTED} more layers, see --json")
    for name, kind, why in skipped[:LISTED]:
        lines.append(f"left alone by {kind}: {name}: {why}")
    if len(skipped) > LISTED:
        lines.append(f"left alone: {len(skipped) - LISTED} more, see --json")
    return lines


def compression(report: Report, source: Path, destination: Path) -> None:
    """What became of each layer, what that saves, and what it costs the outputs."""
    facts = report.facts
    found = facts["compression"]
    layers = _table("layer", "method", "rank", "MACs", "bytes", "error of its output")
    for layer in found["layers"]:
        shares = (layer[of]["after"] / max(layer[of]["before"], 1) for of in ("macs", "bytes"))
        layers.add_row(
            layer["name"],
            layer["method"],
            str(layer["rank_or_channels"]),
            *(f"{100 * share:.0f} %" for share in shares),
            f"{100 * layer['error']:.2f} %",
        )
    echo(f"{source} -> {destination}")
    _print(layers)
    table = _table("", "")
    macs, stored = found["macs"], facts["bytes"]
    share = f"{100 * macs['after'] / max(macs['before'], 1):.1f} %"
    before, after = millions(macs["before"]), millions(macs["after"])
    table.add_row("MACs", f"{before} -> {after} a sample, {share}")
    sizes = " -> ".join(megabytes(stored[when]) for when in ("before", "after"))
    table.add_row("bytes", f"{sizes}, {100 * stored['after'] / stored['before']:.1f} %")
    if facts["integers"]["share"]:
        table.add_row("MACs in integers", f"{100 * facts['integers']['share']:.1f} %")
    for output in facts.get("outputs", []):
        table.add_row(f"output {output['name']}", error_line(output))
    table.add_row("seconds", f"{facts['seconds']:.1f}")
    _print(table)
    for line in refusals(report):
        echo(line)


def comparison(result: Comparison) -> None:
    """Errors per output, sizes, latency."""
    table = _table("output", "SQNR dB", "cosine", "max |error|", "top-1 agreement", "samples")
    for output in (o.to_dict() for o in result.outputs):
        table.add_row(
            output["name"],
            _number(output.get("sqnr_db"), ".2f"),
            _number(output.get("cosine"), ".6f"),
            _number(output.get("max_abs_error"), ".4g"),
            _number(output.get("top1_agreement"), ".2%"),
            str(output["samples"]),
        )
    _print(table)
    for output in (o.to_dict() for o in result.outputs):
        if output["left_out"]:
            count = f"{output['left_out']} values that are NaN or infinite in both"
            echo(f"output {output['name']}: {count} are left out")
    first, second = result.bytes
    echo(f"bytes: {megabytes(first)} -> {megabytes(second)}, {first / second:.2f} times")
    if result.latency is not None:
        _latency(result.latency)
    for note in result.notes:
        echo(f"note: {note}")


def _latency(found: Latency) -> None:
    """Medians, quartiles in brackets."""
    texts = [
        f"{s.median:.2f}{unit} ({s.low:.2f} to {s.high:.2f})"
        for s, unit in ((found.reference_ms, " ms"), (found.other_ms, " ms"), (found.speedup, ""))
    ]
    threads = f"threads: {found.threads or 'all cores'}"
    echo(f"latency: {texts[0]} -> {texts[1]} a sample, speedup {texts[2]}")
    echo(
        f"  median (quartiles) of {found.runs} runs each, in turns, {WARM_UP} before left out;"
        f" {found.provider}, {threads}"
    )


def differences(result: Differences) -> None:
    """Encodings that differ, and those that only one side has."""
    if result.different:
        table = _table("tensor", "first", "second", "apart, steps")
        for found in result.different:
            table.add_row(found.name, found.first, found.second, f"{found.steps:.3g}")
        _print(table)
    for side, names in (("first", result.only_first), ("second", result.only_second)):
        for name in names[:LISTED]:
            echo(f"only in the {side}: {name}")
        if len(names) > LISTED:
            echo(f"only in the {side}: {len(names) - LISTED} more, see --json")
    echo(f"{result.equal} encodings are the same, {len(result.different)} differ")


def inspection(result: Inspection) -> None:
    """Layers, cost and weight ranges."""
    echo(f"{result.path}: opset {result.opset}, constants {megabytes(result.nbytes)}")
    echo("inputs:  " + "; ".join(result.inputs))
    echo("outputs: " + "; ".join(result.outputs))
    for stored in result.storage:
        echo(f"weights: {stored}")
    echo("operators: " + ", ".join(f"{n} {op}" for op, n in result.operators.items()))
    columns = ("layer", "op", "weight", "parameters", "MACs", "min", "max", "spread")
    table = _table(*columns)
    for layer in result.layers:
        table.add_row(
            layer.cost.name,
            layer.cost.op,
            "x".join(map(str, layer.weight_shape)),
            f"{layer.cost.parameters:,}",
            "?" if layer.cost.macs is None else f"{layer.cost.macs:,}",
            f"{layer.low:.4g}",
            f"{layer.high:.4g}",
            f"{layer.spread:.1f}",
        )
    _print(table)
    macs = [layer.cost.macs for layer in result.layers if layer.cost.macs is not None]
    parameters = sum(layer.cost.parameters for layer in result.layers)
    echo(f"sum: {parameters:,} parameters, {sum(macs):,} MACs a sample")
    echo("spread: largest |weight| of a channel over the median channel's")
    for note in result.notes:
        echo(f"note: {note}")


def analysis(result: Analysis) -> None:
    """The most fragile layers, why, and what would help; where the error enters."""
    facts, totals = result.model, result.totals
    echo(
        f"{facts['name']}: {totals['layers']} layers, {totals['parameters']:,} parameters,"
        f" {millions(totals['macs'])} MACs a sample,"
        f" activations {megabytes(totals['activation_bytes'])}"
    )
    if not result.layers:
        echo("the model has no layer with constant weights: there is nothing to rank")
    fragile = result.fragile[:FRAGILE]
    if fragile:
        echo(
            f"weights {result.weights}, activations {result.activations}: noise of all layers"
            f" expected at the outputs {_number(totals['sqnr_db'], '.1f')} dB"
        )
        _fragile(fragile, result)
        _advice(fragile)
    unknown = [layer for layer in result.layers if layer.share is None]
    for layer in unknown[:LISTED]:
        echo(f"not ranked: {layer.name} ({layer.op}): {layer.reason}")
    if len(unknown) > LISTED:
        echo(f"not ranked: {len(unknown) - LISTED} more layers, see --json")
    drops = [t for t in result.tensors if t.drop_db is not None and t.drop_db > 0]
    for tensor in sorted(drops, key=lambda t: -(t.drop_db or 0.0))[:DROPS]:
        echo(
            f"error enters: {tensor.node} ({tensor.op}) takes {tensor.inherited_sqnr_db:.1f} dB to"
            f" {tensor.sqnr_db:.1f} dB"
        )
    for tensor in (t for t in result.tensors if t.name in result.model["output_names"]):
        found = tensor.sqnr_db if tensor.written_sqnr_db is None else tensor.written_sqnr_db
        echo(f"all quantized, to nearest: output {tensor.name} {_number(found, '.1f')} dB")
    _cheap(result)
    for same in result.agreement:
        echo(
            f"expected and measured, {same.part} {same.format}: rank correlation"
            f" {_number(same.spearman, '.2f')} over {same.layers} layers"
        )
    left = [layer for layer in result.layers if layer.left_in_float is not None]
    for layer in sorted(left, key=lambda x: x.left_in_float or 0.0)[:FRAGILE]:
        sqnr = decibel(layer.left_in_float)
        echo(f"all quantized but {layer.name}: {_number(sqnr, '.1f')} dB")
    for note in result.notes:
        echo(f"note: {note}")


def _cheap(result: Analysis) -> None:
    """What compression spares most where it costs little."""
    if not any(layer.compressions for layer in result.layers):
        return
    floor = decibel(SPARED)
    if not result.cheap:
        echo(f"no layer is cheap to compress: none keeps {floor:.0f} dB at the outputs")
        return
    table = _table("cheap to compress", "by", "keeps", "saves", "output dB")
    for found in result.cheap[:CHEAP]:
        others = len(found.layers) - 1
        more = f" and {others} more" if others else ""
        table.add_row(
            f"{found.layers[0]}{more}",
            found.method,
            f"{found.kept:.0%}",
            f"{found.saved / result.totals['macs']:.1%}",
            f"{decibel(found.effect):.1f}" if found.effect > 0 else "no error",
        )
    _print(table)


def _advice(layers: Sequence[LayerFindings]) -> None:
    """What would help the most fragile layers, each command once."""
    commands: dict[str, tuple[str, list[str]]] = {}
    for layer in layers:
        for advice in layer.advice:
            names = commands.setdefault(advice.command, (advice.text, []))[1]
            spares = (
                "" if advice.removes is None else f" (spares {advice.removes:.0%} of the noise)"
            )
            names.append(f"{layer.name}{spares}")
    for command, (text, names) in commands.items():
        echo(f"{', '.join(names)}: {text}\n  {command}")


def _fragile(layers: Sequence[LayerFindings], result: Analysis) -> None:
    table = _table("layer", "op", "noise", "weight dB", "input dB", "why")
    for layer in layers:
        weight = layer.sensitivity("weights", result.weights)
        read = layer.sensitivity("activations", result.activations)
        table.add_row(
            layer.name,
            layer.op,
            _number(layer.share, ".1%"),
            *(_number(decibel(s.effect) if s else None, ".1f") for s in (weight, read)),
            layer.reason,
        )
    _print(table)


def deployment(result: Deployment) -> None:
    """What lies in the folder, and how it was verified."""
    echo(f"{result.folder}: {result.model} for {result.target}")
    table = _table("file", "size", "what for")
    for file in result.files:
        table.add_row(file.name, megabytes(file.bytes), _PURPOSES[file.kind, file.style])
    manifest = result.folder / MANIFEST
    table.add_row(MANIFEST, megabytes(manifest.stat().st_size), "hashes, inputs, outputs, versions")
    _print(table)
    echo("inputs:  " + "; ".join(map(str, result.inputs)))
    echo("outputs: " + "; ".join(map(str, result.outputs)))
    if result.integer_macs:
        share = result.integer_macs / result.macs
        echo(f"MACs in integers on ARM: {share:.1%} of {millions(result.macs)} a sample")
    count = max((o.samples for v in result.verifications for o in v.outputs), default=0)
    what = f"{count} samples" + (" that were made up" if result.verified_on == "made up" else "")
    echo(f"verified in fresh sessions, against the .onnx optimized alike, on {what}:")
    for found in result.verifications:
        loaded = ", optimizations replayed" if found.session else ""
        for output in found.outputs:
            echo(f"  {found.file}{loaded}: {output.name}: {_agreement(output)}")
    for note in result.notes:
        echo(f"note: {note}")


def _agreement(output: OutputError) -> str:
    if output.sqnr_db is not None:
        return f"SQNR {output.sqnr_db:.1f} dB, max |error| {output.max_abs_error:.3g}"
    return "not compared" if output.equal is None else f"{output.equal:.2%} equal"


def pass_list() -> None:
    """The passes and recipes, a line each."""
    table = _table("pass", "what it does")
    for name in PASSES:
        table.add_row(name, page(name).summary)
    _print(table)
    echo(f"recipes: {', '.join(RECIPES)}; onnxq passes NAME shows one pass")


def pass_page(name: str) -> None:
    """One pass: what it does, its options, how it is written in a recipe."""
    found = page(name)
    echo(f"{name}\n\n{found.summary}\n")
    for block in found.blocks:
        indent = "    " if block.kind == "literal" else ""
        echo(textwrap.indent(block.text, indent) + "\n")
    if found.source:
        source = textwrap.fill(f"Source: {found.source}", 100, break_on_hyphens=False)
        echo(f"{source}\n")
    if found.options:
        table = _table("option", "takes", "default", "meaning")
        for option, meaning in found.options:
            table.add_row(option.name, option.takes, option.default_text or "required", meaning)
        _print(table)
    echo(f"In a recipe:\n\n{found.recipe}\n\nIn Python: onnxq.passes.{found.class_name}")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
