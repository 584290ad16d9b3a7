"""`onnxq zoo`: real models, built and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.commands.group import Group
from onnxq.commands.options import FILE, options, output, progress, threads, write_json

__all__ = ["zoo"]

_places = options(
    click.option(
        "--from",
        "folder",
        type=FILE,
        metavar="DIR",
        show_default="where downloads are kept",
        help="The folder of the zoo: models/, data, and the scripts that make calibration samples"
        " and score models, which are run. Models and data are known by their checksums.",
    ),
    click.option(
        "--to",
        type=FILE,
        default="zoo",
        show_default=True,
        metavar="DIR",
        help="The folder for results; made if need be.",
    ),
    click.option(
        "--format",
        "formats",
        multiple=True,
        metavar="NAME",
        show_default="all of the entry",
        help="How to quantize: W8A8 or W4A8. Repeat it for more.",
    ),
    click.option(
        "--download",
        metavar="URL",
        help="Fetch what the folder lacks from a copy of it that a server has, such as"
        " http://host/zoo: checked, and taken up again where it broke off. Folders of data need a"
        " list there, SHA256SUMS, as LC_ALL=C sha256sum * writes it. Without --from, what comes is"
        " kept in $XDG_CACHE_HOME/onnxq/zoo, or in ~/.cache/onnxq/zoo.",
    ),
)


@click.group(
    cls=Group,
    epilog="See also: onnxq quantize, for models of your own; docs/zoo.md has the results.",
)
def zoo() -> None:
    """Quantize real models and score them on real data.

    An entry of the zoo is a trained model with its source and licence, data, recipe, and the scores
    that are to be expected. Models and data come in a folder, or from a server that has a copy of
    it; the folder brings the scripts that score them.

    Examples:
      onnxq zoo list
      onnxq zoo build mobilenetv2 --from DIR
      onnxq zoo table --from DIR --markdown zoo.md
    """


@zoo.command(name="list", epilog="See also: onnxq zoo build, which makes a model of the list.")
@output
def list_(json_file: Path | None, quiet: bool) -> None:
    """List the entries: task, licence, size, expected scores.

    The JSON holds all that is known of them: sources, checksums, preprocessing, data, options.

    Examples:
      onnxq zoo list
      onnxq zoo list --json zoo.json
    """
    import dataclasses

    from onnxq import api, zoo_table
    from onnxq.zoo import entries

    api.check_outputs([json_file], models=[])
    found = entries()
    plain = {name: dataclasses.asdict(e) for name, e in found.items()}
    write_json(json_file, {"entries": plain})
    if not quiet:
        zoo_table.listed(found.values())


@zoo.command(epilog="See also: onnxq zoo table, which scores the models, too.")
@click.argument("name", metavar="NAME")
@_places
@threads
@output
def build(name: str, json_file: Path | None, quiet: bool, **given: Any) -> None:
    """Quantize a model of the zoo as its entry says.

    NAME is an entry of the list. The results are NAME.W8A8.onnx and NAME.W4A8.onnx in the folder
    for results, and a small report beside each.

    Examples:
      onnxq zoo build mobilenetv2 --from DIR
      onnxq zoo build yolox_nano --from DIR --to out/ --format W8A8
      onnxq zoo build m5_speech --download http://host/zoo
    """
    from onnxq import api, zoo, zoo_table

    api.check_outputs([json_file], models=[])
    found = zoo.build(name, progress=progress(quiet), **given)
    write_json(json_file, {"models": [each.to_dict() for each in found]})
    if not quiet:
        zoo_table.built(found)


@zoo.command(epilog="See also: onnxq zoo list, for the names; onnxq zoo build.")
@click.argument("names", metavar="[NAMES]", nargs=-1)
@_places
@click.option(
    "--markdown",
    type=FILE,
    metavar="FILE",
    help="Also write the results as a page, with sources and the command for each row.",
)
@click.option(
    "--anew",
    is_flag=True,
    help="Measure rows again that are kept in the folder for results.",
)
@threads
@output
def table(
    names: tuple[str, ...],
    markdown: Path | None,
    json_file: Path | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Build and score models of the zoo: the page of results.

    NAMES are entries of the list; without any, all are measured, which takes some fifteen minutes.
    Scores are those of the scripts in the folder, on onnxruntime's integer kernels. Each row is
    kept once it is measured, so that an interrupted run goes on from there. A row is marked if it
    loses more than 1 % of the float score at W8A8, or 3 % at W4A8.

    Examples:
      onnxq zoo table --from DIR
      onnxq zoo table m5_speech cifar_vit --from DIR --format W8A8
      onnxq zoo table --from DIR --markdown zoo.md --json zoo.json
    """
    from onnxq import api, zoo, zoo_table
    from onnxq.report import write_text

    api.check_outputs([markdown, json_file], models=[])
    found = zoo.results(names=names, progress=progress(quiet), **given)
    write_json(json_file, {"entries": [each.to_dict() for each in found]})
    if markdown is not None:
        write_text(markdown, zoo.results_page(found))
    if not quiet:
        zoo_table.measured(found, markdown)
