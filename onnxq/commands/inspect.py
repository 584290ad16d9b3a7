"""`onnxq inspect`: what a model consists of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from onnxq.commands.group import Command
from onnxq.commands.options import FILE, output, write_json

__all__ = ["inspect"]


@click.command(cls=Command, epilog="See also: onnxq compare, for the error of a quantized model.")
@click.argument("source", metavar="MODEL", type=FILE)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT=SIZES",
    show_default="unknown sizes count as 1",
    help="Sizes of a dynamic input, as in --shape image=1x3x224x224. Repeat it for more.",
)
@output
def inspect(source: Path, shapes: Sequence[str], json_file: Path | None, quiet: bool) -> None:
    """Show inputs, operators, layers, MACs and weight ranges.

    MODEL is any ONNX model; its layers are those with constant weights in float. MACs are
    multiply-adds a sample. A large spread, the largest channel of a weight over the median one,
    is what scales per channel are for.

    Examples:
      onnxq inspect in.onnx
      onnxq inspect in.onnx --shape image=1x3x224x224 --json layers.json
    """
    sizes = dict(_shape(text) for text in shapes)
    from onnxq import api, tables

    api.check_outputs([json_file], models=[source])
    result = api.inspect(source, shapes=sizes)
    write_json(json_file, result.to_dict())
    if not quiet:
        tables.inspection(result)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    try:
        found = tuple(int(s) for s in sizes.lower().split("x"))
    except ValueError:
        found = ()
    if not name or not found or min(found) < 1:
        raise click.BadParameter(f"{text!r} is not of the form input=1x3x224x224")
    return name, found
