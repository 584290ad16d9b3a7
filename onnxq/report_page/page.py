"""A page as one file that opens offline and loads nothing.

Scripts run only if their hash is in the page's policy, so that no text in it can become one. The
charts' data is packed: zlib, then base64.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from onnxq.errors import OnnxqError
from onnxq.report_page.content import Chart, Column, Content, Fragile, Plot, Points, Series, Table
from onnxq.report_page.markup import code, definitions, table, text

__all__ = ["check_installed", "page", "unpacked"]

PACKED = '<script type="application/octet-stream" id="data">'


def check_installed() -> None:
    """Refuse to make a page without the library that draws its charts.

    Raises:
        OnnxqError: It is not installed.
    """
    if importlib.util.find_spec("bokeh") is None:
        raise OnnxqError(
            "pages need bokeh, which is not installed", fix="pip install onnxq[report]"
        )


def page(content: Content) -> str:
    """A whole HTML document.

    Raises:
        OnnxqError: The library that draws charts is not installed.
    """
    check_installed()
    from bokeh.resources import Resources

    from onnxq.report_page.charts import drawn

    data = {
        "layers": [d.to_dict() for d in content.details],
        "chosen": content.chosen,
        "places": {c.key: list(c.layers) for c in content.charts if c.layers is not None},
        **drawn(content),
    }
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    script = files("onnxq.report_page").joinpath("page.js").read_text(encoding="utf-8")
    style = files("onnxq.report_page").joinpath("page.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)};"
        " style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(_body(content))
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(content.title)}: onnxq report</title>
<style>
{style}{_column_styles(content.columns)}</style>
</head>
<body>
{body}
{PACKED}{_packed(data)}</script>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def unpacked(document: str) -> dict[str, Any]:
    """The data of a page's charts and details."""
    packed = document.partition(PACKED)[2].partition("</script>")[0]
    data: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return data


def _packed(data: dict[str, Any]) -> str:
    written = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(written.encode(), 9)).decode()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


# ---------------------------------------------------------------------- sections


def _body(content: Content) -> Iterator[str]:
    yield f"<header><h1>{text(content.title)}</h1>"
    yield f'<p class="lead">{text(content.lead)}</p>'
    yield definitions(content.facts)
    yield from (f'<p class="note">Note: {text(note)}</p>' for note in content.notes)
    yield '</header><main><p id="problem" role="alert" hidden></p>'
    yield "<noscript><p>The charts need JavaScript; what they show is in the tables.</p></noscript>"
    if content.fragile:
        yield '<section><h2>Look here first</h2><ol class="fragile">'
        yield from (_fragile(entry, content.names) for entry in content.fragile)
        yield "</ol></section>"
    if content.plots:
        yield '<section class="charts"><h2>The whole model</h2>'
        yield from (_chart(plot) for plot in content.plots)
        yield "</section>"
    if content.charts:
        yield '<section class="charts"><h2>Along the graph</h2>'
        yield '<p class="dim">Click a place in a chart to see its layer below.</p>'
        yield from (_chart(chart) for chart in content.charts)
        yield "</section>"
    yield "<section><h2>Layers</h2>"
    if content.names:
        yield from _layers(content)
    else:
        yield "<p>The model has no layers with constant weights.</p>"
    yield "</section>"
    yield from (_section(entry) for entry in content.tables)
    yield f'<section><h2>Recipe</h2><p class="dim">{text(content.about_recipe)}</p>'
    yield code(content.recipe.strip())
    yield "</section>"
    yield _section(Table("Versions", ("part", "version"), list(content.versions.items())))
    yield "</main>"


def _fragile(entry: Fragile, names: Sequence[str]) -> str:
    remedies = "".join(
        f'<p class="remedy">{text(r.text)}{f" <b>{text(r.gain)}</b>" if r.gain else ""}</p>'
        + (code(r.command) if r.command else "")
        for r in entry.remedies
    )
    return (
        f'<li><button class="link" data-layer="{entry.layer}">'
        f"{text(names[entry.layer])}</button>"
        f' <span class="dim">{text(entry.what)}</span><p>{text(entry.reason)}</p>{remedies}</li>'
    )


