"""What `onnxq zoo` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from onnxq.console import show, table
from onnxq.report import megabytes
from onnxq.zoo import Built, Entry, Result
from onnxq.zoo.page import change, summary

__all__ = ["built", "listed", "measured"]


def listed(found: Iterable[Entry]) -> None:
    """The entries: task, licence, size, expected scores."""
    head = ("name", "task", "licence", "size", "metric", "float", "W8A8", "W4A8")
    made = table(*head)
    for entry in found:
        scored = entry.evaluation
        made.add_row(
            entry.name,
            entry.task,
            entry.model.licence,
            megabytes(entry.model.bytes),
            f"{scored.metric}, {scored.unit}",
            f"{scored.score:.2f}",
            *(f"{entry.formats[n].score:.2f}" for n in head[-2:]),
        )
    show(made)


def built(found: Sequence[Built]) -> None:
    """The models that were made."""
    made = table("model", "size", "MACs in integers", "SQNR dB", "seconds")
    for each in found:
        before, after = map(megabytes, each.bytes)
        made.add_row(
            str(each.file),
            f"{before} -> {after}",
            f"{100 * each.share:.1f} %",
            ", ".join("-" if s is None else f"{s:.1f}" for s in each.sqnr_db),
            f"{each.seconds:.1f}",
        )
    show(made)


def measured(found: Sequence[Result], page: Path | None) -> None:
    """The scores, and what is not as it should be."""
    head = ("format", "score", "change", "size", "MACs in integers", "latency")
    made = table("name", "metric", "float", *head)
    for result in found:
        name, metric = result.entry.name, result.entry.evaluation.metric
        for index, row in enumerate(result.rows):
            first = (name, metric, f"{result.score:.2f}") if index == 0 else ("", "", "")
            made.add_row(
                *first,
                row.format,
                f"{row.score:.2f}",
                change(result, row).replace("**", ""),
                megabytes(row.bytes),
                f"{100 * row.share:.1f} %",
                f"{row.latency:.2f}",
            )
    show(made)
    for line in summary(found):
        click.echo(line)
    for result in found:
        for line in result.surprises():
            click.echo(f"not as expected: {line}")
    if page is not None:
        click.echo(f"-> {page}")
