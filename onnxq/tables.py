"""What the command line prints: summaries and tables on stdout."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from onnxq.api import Comparison, Inspection
from onnxq.pages import page
from onnxq.passes import PASSES
from onnxq.recipe import RECIPES
from onnxq.report import Report, error_line, megabytes, millions, weight_only_share

__all__ = ["comparison", "compression", "inspection", "pass_list", "pass_page", "summary"]

# Refusals listed one by one before the rest is counted.
LISTED = 8


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
            f" (measured on the graph that onnxruntime {facts['versions']['onnxruntime']} runs)",
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
    click.echo(f"{source} -> {destination}")
    _print(table)
    for line in refusals(report):
        click.echo(line)


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
    click.echo(f"{source} -> {destination}")
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
        click.echo(line)


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
            click.echo(f"output {output['name']}: {count} are left out")
    first, second = result.bytes
    click.echo(f"bytes: {megabytes(first)} -> {megabytes(second)}, {first / second:.2f} times")
    if result.latency_ms:
        first_ms, second_ms = result.latency_ms
        threads = f"{result.threads} threads" if result.threads else "all cores"
        click.echo(
            f"latency: {first_ms:.2f} ms -> {second_ms:.2f} ms a sample,"
            f" {first_ms / second_ms:.2f} times, median of alternating runs, {threads}"
        )
    for note in result.notes:
        click.echo(f"note: {note}")


def inspection(result: Inspection) -> None:
    """Layers, cost and weight ranges."""
    click.echo(f"{result.path}: opset {result.opset}, constants {megabytes(result.nbytes)}")
    click.echo("inputs:  " + "; ".join(result.inputs))
    click.echo("outputs: " + "; ".join(result.outputs))
    for stored in result.storage:
        click.echo(f"weights: {stored}")
    click.echo("operators: " + ", ".join(f"{n} {op}" for op, n in result.operators.items()))
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
    click.echo(f"sum: {parameters:,} parameters, {sum(macs):,} MACs a sample")
    click.echo("spread: largest |weight| of a channel over the median channel's")
    for note in result.notes:
        click.echo(f"note: {note}")


def pass_list() -> None:
    """The passes and recipes, a line each."""
    table = _table("pass", "what it does")
    for name in PASSES:
        table.add_row(name, page(name).summary)
    _print(table)
    click.echo(f"recipes: {', '.join(RECIPES)}; onnxq passes NAME shows one pass")


def pass_page(name: str) -> None:
    """One pass: what it does, its options, how it is written in a recipe."""
    found = page(name)
    click.echo(f"{name}\n\n{found.summary}\n")
    for block in found.blocks:
        indent = "    " if block.kind == "literal" else ""
        click.echo(textwrap.indent(block.text, indent) + "\n")
    if found.source:
        source = textwrap.fill(f"Source: {found.source}", 100, break_on_hyphens=False)
        click.echo(f"{source}\n")
    if found.options:
        table = _table("option", "takes", "default", "meaning")
        for option, meaning in found.options:
            table.add_row(option.name, option.takes, option.default_text or "required", meaning)
        _print(table)
    click.echo(f"In a recipe:\n\n{found.recipe}\n\nIn Python: onnxq.passes.{found.class_name}")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD if any(columns) else None, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "default", overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