def _chart(chart: Chart | Plot) -> str:
    entries: Sequence[Series | Points] = chart.series
    legend = "".join(
        f'<label class="key"><input type="checkbox" data-chart="{chart.key}" data-series="{i}"'
        f'{" checked" if series.shown else ""}><span class="swatch {series.mark} {chart.roles[i]}">'
        f"</span>{text(series.label)}</label>"
        for i, series in enumerate(entries)
    )
    legend = f'<div class="legend">{legend}</div>' if len(chart.series) > 1 else ""
    return (
        f'<figure class="chart"><figcaption><h3>{text(chart.title)}</h3>'
        f'<p class="dim">{text(chart.about)}</p>{legend}</figcaption>'
        f'<div class="plot" id="plot-{chart.key}" role="img"'
        f' aria-label="{text(chart.title)}: {text(", ".join(s.label for s in entries))}">'
        "</div></figure>"
    )


def _layers(content: Content) -> Iterator[str]:
    yield (
        '<p class="dim">Click a layer, or walk with the arrow keys; click a head to sort.</p>'
        '<label class="filter">Show layers with <input type="search" id="filter"'
        ' placeholder="name or operator"></label>'
        '<div class="split"><div class="box" tabindex="-1"><table id="layers"><thead><tr>'
    )
    yield _head("#", True, "Place in the graph")
    yield _head("layer", False)
    for column in content.columns:
        yield _head(column.title, column.keys is not None, column.about, column.wide)
    yield "</tr></thead><tbody>"
    for index, name in enumerate(content.names):
        yield _row(content, index, name)
    yield '</tbody></table></div><div id="layer" aria-live="polite">'
    yield '<h3 id="layer-name"></h3><p id="layer-reason"></p><dl class="facts" id="layer-facts">'
    yield '</dl><div id="layer-remedies"></div>'
    from onnxq.report_page.charts import DETAILS

    wanted = {name for detail in content.details for name in detail.charts}
    for key, title in DETAILS.items():
        if key in wanted:
            yield (
                f'<figure id="detail-{key}"><figcaption><h4>{text(title)}</h4>'
                '<p class="dim says"></p></figcaption>'
                f'<div class="plot" id="plot-detail-{key}" role="img"></div></figure>'
            )
    yield "</div></div>"


def _head(title: str, number: bool, about: str = "", wide: bool = False) -> str:
    kind = " ".join(["number"] * number + ["wide"] * wide)
    hint = f' title="{text(about)}"' if about else ""
    return f'<th scope="col" class="{kind}"{hint}><button>{text(title)}</button></th>'


def _row(content: Content, index: int, name: str) -> str:
    """A row, with as little markup as does: there may be a thousand."""
    cells = "".join(_cell(column, index) for column in content.columns)
    named = f'<th scope="row"><button>{text(name)}</button></th>'
    return f"<tr><td>{index + 1}</td>{named}{cells}</tr>"


def _cell(column: Column, index: int) -> str:
    shown = column.cells[index]
    key = ""
    if column.keys is not None and shown.strip("0123456789,.") and shown != "-":
        key = f' data-key="{column.keys[index]:.6g}"'
    return f"<td{key}>{text(shown)}</td>"


def _column_styles(columns: Sequence[Column]) -> str:
    """Which columns of the table hold numbers, and which need a wide screen."""
    cell = "#layers tr > :nth-child({})"
    number = [cell.format(i) for i, c in enumerate(columns, 3) if c.keys is not None]
    wide = [cell.format(i) for i, c in enumerate(columns, 3) if c.wide]
    right = ", ".join([cell.format(1), *number])
    narrow = (
        f" @media (max-width: 60rem) {{ {', '.join(wide)} {{ display: none }} }}" if wide else ""
    )
    return f"{right} {{ text-align: right; white-space: nowrap }}{narrow}\n"


def _section(entry: Table) -> str:
    about = f'<p class="dim">{text(entry.about)}</p>' if entry.about else ""
    rows = table(entry.head, entry.rows) if entry.rows else f"<p>{text(entry.otherwise)}</p>"
    return f"<section><h2>{text(entry.title)}</h2>{about}{rows}</section>"
