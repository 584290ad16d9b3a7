"""Tables and lines on stdout.  Names come from models: they are shown as they are, never obeyed."""

from __future__ import annotations

from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from onnxq.errors import printable

__all__ = ["echo", "show", "table"]


class _Table(Table):
    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(printable(c) if isinstance(c, str) else c for c in cells), **options)


def echo(text: str) -> None:
    """Print a line."""
    click.echo(printable(text))


def table(*columns: str) -> Table:
    """A new table; without a head if no column has a name."""
    made = _Table(box=SIMPLE_HEAD if any(columns) else None, show_header=any(columns))
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "default", overflow="fold")
    return made


def show(made: Table) -> None:
    """Print a table, as wide as a terminal or as a page."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=160)
    console.print(made)
