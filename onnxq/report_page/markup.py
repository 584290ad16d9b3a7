"""Parts of a page as HTML.

Everything that comes from a model, a file name or a recipe goes through `text`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["code", "definitions", "plain", "table", "text"]


def plain(value: object) -> str:
    """Anything as characters that UTF-8 can write; file names may hold bytes that are no text."""
    return str(value).encode("utf-8", "replace").decode()


def text(value: object) -> str:
    """Anything as text of the page."""
    return html.escape(plain(value))


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Facts, each with its name."""
    return "\n".join(
        (
            '<dl class="facts">',
            *(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows),
            "</dl>",
        )
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "plain") -> str:
    """A table; the first cell of a row names it, columns whose title starts with # hold numbers."""
    return "\n".join(_table(head, rows, kind))


def code(written: str) -> str:
    """What can be copied by a button next to it."""
    return (
        f'<div class="code"><pre tabindex="0">{text(written)}</pre>'
        '<button class="copy">Copy</button></div>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str) -> Iterator[str]:
    numbers = [title.startswith("#") for title in head]
    titles = [
        f'<th scope="col"{_number(n)}>{text(title.removeprefix("#"))}</th>'
        for title, n in zip(head, numbers, strict=True)
    ]
    yield f'<table class="{kind}">'
    yield f"<thead><tr>{''.join(titles)}</tr></thead>"
    yield "<tbody>"
    for first, *rest in rows:
        cells = [
            f"<td{_number(n)}>{text(cell)}</td>" for cell, n in zip(rest, numbers[1:], strict=True)
        ]
        yield f'<tr><th scope="row">{text(first)}</th>{"".join(cells)}</tr>'
    yield "</tbody></table>"


def _number(is_number: bool) -> str:
    return ' class="number"' if is_number else ""
