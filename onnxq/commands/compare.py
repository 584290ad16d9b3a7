"""`onnxq compare`: a model beside its float version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Command
from onnxq.commands.options import COUNT, FILE, output, progress, samples, threads, write_json

__all__ = ["compare"]


@click.command(cls=Command, epilog="See also: onnxq quantize.")
@click.argument("reference", metavar="FLOAT", type=FILE)
@click.argument("other", metavar="OTHER", type=FILE)
@click.option(
    "--data",
    required=True,
    type=FILE,
    metavar="PATH",
    help="Samples to compare on, in any form that --calib of onnxq quantize takes.",
)
@samples
@click.option(
    "--latency/--no-latency",
    "timed",
    default=True,
    show_default=True,
    help="Whether to time both models, in turns, on the first sample.",
)
@click.option(
    "--runs",
    type=COUNT,
    metavar="N",
    show_default="those of about two seconds, at least 10",
    help="Timed runs of each model, after two that are left out.",
)
@threads
@output
def compare(
    reference: Path, other: Path, data: Path, json_file: Path | None, quiet: bool, **given: Any
) -> None:
    """Compare a model with its float version, output by output.

    FLOAT is the reference, OTHER the model that should give the same. SQNR is the power of the
    float output over the power of the difference, in dB: 20 is an error of a tenth, 40 of a
    hundredth. Top-1 agreement is the share of positions with the same greatest class.

    Latency is that of both models run in turns, in an order drawn anew each round, so that other
    work on the machine slows both: medians with quartiles, and the quartiles of the ratio round by
    round.

    Examples:
      onnxq compare in.onnx out.onnx --data samples/
      onnxq compare in.onnx out.onnx --data samples/ --threads 1 --runs 200
      onnxq compare in.onnx out.onnx --data samples/ --no-latency --json error.json
    """
    from onnxq import api, comparison, tables

    api.check_outputs([json_file], models=[reference, other], others=[data])
    result = comparison.compare(reference, other, data, progress=progress(quiet), **given)
    write_json(json_file, result.to_dict())
    if not quiet:
        tables.comparison(result)
