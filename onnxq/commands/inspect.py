"""`onnxq inspect`: what a model consists of."""

from __future__ import annotations

from pathlib import Path

import click

from onnxq.commands.group import Command
from onnxq.commands.options import FILE, Shapes, output, shapes, write_json

__all__ = ["inspect"]


@click.command(cls=Command, epilog="See also: onnxq compare, for the error of a quantized model.")
@click.argument("source", metavar="MODEL", type=FILE)
@shapes
@output
def inspect(source: Path, shapes: Shapes, json_file: Path | None, quiet: bool) -> None:
    """Show inputs, operators, layers, MACs and weight ranges.

    MODEL is any ONNX model; its layers are those with constant weights in float. MACs are
    multiply-adds a sample. A large spread, the largest channel of a weight over the median one,
    is what scales per channel are for.

    Examples:
      onnxq inspect in.onnx
      onnxq inspect in.onnx --shape image=1x3x224x224 --json layers.json
    """
    from onnxq import api, inspection, tables

    api.check_outputs([json_file], models=[source])
    result = inspection.inspect(source, shapes=dict(shapes))
    write_json(json_file, result.to_dict())
    if not quiet:
        tables.inspection(result)
