"""Options that several verbs share, and what they do with the answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from onnxq.progress import Progress
    from onnxq.report import Report

Function = TypeVar("Function", bound=Callable[..., Any])


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions
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


class Shape(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions
    """The sizes of an input, as (name, sizes)."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What a text such as image=1x3x224x224 means."""
        if isinstance(value, tuple):
            return value
        name, _, sizes = str(value).rpartition("=")
        try:
            found = tuple(int(s) for s in sizes.lower().split("x"))
        except ValueError:
            found = ()
        if not name or not found or min(found) < 1:
            self.fail(f"{value!r} is not of the form input=1x3x224x224", param, ctx)
        return name, found


Shapes = Sequence[tuple[str, tuple[int, ...]]]
FILE = click.Path(path_type=Path, readable=False)  # what cannot be read is said by its reader
COUNT = click.IntRange(min=1)


def options(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several decorators as one, in this order."""

    def decorate(command: Function) -> Function:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


strict = click.option(
    "--strict",
    is_flag=True,
    help="Stop at a file of a folder of samples that cannot be read. Without this it is left out,"
    " counted and named in the notes.",
)
samples = options(
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
    strict,
)
shapes = click.option(
    "--shape",
    "shapes",
    type=Shape(),
    multiple=True,
    metavar="INPUT=SIZES",
    show_default="unknown sizes count as 1",
    help="Sizes of a dynamic input, as in --shape image=1x3x224x224. Repeat it for more.",
)
output = options(
    click.option(
        "--json",
        "json_file",
        type=FILE,
        metavar="FILE",
        help="Also write the results as JSON.",
    ),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
)
threads = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default="0, all cores",
    metavar="N",
    help="Threads of onnxruntime.",
)
calib = click.option(
    "--calib",
    type=FILE,
    metavar="PATH",
    help="Calibration samples: a folder of .npz files (arrays by input name), of .npy files, of"
    " pictures, or of test_data_set_* folders; or one .npz or .npy with samples stacked along the"
    " first axis. A hundred typical inputs are plenty, labels are not needed.",
)
data_free = click.option(
    "--data-free",
    is_flag=True,
    help="Work without samples: ranges come from batch normalization where there is any, and from"
    " samples that are made up. Give --preprocess if the inputs are pictures and you know it.",
)
target = click.option(
    "--target",
    metavar="NAME",
    show_default="ort-cpu, unless the recipe names one",
    help="What is to run the model: onnxruntime on a CPU (ort-cpu, or more precisely ort-x64,"
    " ort-x64-avx2, ort-arm64, ort-mobile), on a phone (xnnpack, nnapi, qnn), or tensorrt or"
    " openvino. It gives formats, says which operators become integers, and refuses what it does"
    " not execute; docs/targets.md has the rules.",
)
model_target = click.option(
    "--target",
    default="ort-cpu",
    show_default=True,
    metavar="NAME",
    help="What is to run the model, as of onnxq quantize.",
)
statistics = click.option(
    "--statistics",
    type=FILE,
    metavar="FILE",
    help="Keep what was learned from the samples in this file, and start from it the next time, as"
    " in --statistics in.stats.npz. Delete it when the samples change.",
)
report = click.option(
    "--report",
    type=FILE,
    metavar="FILE",
    help="Also write the results as a page that opens offline, as in --report out.html: charts,"
    " linked to a table of the layers. Needs pip install onnxq[report].",
)
seed = click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of random choices. The same seed, samples and options give the same bytes.",
)
resume = click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep each finished layer of a search in this folder, and take up what an interrupted"
    " run of the same model, samples and options left there. The result has the same bytes.",
)
search = options(
    click.option(
        "--budget",
        "budget_s",
        type=Duration(),
        metavar="TIME",
        show_default="as long as it takes",
        help="Time that passes which search may take, such as 60s, 5m or 1h: more sweeps if there"
        " is more of it, and what is left when it is up is rounded to nearest.",
    ),
    resume,
)


def progress(quiet: bool) -> Progress:
    """A bar on a terminal, lines elsewhere, nothing if quiet."""
    from onnxq.progress import Bar, Lines, Silent

    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


def finish(
    report: Report, source: Path, destination: Path, json_file: Path | None, quiet: bool
) -> None:
    """Show and write the report of a run."""
    from onnxq import tables

    write_json(json_file, report.to_dict())
    if not quiet:
        tables.summary(report, source, destination)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write results as JSON, whole or not at all; no path: nowhere."""
    if path is not None:
        from onnxq.report import write_text

        write_text(path, json.dumps(content, indent=1) + "\n")
