"""`onnxq passes`: the passes and recipes."""

from __future__ import annotations

import click

from onnxq.commands.group import Command

__all__ = ["passes"]


@click.command(cls=Command, epilog="See also: onnxq run, which runs passes from a recipe file.")
@click.argument("name", metavar="[NAME]", required=False)
def passes(name: str | None) -> None:
    """List the passes and recipes, or explain one pass.

    NAME is a pass: its page says what it does and what it refuses, with formula, drawing and
    paper, and how it is written in a recipe.

    Examples:
      onnxq passes
      onnxq passes calibrate
    """
    from onnxq import tables

    if name is None:
        tables.pass_list()
    else:
        tables.pass_page(name)
