"""`onnxq run`: any pipeline of passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Command
from onnxq.commands.options import (
    FILE,
    calib,
    data_free,
    finish,
    output,
    progress,
    report,
    samples,
    search,
    seed,
    statistics,
    target,
    threads,
)

__all__ = ["run"]


@click.command(cls=Command, epilog="See also: onnxq passes, for the passes and their options.")
@click.argument("recipe", metavar="RECIPE", type=str)
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@calib
@data_free
@target
@samples
@statistics
@report
@search
@seed
@threads
@output
def run(
    recipe: str,
    source: Path,
    destination: Path,
    calib: Path | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Run any pipeline of passes.

    RECIPE is the name of a recipe or a TOML file; IN is the float model, which is never
    changed; OUT is the new model, which appears whole or not at all. Samples are needed by passes
    that read them, such as calibrate.

    A recipe file:
      [[pass]]
      name = "fold-batch-norm"
      [[pass]]
      name = "calibrate"
      weights = "int8/tensor"
      [[pass]]
      name = "insert-qdq"

    Examples:
      onnxq run mine.toml in.onnx out.onnx --calib samples/
      onnxq run minmax in.onnx out.onnx --calib samples/ --json facts.json
    """
    from onnxq import api

    made = (destination, json_file, given["statistics"], given["report"])
    api.check_outputs(made, models=[source], others=(calib, recipe))
    _, report = api.run(recipe, source, destination, calib, progress=progress(quiet), **given)
    finish(report, source, destination, json_file, quiet)
