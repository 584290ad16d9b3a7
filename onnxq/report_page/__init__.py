"""What a run or an analysis found, as one page that opens offline.

`run` and `analysis` say what there is to show, `content` in which words, `charts` draws it, and
`page` puts it into one file, with the style `page.css` and the script `page.js`.
"""

from __future__ import annotations

from pathlib import Path

from onnxq.report import write_text
from onnxq.report_page.analysis import of_analysis
from onnxq.report_page.content import Content
from onnxq.report_page.page import check_installed, page
from onnxq.report_page.run import of_run
from onnxq.report_page.watch import Watch

__all__ = ["Watch", "check_installed", "of_analysis", "of_run", "write"]


def write(path: Path, content: Content) -> None:
    """Write a page; the file appears whole or not at all.

    Raises:
        OnnxqError: The file cannot be written, or the library that draws charts is missing.
    """
    write_text(path, page(content))
