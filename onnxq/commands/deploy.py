"""`onnxq deploy`: a model as an app ships it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Command
from onnxq.commands.options import (
    COUNT,
    FILE,
    Shape,
    Shapes,
    model_target,
    output,
    progress,
    strict,
    threads,
    write_json,
)

__all__ = ["deploy"]


@click.command(
    cls=Command,
    epilog="See also: onnxq quantize, which makes the model; onnxq compare, for its error.",
)
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="DIR", type=FILE)
@model_target
@click.option(
    "--shape",
    "shapes",
    type=Shape(),
    multiple=True,
    metavar="INPUT=SIZES",
    show_default="sizes that are open stay so",
    help="Fix the sizes of an input, as in --shape image=1x3x224x224. Repeat it for more.",
)
@click.option(
    "--data",
    type=FILE,
    metavar="PATH",
    show_default="samples are made up",
    help="Samples to verify on, in any form that --calib of onnxq quantize takes.",
)
@click.option(
    "--limit",
    type=COUNT,
    metavar="N",
    show_default="8",
    help="Verify on at most N samples: of a folder, N files spread evenly over it.",
)
@click.option(
    "--preprocess",
    metavar="NAME|FILE",
    help="How pictures become inputs, as of onnxq quantize: goes into the manifest, for the app.",
)
@strict
@click.option("--force", is_flag=True, help="Replace DIR if it is not empty, after success.")
@threads
@output
def deploy(
    source: Path,
    destination: Path,
    shapes: Shapes,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Write a model as an app ships it.

    IN is the model, quantized or not. DIR is made: the model as .onnx, for the full packages of
    onnxruntime; as .ort files, which custom builds load, too; what such builds need; and
    manifest.json with hashes, inputs, outputs and preprocessing. Nothing in them depends on the
    processor of this machine. Each .ort is loaded again and has to compute what the .onnx computes.
    DIR appears whole or not at all.

    Examples:
      onnxq deploy out.onnx app/ --data samples/
      onnxq deploy out.onnx app/ --shape image=1x3x224x224 --preprocess imagenet
      onnxq deploy out.onnx app/ --force --json deployed.json
    """
    from onnxq import api, deployment, tables

    api.check_outputs([json_file], models=[source], others=[given["data"]])
    result = deployment.deploy(
        source, destination, shapes=dict(shapes), progress=progress(quiet), **given
    )
    write_json(json_file, result.to_dict())
    if not quiet:
        tables.deployment(result)
