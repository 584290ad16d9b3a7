"""What a run or an analysis found, as one page that opens offline.

`run` and `analysis` say what there is to show, `content` in which words, `charts` draws it, and
`page` puts it into one file, with the style `page.css` and the script `page.js`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxq.analysis.findings import Analysis
from onnxq.analysis.weight_ranges import LayerRanges
from onnxq.report import Report, write_text
from onnxq.report_page.analysis import of_analysis
from onnxq.report_page.page import check_installed, page
from onnxq.report_page.run import of_run
from onnxq.report_page.watch import Seen, Watch

__all__ = ["Watch", "check_installed", "write_analysis", "write_run"]


def write_run(
    path: Path,
    title: str,
    report: Report,
    layers: Sequence[LayerRanges],
    recipe: str,
    seed: int = 0,
    seen: Mapping[str, Seen] | None = None,
) -> None:
    """Write the page of a run, see `of_run`.

    Raises:
        OnnxqError: The file cannot be written, or the library that draws charts is missing.
    """
    write_text(path, page(of_run(title, report, layers, recipe, seed, seen)))


def write_analysis(path: Path, title: str, analysis: Analysis) -> None:
    """Write the page of an analysis, see `of_analysis`.

    Raises:
        OnnxqError: The file cannot be written, or the library that draws charts is missing.
    """
    write_text(path, page(of_analysis(title, analysis)))
