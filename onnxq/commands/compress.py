"""`onnxq compress`: fewer multiply-accumulates, bytes or milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Command
from onnxq.commands.options import (
    COUNT,
    FILE,
    calib,
    output,
    progress,
    report,
    resume,
    samples,
    seed,
    threads,
    write_json,
)

__all__ = ["compress"]


@click.command(
    cls=Command,
    epilog="See also: onnxq compare, to measure the result; onnxq passes compress, for how layers"
    " are chosen; onnxq run, for pipelines of your own.",
)
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@calib
@click.option(
    "--macs",
    type=float,
    metavar="SHARE",
    help="Share of the multiply-accumulates that may be left, as in --macs 0.5.",
)
@click.option(
    "--bytes",
    type=float,
    metavar="SHARE",
    help="Share of the bytes of the float weights that may be left, in place of --macs.",
)
@click.option(
    "--latency",
    type=float,
    metavar="SHARE",
    help="Share of the time that may be left, in place of --macs: models are timed on this machine,"
    " which should have nothing else to do.",
)
@click.option(
    "--method",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="spatial-svd (convolutions of kh x kw as two of kh x 1 and 1 x kw), weight-svd (any layer"
    " as two of lower rank), auto: the better of these, layer by layer; or channel-pruning"
    " (channels cut off, with what hangs on them; takes --macs or --bytes).",
)
@click.option(
    "--search",
    metavar="NAME",
    default="optimal",
    show_default=True,
    help="How layers are chosen: optimal (least error at the budget, by dynamic programming) or"
    " greedy (step by step what costs least error for what it saves).",
)
@click.option(
    "--multiple",
    type=COUNT,
    default=8,
    show_default=True,
    metavar="N",
    help="Ranks are multiples of N: kernels compute whole vectors. Small layers want 4.",
)
@click.option(
    "--least",
    type=COUNT,
    default=1,
    show_default=True,
    metavar="N",
    help="Least rank.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Layers that are left whole, by name or operator type, as in --exclude 'head.*' --exclude"
    " Gemm. Repeat it for more.",
)
@click.option(
    "--sensitivities",
    type=FILE,
    metavar="FILE",
    help="Keep what was learned of the layers in this JSON file: costs, errors, effects. The next"
    " run with another budget starts from it. Delete it when the samples change.",
)
@click.option(
    "--then-quantize",
    is_flag=True,
    help="Quantize the result to int8, as onnxq quantize does, in the same run and report.",
)
@samples
@report
@resume
@seed
@threads
@output
def compress(
    source: Path,
    destination: Path,
    calib: Path | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Compress a model to a budget of computation, bytes or time.

    IN is the float model, which is never changed. OUT is the smaller model, standard ONNX, which
    appears whole or not at all: layers are split into two of lower rank, where that changes the
    outputs least, and all weights after the first of them are fitted anew to what the layers put
    out before. No training and no labels are needed, but samples.

    Examples:
      onnxq compress in.onnx out.onnx --calib samples/ --macs 0.5
      onnxq compress in.onnx out.onnx --calib samples/ --bytes 0.6 --exclude 'head.*'
      onnxq compress in.onnx out.onnx --calib samples/ --macs 0.7 --then-quantize
      onnxq compress in.onnx out.onnx --calib samples/ --latency 0.8 --sensitivities in.json
    """
    if calib is None:
        raise click.UsageError("give samples (--calib PATH)")
    budgets = [name for name in ("macs", "bytes", "latency") if given[name] is not None]
    if len(budgets) != 1:
        raise click.UsageError("give one budget: --macs SHARE, --bytes SHARE or --latency SHARE")
    from onnxq import api, compression, tables

    made = (destination, json_file, given["report"], given["sensitivities"])
    api.check_outputs(made, models=[source], others=(calib,))
    _, report = compression.compress(source, destination, calib, progress=progress(quiet), **given)
    write_json(json_file, report.to_dict())
    if not quiet:
        tables.compression(report, source, destination)
