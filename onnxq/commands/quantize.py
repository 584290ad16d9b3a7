"""`onnxq quantize`: a float model to integers."""

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

__all__ = ["quantize"]


@click.command(
    cls=Command,
    epilog="See also: onnxq compare, to measure the result; onnxq run, for pipelines of your own;"
    " onnxq passes, for what the passes of a recipe do.",
)
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@calib
@data_free
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    show_default="default, accurate, per-tensor, weight-only or data-free, as other options say",
    help="The passes to run: default, accurate (AdaRound, for weights of few bits), per-tensor"
    " (channels evened out first, for targets with one scale per weight), weight-only (activations"
    " stay float), weight-only-nearest (the same without samples), data-free, minmax (the plain"
    " scheme, for comparison), or a TOML file.",
)
@target
@click.option(
    "--weights",
    metavar="FMT",
    show_default="int8/channel, or the recipe's",
    help="Number format of weights: int8, int7 (for CPUs without VNNI, where int8 may overflow),"
    " and so on to int2, or uint8 to uint2, with a scale per output channel, as in int8/channel,"
    " or one in all, as in int8/tensor. 4 bits and fewer take half a byte in the file and run as"
    " int8. With float activations also a scale per block, as in int4/block=32.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="SELECTOR=FMT",
    help="Number format of the weights of some layers, as in --format first=int8/channel. SELECTOR"
    " is first (the layers next to the model's inputs), last (next to its outputs), depthwise (the"
    " convolutions with a group per channel), or a glob on names or operator types. Repeat it for"
    " more; the last one that names a layer counts.",
)
@click.option(
    "--activations",
    metavar="FMT",
    show_default="the target's first, or the recipe's",
    help="Number format of activations: uint8; int8; uint16 or int16, for the target qnn; or"
    " float, for integers in nothing but the weights of MatMul and Gemm, which takes no samples,"
    " but rounds scales per channel better with them.",
)
@click.option(
    "--method",
    metavar="NAME",
    show_default="mse, or the recipe's",
    help="How the range of an activation is chosen: mse (least squared error), entropy,"
    " percentile, moving-average or minmax (all values).",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Nodes that stay in float, by name or operator type, as in --exclude 'head.*' --exclude"
    " Softmax. Repeat it for more.",
)
@click.option(
    "--encodings",
    type=FILE,
    metavar="FILE",
    help="Take number formats, scales and zero points from this JSON file instead of choosing them:"
    " AIMET's, or onnxruntime's TensorQuantOverrides. --exclude goes with it, options that choose"
    " formats or ranges do not. Without --calib, this needs a recipe that reads no samples, such as"
    " minmax.",
)
@click.option(
    "--save-encodings",
    type=FILE,
    metavar="FILE",
    help="Write the scales and zero points that were used, for --encodings.",
)
@samples
@statistics
@report
@search
@seed
@threads
@output
def quantize(
    source: Path,
    destination: Path,
    calib: Path | None,
    save_encodings: Path | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    r"""Quantize a float model to integers.

    IN is the float model, which is never changed. OUT is the integer model, standard ONNX, which
    appears whole or not at all. What stays in float is listed with the reason.

    Examples:
      onnxq quantize in.onnx out.onnx --calib samples/
      onnxq quantize in.onnx out.onnx --calib photos/ --preprocess imagenet
      onnxq quantize in.onnx out.onnx --calib samples/ --exclude 'head.*'
      onnxq quantize in.onnx out.onnx --calib samples/ --weights int8/tensor
      onnxq quantize in.onnx out.onnx --calib samples/ --target xnnpack
      onnxq quantize in.onnx out.onnx --calib samples/ --target qnn --activations uint16
      onnxq quantize in.onnx out.onnx --calib samples/ --weights int4/channel \
        --format first=int8/channel --format depthwise=int8/channel
      onnxq quantize in.onnx out.onnx --data-free --preprocess imagenet
    """
    weight_only = given["activations"] == "float"
    if calib is None and given["encodings"] is None and not given["data_free"] and not weight_only:
        raise click.UsageError(
            "give samples (--calib PATH), or encodings (--encodings FILE), or take --data-free"
        )
    if calib is not None and given["data_free"]:
        raise click.UsageError("--calib and --data-free exclude one another")
    chosen = [f"--{n}" for n in ("weights", "activations", "method") if given[n] is not None]
    chosen += ["--format"] if given["formats"] else []
    if given["encodings"] is not None and chosen:
        raise click.UsageError(
            f"{chosen[0]} would choose what --encodings says already: leave out one of them"
        )
    from onnxq import api, encodings_json

    made = (destination, save_encodings, json_file, given["statistics"], given["report"])
    read = (calib, given["encodings"], given["recipe"])
    api.check_outputs(made, models=[source], others=read)
    model, report = api.quantize(source, destination, calib, progress=progress(quiet), **given)
    if save_encodings is not None:
        encodings_json.save(model.encodings, save_encodings)
    finish(report, source, destination, json_file, quiet)
