"""The command line: verbs of a few lines each over `onnxq.api`.

Results go to stdout, progress to stderr.  Exit 0: done; 1: a known error, one line; 2: wrong usage.
Heavy imports live inside the commands, so that help answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onnxq.errors import OnnxqError
from onnxq.version import __version__

if TYPE_CHECKING:
    from onnxq.progress import Progress
    from onnxq.report import Report

__all__ = ["main"]

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


class _Group(click.Group):
    """Known errors become one line on stderr and exit 1; everything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxqError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("error: interrupted; nothing was written", err=True)
            ctx.exit(130)


def _options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_samples = _options(
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use N samples."),
    click.option(
        "--preprocess",
        metavar="NAME|FILE",
        help="For pictures: a preset (imagenet, mobilenet, yolox...) or a TOML file.",
    ),
)
_common = _options(
    click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write results as JSON."),
    click.option(
        "--threads",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Threads for onnxruntime; 0: all cores.",
    ),
    click.option("--quiet", is_flag=True, help="No progress and no summary."),
)
_calib = click.option(
    "--calib",
    type=FILE,
    metavar="PATH",
    help="Calibration samples: a folder of .npz, .npy or pictures, one .npz or .npy, or"
    " test_data_set_* folders.",
)
_target = click.option("--target", metavar="NAME", help="Runtime, default ort-cpu.")
_statistics = click.option(
    "--statistics", type=FILE, metavar="FILE", help="Keep calibration statistics for the next run."
)
_seed = click.option("--seed", type=int, default=0, metavar="N", help="Seed of random choices.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxq")
def main() -> None:
    r"""Model compression as passes over ONNX graphs.

    \b
    A first run:
      onnxq quantize in.onnx out.onnx --calib data/
      onnxq compare in.onnx out.onnx --data data/
    """


@main.command()
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@_calib
@click.option("--recipe", default="default", metavar="NAME|FILE", help="Passes to run.")
@_target
@click.option("--weights", metavar="FMT", help="Weights: int8/channel, int8/tensor, uint8...")
@click.option("--activations", metavar="FMT", help="Activations: uint8 or int8.")
@click.option(
    "--method",
    metavar="NAME",
    help="Ranges: minmax, moving-average, percentile, entropy or mse.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Node names or operator types that stay in float; repeat for more.",
)
@click.option("--encodings", type=FILE, metavar="FILE", help="Use these, do not calibrate.")
@click.option("--save-encodings", type=FILE, metavar="FILE", help="Write the encodings used.")
@_samples
@_statistics
@_seed
@_common
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

    IN is never changed; OUT appears whole or not at all.

    \b
    Examples:
      onnxq quantize in.onnx out.onnx --calib samples/
      onnxq quantize in.onnx out.onnx --calib photos/ --preprocess imagenet --limit 200
      onnxq quantize in.onnx out.onnx --calib samples/ --exclude 'head.*' --exclude Softmax
    """
    if calib is None and given["encodings"] is None:
        raise click.UsageError("give samples (--calib PATH) or encodings (--encodings FILE)")
    from onnxq import api, encodings_json

    model, report = api.quantize(source, destination, calib, progress=_progress(quiet), **given)
    if save_encodings is not None:
        encodings_json.save(model.encodings, save_encodings)
    _finish(report, source, destination, json_file, quiet)


@main.command()
@click.argument("recipe", metavar="RECIPE", type=str)
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@_calib
@_target
@_samples
@_statistics
@_seed
@_common
def run(
    recipe: str,
    source: Path,
    destination: Path,
    calib: Path | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    r"""Run any pipeline of passes: a recipe by name or a TOML file.

    \b
    A recipe file:
      [[pass]]
      name = "fold-batch-norm"
      [[pass]]
      name = "calibrate"
      weights = "int8/tensor"
      [[pass]]
      name = "insert-qdq"
    """
    from onnxq import api

    _, report = api.run(recipe, source, destination, calib, progress=_progress(quiet), **given)
    _finish(report, source, destination, json_file, quiet)


@main.command()
@click.argument("reference", metavar="FLOAT", type=FILE)
@click.argument("other", metavar="OTHER", type=FILE)
@click.option("--data", required=True, type=FILE, metavar="PATH", help="Samples, as for --calib.")
@_samples
@click.option("--latency/--no-latency", "timed", default=True, help="Also time both models.")
@_common
def compare(
    reference: Path, other: Path, data: Path, json_file: Path | None, quiet: bool, **given: Any
) -> None:
    """Compare a model with its float version, output by output.

    SQNR is the power of the float output over the power of the difference, in dB.
    """
    from onnxq import api, tables

    result = api.compare(reference, other, data, progress=_progress(quiet), **given)
    _write_json(json_file, result.to_dict())
    if not quiet:
        tables.comparison(result)


@main.command()
@click.argument("source", metavar="MODEL", type=FILE)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT=1x3x224x224",
    help="Size of a dynamic input; unknown sizes count as 1.",
)
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write results as JSON.")
def inspect(source: Path, shapes: Sequence[str], json_file: Path | None) -> None:
    """Show layers, parameters, bytes, MACs and weight ranges of a model."""
    sizes = dict(_shape(text) for text in shapes)
    from onnxq import api, tables

    result = api.inspect(source, shapes=sizes)
    _write_json(json_file, result.to_dict())
    tables.inspection(result)


@main.command()
@click.argument("name", metavar="[NAME]", required=False)
def passes(name: str | None) -> None:
    """List the passes, or show one: options, paper, drawing, what it refuses."""
    from onnxq import tables

    if name is None:
        tables.pass_list()
    else:
        tables.pass_page(name)


# ---------------------------------------------------------------------- parts


def _progress(quiet: bool) -> Progress:
    from onnxq.progress import Bar, Lines, Silent

    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


def _finish(
    report: Report, source: Path, destination: Path, json_file: Path | None, quiet: bool
) -> None:
    from onnxq import tables

    _write_json(json_file, report.to_dict())
    if not quiet:
        tables.summary(report, source, destination)


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        from onnxq.report import write_text

        write_text(path, json.dumps(content, indent=1) + "\n")


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    try:
        return name, tuple(int(s) for s in sizes.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not INPUT=1x3x224x224") from None
