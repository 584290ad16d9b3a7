"""The command line: verbs of a few lines each over `onnxq.api`.

Results go to stdout, progress to stderr.  Exit 0: done; 1: a known error, one line; 2: wrong usage;
130: interrupted.  A bug keeps its traceback.  Heavy imports live inside the commands, so that help
answers at once.
"""

from __future__ import annotations

import inspect as inspection_of
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onnxq.errors import OnnxqError, PassError
from onnxq.version import __version__

if TYPE_CHECKING:
    from onnxq.progress import Progress
    from onnxq.report import Report

__all__ = ["main"]

Function = TypeVar("Function", bound=Callable[..., Any])


class _Command(click.Command):
    """A verb whose help keeps the line breaks of paragraphs that hold indented lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _kept(self.help or "")


class _Group(click.Group):
    """Known errors become one line on stderr and exit 1; everything else keeps its traceback."""

    command_class = _Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _kept(self.help or "")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PassError:  # what no pass foresaw is a bug
            raise
        except OnnxqError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; no file was left half-written", err=True)
            ctx.exit(130)


def _kept(text: str) -> str:
    """Mark paragraphs that hold indented lines with click's sign for `leave as it is`."""
    paragraphs = inspection_of.cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if "\n " in p else p for p in paragraphs)


class _Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions
    """Seconds, minutes or hours, as a number of seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The seconds that a text such as 90, 90s, 1.5m or 1h means."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]*\.?[0-9]+) *([smh]?)", str(value).strip())
        if found is None or not float(found[1]) > 0:
            self.fail(f"{value!r} is no time; write 60s, 5m or 1h", param, ctx)
        return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


FILE = click.Path(path_type=Path, readable=False)  # what cannot be read is said by its reader
COUNT = click.IntRange(min=1)


def _options(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(command: Function) -> Function:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_samples = _options(
    click.option(
        "--limit",
        type=COUNT,
        metavar="N",
        show_default="all of them",
        help="Use at most N samples: of a folder, N files spread evenly over it.",
    ),
    click.option(
        "--preprocess",
        metavar="NAME|FILE",
        help="How pictures become inputs: imagenet, mobilenet, tf, caffe, unit, raw, yolox, yolov5,"
        " yolov8, or a TOML file. Needed where the samples are pictures.",
    ),
)
_output = _options(
    click.option(
        "--json",
        "json_file",
        type=FILE,
        metavar="FILE",
        help="Also write the results as JSON.",
    ),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
)
_threads = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default="0, all cores",
    metavar="N",
    help="Threads of onnxruntime.",
)
_calib = click.option(
    "--calib",
    type=FILE,
    metavar="PATH",
    help="Calibration samples: a folder of .npz files (arrays by input name), of .npy files, of"
    " pictures, or of test_data_set_* folders; or one .npz or .npy with samples stacked along the"
    " first axis. A hundred typical inputs are plenty, labels are not needed.",
)
_data_free = click.option(
    "--data-free",
    is_flag=True,
    help="Work without samples: ranges come from batch normalization where there is any, and from"
    " samples that are made up. Give --preprocess if the inputs are pictures and you know it.",
)
_target = click.option(
    "--target",
    metavar="NAME",
    show_default="ort-cpu, unless the recipe names one",
    help="What is to run the model. ort-cpu is onnxruntime on a CPU.",
)
_statistics = click.option(
    "--statistics",
    type=FILE,
    metavar="FILE",
    help="Keep what was learned from the samples in this file, and start from it the next time, as"
    " in --statistics in.stats.npz. Delete it when the samples change.",
)
_report = click.option(
    "--report",
    type=FILE,
    metavar="FILE",
    help="Also write the results as a page that opens offline, as in --report out.html: with what"
    " each channel's weights were before and after.",
)
_seed = click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of random choices. The same seed, samples and options give the same bytes.",
)
_search = _options(
    click.option(
        "--budget",
        "budget_s",
        type=_Duration(),
        metavar="TIME",
        show_default="as long as it takes",
        help="Time that passes which search may take, such as 60s, 5m or 1h: more sweeps if there"
        " is more of it, and what is left when it is up is rounded to nearest.",
    ),
    click.option(
        "--resume",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep each finished layer of a search in this folder, and take up what an interrupted"
        " run of the same model, samples and options left there. The result has the same bytes.",
    ),
)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Results go to stdout, progress to stderr. Exit codes: 0 done, 1 an error that the one"
    " line on stderr explains, 2 wrong usage, 130 interrupted.",
)
@click.version_option(__version__, prog_name="onnxq")
def main() -> None:
    """Model compression as passes over ONNX graphs.

    A first run, with a folder of typical inputs, then a look at what it did:
      onnxq quantize in.onnx out.onnx --calib samples/
      onnxq compare in.onnx out.onnx --data samples/

    `onnxq VERB --help` explains a verb with examples.
    """


@main.command(
    epilog="See also: onnxq compare, to measure the result; onnxq run, for pipelines of your own;"
    " onnxq passes, for what the passes of a recipe do."
)
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@_calib
@_data_free
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    show_default="default, accurate, per-tensor, weight-only or data-free, as other options say",
    help="The passes to run: default, accurate (AdaRound, for weights of few bits), per-tensor"
    " (channels evened out first, for targets with one scale per weight), weight-only (activations"
    " stay float), weight-only-nearest (the same without samples), data-free, minmax (the plain"
    " scheme, for comparison), or a TOML file.",
)
@_target
@click.option(
    "--weights",
    metavar="FMT",
    show_default="int8/channel, or the recipe's",
    help="Number format of weights: int8, int4, int3 or int2, or uint8 to uint2, with a scale per"
    " output channel, as in int8/channel, or one in all, as in int8/tensor. 4 bits and fewer take"
    " half a byte in the file and run as int8. With float activations also a scale per block, as in"
    " int4/block=32.",
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
    show_default="uint8, or the recipe's",
    help="Number format of activations: uint8; int8, which onnxruntime does not run in integers"
    " on x86-64; or float, for integers in nothing but the weights of MatMul and Gemm, which takes"
    " no samples, but rounds scales per channel better with them.",
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
    help="Take scales and zero points from this JSON file instead of choosing them. Without"
    " --calib, this needs a recipe that reads no samples, such as minmax.",
)
@click.option(
    "--save-encodings",
    type=FILE,
    metavar="FILE",
    help="Write the scales and zero points that were used, for --encodings.",
)
@_samples
@_statistics
@_report
@_search
@_seed
@_threads
@_output
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
    from onnxq import api, encodings_json

    made = (destination, save_encodings, json_file, given["statistics"], given["report"])
    read = (calib, given["encodings"], given["recipe"])
    api.check_outputs(made, models=[source], others=read)
    model, report = api.quantize(source, destination, calib, progress=_progress(quiet), **given)
    if save_encodings is not None:
        encodings_json.save(model.encodings, save_encodings)
    _finish(report, source, destination, json_file, quiet)


@main.command(epilog="See also: onnxq passes, for the passes and their options.")
@click.argument("recipe", metavar="RECIPE", type=str)
@click.argument("source", metavar="IN", type=FILE)
@click.argument("destination", metavar="OUT", type=FILE)
@_calib
@_data_free
@_target
@_samples
@_statistics
@_report
@_search
@_seed
@_threads
@_output
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
    _, report = api.run(recipe, source, destination, calib, progress=_progress(quiet), **given)
    _finish(report, source, destination, json_file, quiet)


@main.command(epilog="See also: onnxq quantize.")
@click.argument("reference", metavar="FLOAT", type=FILE)
@click.argument("other", metavar="OTHER", type=FILE)
@click.option(
    "--data",
    required=True,
    type=FILE,
    metavar="PATH",
    help="Samples to compare on, in any form that --calib of onnxq quantize takes.",
)
@_samples
@click.option(
    "--latency/--no-latency",
    "timed",
    default=True,
    show_default=True,
    help="Whether to time both models, in turns, on the first sample.",
)
@_threads
@_output
def compare(
    reference: Path, other: Path, data: Path, json_file: Path | None, quiet: bool, **given: Any
) -> None:
    """Compare a model with its float version, output by output.

    FLOAT is the reference, OTHER the model that should give the same. SQNR is the power of the
    float output over the power of the difference, in dB: 20 is an error of a tenth, 40 of a
    hundredth. Top-1 agreement is the share of positions with the same greatest class.

    Examples:
      onnxq compare in.onnx out.onnx --data samples/
      onnxq compare in.onnx out.onnx --data samples/ --no-latency --json error.json
    """
    from onnxq import api, tables

    api.check_outputs([json_file], models=[reference, other], others=[data])
    result = api.compare(reference, other, data, progress=_progress(quiet), **given)
    _write_json(json_file, result.to_dict())
    if not quiet:
        tables.comparison(result)


@main.command(epilog="See also: onnxq compare, for the error of a quantized model.")
@click.argument("source", metavar="MODEL", type=FILE)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT=SIZES",
    show_default="unknown sizes count as 1",
    help="Sizes of a dynamic input, as in --shape image=1x3x224x224. Repeat it for more.",
)
@_output
def inspect(source: Path, shapes: Sequence[str], json_file: Path | None, quiet: bool) -> None:
    """Show inputs, operators, layers, MACs and weight ranges.

    MODEL is any ONNX model; its layers are those with constant weights in float. MACs are
    multiply-adds a sample. A large spread, the largest channel of a weight over the median one,
    is what scales per channel are for.

    Examples:
      onnxq inspect in.onnx
      onnxq inspect in.onnx --shape image=1x3x224x224 --json layers.json
    """
    sizes = dict(_shape(text) for text in shapes)
    from onnxq import api, tables

    api.check_outputs([json_file], models=[source])
    result = api.inspect(source, shapes=sizes)
    _write_json(json_file, result.to_dict())
    if not quiet:
        tables.inspection(result)


@main.command(epilog="See also: onnxq run, which runs passes from a recipe file.")
@click.argument("name", metavar="[NAME]", required=False)
def passes(name: str | None) -> None:
    """List the passes and recipes, or explain one pass.

    NAME is a pass: its page says what it does and what it refuses, with formula, drawing and
    paper, and how it is written in a recipe.

    Examples:
      onnxq passes
      onnxq passes calibrate
    """
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
        found = tuple(int(s) for s in sizes.lower().split("x"))
    except ValueError:
        found = ()
    if not name or not found or min(found) < 1:
        raise click.BadParameter(f"{text!r} is not of the form input=1x3x224x224")
    return name, found
