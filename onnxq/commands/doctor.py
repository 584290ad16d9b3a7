"""`onnxq doctor`: what runs in integers, what does not, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Command
from onnxq.commands.options import (
    COUNT,
    FILE,
    Shapes,
    model_target,
    output,
    progress,
    shapes,
    strict,
    threads,
    write_json,
)

__all__ = ["doctor"]


@click.command(
    cls=Command, epilog="See also: onnxq quantize, which makes such models; onnxq compare."
)
@click.argument("source", metavar="MODEL", type=FILE)
@model_target
@click.option(
    "--fix",
    type=FILE,
    metavar="OUT",
    help="Write a copy that is mended where that is safe: the same numbers, or within half a step.",
)
@click.option(
    "--data",
    type=FILE,
    metavar="PATH",
    show_default="samples are made up",
    help="Samples to compare levels of optimization on, in any form that --calib of onnxq quantize"
    " takes.",
)
@click.option(
    "--limit",
    type=COUNT,
    metavar="N",
    show_default="4",
    help="Use at most N samples: of a folder, N files spread evenly over it.",
)
@click.option(
    "--preprocess",
    metavar="NAME|FILE",
    help="How pictures become inputs, as of onnxq quantize. Needed where the samples are pictures.",
)
@strict
@shapes
@threads
@output
def doctor(
    source: Path,
    fix: Path | None,
    data: Path | None,
    shapes: Shapes,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Tell what runs in integers, what does not, and why.

    MODEL is a quantized model, of onnxq or of any other tool, with QuantizeLinear and
    DequantizeLinear (Q/DQ) or with operators on integers. For each node that stays in float the
    table gives the reason and what to do about it. Prediction follows the rules by which
    onnxruntime fuses Q/DQ; measurement is read off the graph that it makes of the model, for x86-64
    and for ARM. Of a float model it is told what would run in integers.

    Levels of optimization are compared, too: where they differ by more than a few steps, integer
    kernels compute something else than the model says.

    Examples:
      onnxq doctor out.onnx
      onnxq doctor out.onnx --data samples/ --json doctor.json
      onnxq doctor theirs.onnx --fix mended.onnx
    """
    from onnxq import api, doctor_table
    from onnxq.examination import doctor as diagnose

    api.check_outputs([json_file, fix], models=[source], others=[data])
    result = diagnose(
        source, data=data, fix=fix, shapes=dict(shapes), progress=progress(quiet), **given
    )
    write_json(json_file, result.to_dict())
    if not quiet:
        doctor_table.diagnosis(result)
