"""`onnxq encodings`: scales and zero points as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Group
from onnxq.commands.options import (
    FILE,
    calib,
    finish,
    output,
    progress,
    report,
    samples,
    seed,
    target,
    threads,
    write_json,
)

__all__ = ["encodings"]

_model = click.option(
    "--model",
    type=FILE,
    metavar="FLOAT",
    help="The float model. Versions before 2.0.0 need it: they do not say which axis the scales of"
    " a weight run along, and keep weights and activations apart.",
)
_to = click.option(
    "--to",
    "version",
    default="2.0.0",
    show_default=True,
    metavar="VERSION",
    help="What to write: 0.6.1, 1.0.0 or 2.0.0, AIMET's schemas, or overrides, the"
    " TensorQuantOverrides of onnxruntime.quantization.",
)


@click.group(
    cls=Group,
    epilog="See also: onnxq quantize, which takes such a file with --encodings and writes one with"
    " --save-encodings.",
)
def encodings() -> None:
    """Read, write, apply and compare scales and zero points.

    Encodings say how each tensor is written in integers: type, scale, zero point. They come as
    JSON in AIMET's versions 0.6.1, 1.0.0 and 2.0.0, as onnxruntime's TensorQuantOverrides, or
    inside a Q/DQ model.

    Examples:
      onnxq encodings export out.onnx out.json
      onnxq encodings apply in.onnx aimet.encodings out.onnx
      onnxq encodings convert out.json out.encodings --to 1.0.0 --model in.onnx
      onnxq encodings diff aimet.encodings out.json --model in.onnx
    """


@encodings.command(epilog="See also: onnxq encodings apply, the way back.")
@click.argument("source", metavar="QDQ", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@_to
@click.option(
    "--float",
    "float_model",
    type=FILE,
    metavar="FILE",
    help="Also write the model without QuantizeLinear and DequantizeLinear, whose tensors the"
    " encodings name.",
)
@click.option(
    "--complete",
    is_flag=True,
    help="Name exactly the tensors that AIMET's default configuration rounds, as its strict loading"
    " wants; ranges of those that the model does not round come from --calib.",
)
@calib
@samples
@target
@threads
@output
def export(
    source: Path,
    destination: Path,
    version: str,
    float_model: Path | None,
    complete: bool,
    calib: Path | None,
    target: str | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Write the encodings that a Q/DQ model is made of.

    QDQ is a model with QuantizeLinear and DequantizeLinear, of any program; OUT the JSON file.

    Examples:
      onnxq encodings export out.onnx out.json
      onnxq encodings export out.onnx out.encodings --to 1.0.0 --float float.onnx
      onnxq encodings export out.onnx out.encodings --to 1.0.0 --complete --calib samples/
    """
    if complete != (calib is not None):
        raise click.UsageError("--complete needs samples, and nothing else does: give both or none")
    from onnxq import api, encoding_files
    from onnxq.console import echo

    made = [destination, float_model, json_file]
    api.check_outputs(made, models=[source], others=[calib])
    found, notes = encoding_files.export(
        source,
        destination,
        version=version,
        float_model=float_model,
        target=target or "ort-cpu",
        complete=calib,
        progress=progress(quiet),
        **given,
    )
    write_json(json_file, {"encodings": len(found), "float_nodes": found.float_nodes})
    if not quiet:
        echo(f"{len(found)} encodings -> {destination}")
        for note in notes:
            echo(note)


@encodings.command(epilog="See also: onnxq encodings diff, to see that nothing was lost.")
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@_to
@_model
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def convert(source: Path, destination: Path, version: str, model: Path | None, quiet: bool) -> None:
    """Write encodings in another version.

    IN is a JSON file of any version, which it says itself, or a Q/DQ model; OUT the JSON file.

    Examples:
      onnxq encodings convert old.encodings new.json --model in.onnx
      onnxq encodings convert new.json overrides.json --to overrides
    """
    from onnxq import api, encoding_files
    from onnxq.console import echo

    api.check_outputs([destination], models=[source, model])
    found = encoding_files.convert(source, destination, version=version, model=model)
    if not quiet:
        echo(f"{len(found)} encodings -> {destination}")
        for name, kind in found.float_tensors.items():
            echo(f"left out: {name} is {kind}")


@encodings.command(epilog="See also: onnxq compare, to measure the result.")
@click.argument("source", metavar="FLOAT", type=FILE)
@click.argument("file", metavar="ENCODINGS", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@calib
@click.option(
    "--complete",
    is_flag=True,
    help="Calibrate what the file leaves out, with --calib. Otherwise nodes stay in float of which"
    " a tensor has no encoding.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Nodes that stay in float, by name or operator type. Repeat it for more.",
)
@samples
@target
@report
@seed
@threads
@output
def apply(
    source: Path,
    file: Path,
    destination: Path,
    calib: Path | None,
    exclude: tuple[str, ...],
    target: str | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Quantize a float model as encodings say.

    FLOAT is the float model, ENCODINGS a JSON file of any version, OUT the Q/DQ model. Biases
    follow from inputs and weights, moved data (Reshape, MaxPool) from their source. What stays in
    float is listed with the reason. With --calib the result is measured, too.

    Examples:
      onnxq encodings apply in.onnx aimet.encodings out.onnx
      onnxq encodings apply in.onnx part.json out.onnx --complete --calib samples/
    """
    if given["complete"] and calib is None:
        raise click.UsageError("--complete needs samples: give --calib PATH")
    from onnxq import api, encoding_files

    made = (destination, json_file, given["report"])
    api.check_outputs(made, models=[source], others=[file, calib])
    _, done = encoding_files.apply(
        source,
        file,
        destination,
        calib,
        exclude=tuple(exclude),
        target=target or "ort-cpu",
        progress=progress(quiet),
        **given,
    )
    finish(done, source, destination, json_file, quiet)


@encodings.command(epilog="See also: onnxq encodings convert.")
@click.argument("first", metavar="A", type=FILE)
@click.argument("second", metavar="B", type=FILE)
@_model
@output
def diff(
    first: Path, second: Path, model: Path | None, json_file: Path | None, quiet: bool
) -> None:
    """Compare two sets of encodings, tensor by tensor.

    A and B are JSON files of any version, or Q/DQ models. The distance of two ranges is that of
    their ends, in steps of A: below 1 both write nearly the same integers.

    Examples:
      onnxq encodings diff before.json after.json
      onnxq encodings diff aimet.encodings out.onnx --model in.onnx --json diff.json
    """
    from onnxq import api, encoding_files, tables

    api.check_outputs([json_file], models=[first, second, model])
    result = encoding_files.diff(first, second, model)
    write_json(json_file, result.to_dict())
    if not quiet:
        tables.differences(result)
