"""Tables on stdout."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["show", "table"]


def table(*columns: str) -> Table:
    """A new table; without a head if no column has a name."""
    made = Table(box=SIMPLE_HEAD if any(columns) else None, show_header=any(columns))
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "default", overflow="fold")
    return made


def show(made: Table) -> None:
    """Print a table, as wide as a terminal or as a page."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(made)
