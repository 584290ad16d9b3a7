"""`onnxq analyze`: which layers of a model are fragile, why, and what would help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Command
from onnxq.commands.options import (
    COUNT,
    FILE,
    output,
    progress,
    report,
    samples,
    seed,
    target,
    threads,
    write_json,
)

__all__ = ["analyze"]


@click.command(cls=Command, epilog="See also: onnxq quantize, onnxq compare.")
@click.argument("source", metavar="MODEL", type=FILE)
@click.option(
    "--calib",
    required=True,
    type=FILE,
    metavar="PATH",
    help="Calibration samples, in any form that --calib of onnxq quantize takes.",
)
@click.option(
    "--weights",
    metavar="FORMAT",
    default="int8/channel",
    show_default=True,
    help="Format of weights by which layers are ranked, such as int4/channel. int8/tensor,"
    " int8/channel, int4/channel and int16/channel are in the results anyhow.",
)
@click.option(
    "--activations",
    metavar="FORMAT",
    default="uint8",
    show_default=True,
    help="Format of activations by which layers are ranked. uint8 and uint16 are in the results"
    " anyhow.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Layers that stay in float anyhow, by node name or operator type. Repeat it for more.",
)
@target
@click.option(
    "--measure",
    type=click.Choice(["one-at-a-time", "all-but-one"]),
    show_default="effects are expected, not measured",
    help="Also measure: each format of each layer, all else in float, or each layer in float, all"
    " else quantized. Minutes in place of seconds.",
)
@click.option(
    "--measure-samples",
    "trial_samples",
    type=COUNT,
    default=16,
    show_default=True,
    metavar="N",
    help="Measure on at most N samples.",
)
@click.option(
    "--compression/--no-compression",
    default=True,
    show_default=True,
    help="Also tell what each layer may become by low rank and by fewer channels, and what that"
    " does to the outputs. It takes longer than all the rest together.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep what is measured of each layer in this folder, and take up what an interrupted run"
    " of the same model, samples and options left there.",
)
@samples
@report
@seed
@threads
@output
def analyze(
    source: Path,
    calib: Path,
    report: Path | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Show which layers are fragile, why, and what would help.

    MODEL is a float model. For each layer and number format, the noise of rounding its weight, and
    what it reads, is followed to the model's outputs: by gradients and second-order statistics, no
    layer is run on its own. The share of a layer is its part of all that noise. Beside it stand
    the ranges that cause it, the cost, and the error along the graph of the quantized model.

    --measure tells how far the expectation can be trusted: the rank correlation of both is shown.

    Examples:
      onnxq analyze in.onnx --calib samples/
      onnxq analyze in.onnx --calib samples/ --report out.html
      onnxq analyze in.onnx --calib samples/ --weights int4/channel --json layers.json
      onnxq analyze in.onnx --calib samples/ --measure one-at-a-time --resume work/
    """
    from onnxq import api, report_page, tables
    from onnxq.analyzing import analyze as run

    api.check_outputs([report, json_file], models=[source], others=[calib])
    if report is not None:
        report_page.check_installed()
    result = run(source, calib, progress=progress(quiet), **given)
    if report is not None:
        report_page.write(report, report_page.of_analysis(source.name, result))
    write_json(json_file, result.to_dict())
    if not quiet:
        tables.analysis(result)
