"""The charts of a page, as Bokeh draws them.

Colours are named by the page's style sheet, so that they follow light and dark: each mark is
tagged with the name of its colour, and the page's script paints it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColumnDataSource,
    DataRange1d,
    HoverTool,
    PanTool,
    Range1d,
    ResetTool,
    WheelZoomTool,
)
from bokeh.models.annotations import Span
from bokeh.plotting import figure

from onnxq.report_page.content import Chart, Content, Plot
from onnxq.report_page.layer_detail import METHODS, SPARED_DB
from onnxq.report_page.markup import plain

__all__ = ["DETAILS", "drawn"]

# Shapes tell series apart where colours do not.
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "star", "hex")
# Charts of the chosen layer, in the order in which they are drawn.
DETAILS = {
    "before": "Weights per channel, before",
    "ranges": "Weights per channel",
    "after": "Weights per channel, after",
    "values-before": "Weights, before",
    "values-after": "Weights, after",
    "values": "Weights",
    "activation": "What it reads, and the range that was chosen",
    "channels": "What it reads, per channel",
    "formats": "SQNR at the outputs, by format",
    "curves": "Compressed: SQNR at the outputs by the MACs that are kept",
}


def drawn(content: Content) -> dict[str, Any]:
    """What BokehJS needs to draw the charts into the elements `plot-KEY`."""
    document = Document()
    layers = ColumnDataSource({"name": [plain(n) for n in content.names]}, name="layers")
    for plot in content.plots:
        document.add_root(_against(plot))
    for chart in content.charts:
        document.add_root(_along(chart, layers))
    if content.names:
        for figure_ in _details(content):
            document.add_root(figure_)
    return {
        "document": json.loads(serialize_json(document.to_json(deferred=False))),
        "roots": {root.id: f"plot-{root.name}" for root in document.roots},
    }


# ---------------------------------------------------------------------- along the graph


def _along(chart: Chart, layers: ColumnDataSource) -> figure:
    """A chart along the graph; those of layers share one source, hence what is selected."""
    source = layers
    if chart.names is not None:
        source = ColumnDataSource({"name": [plain(n) for n in chart.names]}, name=chart.key)
    count = len(source.data["name"])
    source.data["x"] = np.arange(1, count + 1, dtype=np.int32)
    place = "tensor" if chart.names is not None else "layer"
    bars = all(series.mark == "bar" for series in chart.series)
    plot = _figure(
        chart.key,
        x_axis_label=f"{place}, from the inputs to the outputs",
        y_axis_label=chart.unit,
        x_range=Range1d(start=0.3, end=max(count, 1) + 0.7, bounds=(0, max(count, 1) + 1)),
        y_range=DataRange1d(start=0, only_visible=True) if bars else DataRange1d(only_visible=True),
        y_axis_type="log" if chart.logarithmic else "linear",
        toolbar_location="above",
        height=260,
    )
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    plot.add_tools(BoxZoomTool(dimensions="width"), PanTool(dimensions="width"))
    plot.add_tools(WheelZoomTool(dimensions="width"), ResetTool())
    tips = [(place, "@name")]
    for index, series in enumerate(chart.series):
        column = f"{chart.key}{index}"
        source.data[column] = np.array(series.values, np.float32)
        tips.append((series.label, f"@{column}{{0.0}}{series.unit}"))
        common: dict[str, Any] = {"source": source, "name": f"{chart.key}-{index}"}
        marks: list[Any]
        if series.mark == "bar":
            marks = [plot.vbar(x="x", top=column, width=0.8, line_width=int(count > 200), **common)]
        elif series.mark == "line":
            # dots, too, since a value between two that are not known makes no line
            marks = [plot.line(x="x", y=column, line_width=2, **common)]
            marks.append(plot.scatter(x="x", y=column, size=3, **common))
        else:
            shape = MARKERS[index % len(MARKERS)]
            size = 7 if count <= 200 else 5
            marks = [plot.scatter(x="x", y=column, marker=shape, size=size, **common)]
        for mark in marks:
            _alike(mark)
            mark.tags = [chart.roles[index]]
            mark.visible = series.shown
    # what the tips hang on has a value everywhere, unlike the series
    tip = f"{chart.key}-tip"
    source.data[tip] = _highest([s.values for s in chart.series if s.shown])
    hung = plot.vbar(x="x", bottom=tip, top=tip, width=1, alpha=0, source=source)
    _alike(hung)
    plot.add_tools(HoverTool(renderers=[hung], mode="vline", tooltips=tips))
    plot.add_layout(Span(dimension="height", location=0, name="chosen", line_dash="dashed"))
    return plot


# ---------------------------------------------------------------------- the whole model


def _against(chart: Plot) -> figure:
    """A chart of one quantity against another."""
    plot = _figure(chart.key, x_axis_label=chart.across, y_axis_label=chart.unit, height=260)
    for index, series in enumerate(chart.series):
        columns = {"x": np.array(series.x, np.float32), "y": np.array(series.y, np.float32)}
        source = ColumnDataSource(columns, name=f"{chart.key}{index}")
        line = series.mark == "line"
        common: dict[str, Any] = {"x": "x", "y": "y", "source": source}
        common["name"] = f"{chart.key}-{index}"
        size, shape = 7 if line else 13, MARKERS[index % len(MARKERS)]
        dot: Any = plot.scatter(marker=shape, size=size, **common)
        marks: list[Any] = [dot]
        if line:  # the first is wide, for others may lie on it
            marks.append(plot.line(line_width=2 if index else 5, **common))
        for mark in marks:
            mark.tags = [chart.roles[index]]
            mark.visible = series.shown
        tips = [(plain(series.label), ""), (chart.across, "@x{0.0}"), (chart.unit, "@y{0.0}")]
        plot.add_tools(HoverTool(renderers=[dot], tooltips=tips))
    return plot


def _alike(mark: Any) -> None:
    """Let all of a mark look alike, chosen or not: a line shows which is."""
    mark.selection_glyph = mark.nonselection_glyph = mark.glyph


def _highest(series: Sequence[Sequence[float]]) -> np.ndarray:
    values = np.array(series, np.float32)
    values[np.isnan(values)] = -np.inf
    top: np.ndarray = values.max(axis=0, initial=-np.inf)
    known = top[np.isfinite(top)]
    top[~np.isfinite(top)] = known.min() if known.size else 1
    return top


# ---------------------------------------------------------------------- the chosen layer


def _details(content: Content) -> list[figure]:
    wanted = {name for detail in content.details for name in detail.charts}
    makers = {
        "before": lambda: _ranges("before", "before"),
        "ranges": lambda: _ranges("ranges", "after"),
        "after": lambda: _ranges("after", "after"),
        "values-before": lambda: _histogram("values-before", "weight", "before"),
        "values-after": lambda: _histogram("values-after", "weight", "after"),
        "values": lambda: _histogram("values", "weight", "after"),
        "activation": _activation,
        "channels": lambda: _ranges("channels", "series-1"),
        "formats": lambda: _formats(content.formats),
        "curves": _curves,
    }
    return [makers[name]() for name in DETAILS if name in wanted]


def _ranges(key: str, role: str) -> figure:
    plot = _figure(
        f"detail-{key}", x_axis_label="output channel" if key != "channels" else "channel"
    )
    source = ColumnDataSource(
        {k: [] for k in ("left", "right", "low", "high", "words")}, name=f"detail-{key}"
    )
    mark = plot.quad(
        left="left",
        right="right",
        bottom="low",
        top="high",
        source=source,
        line_width=1,
    )
    mark.tags = [role]
    plot.add_layout(Span(dimension="width", location=0, name="zero"))
    tips = [("channel", "@words"), ("range", "@low{0.0000} to @high{0.0000}")]
    plot.add_tools(HoverTool(renderers=[mark], mode="vline", tooltips=tips))
    return plot


def _histogram(key: str, label: str, role: str, **options: Any) -> figure:
    plot = _figure(f"detail-{key}", x_axis_label=label, y_axis_label="% of values", **options)
    columns = ("left", "right", "share", "height")
    source = ColumnDataSource({k: [] for k in columns}, name=f"detail-{key}")
    # the least that any axis shows, were it logarithmic
    mark = plot.quad(
        left="left", right="right", bottom=1e-9, top="height", source=source, line_width=1
    )
    mark.tags = [role]
    tips = [(label, "@left{0.0000} to @right{0.0000}"), ("share", "@share{0.000} %")]
    plot.add_tools(HoverTool(renderers=[mark], mode="vline", tooltips=tips))
    return plot


def _activation() -> figure:
    # zeros of a Relu would hide the rest
    plot = _histogram("activation", "value", "series-1", y_axis_type="log")
    for end in ("low", "high"):
        plot.add_layout(Span(dimension="height", location=0, name=f"clip-{end}", line_width=2))
    return plot


def _formats(formats: Sequence[str]) -> figure:
    plot = _figure(
        "detail-formats",
        y_range=list(reversed(formats)),
        height=70 + 26 * len(formats),
        x_axis_label="SQNR dB",
    )
    source = ColumnDataSource(
        {k: [] for k in ("names", "expected", "measured")}, name="detail-formats"
    )
    bar = plot.hbar(y="names", right="expected", height=0.6, source=source, line_width=0)
    bar.tags = ["series-0"]
    dot = plot.scatter(x="measured", y="names", size=10, marker="diamond", source=source)
    dot.tags = ["series-1"]
    tips = [("format", "@names"), ("expected", "@expected{0.0} dB")]
    tips.append(("measured", "@measured{0.0} dB"))
    plot.add_tools(HoverTool(renderers=[bar], tooltips=tips))
    return plot


def _curves() -> figure:
    plot = _figure("detail-curves", x_axis_label="% of MACs kept", y_axis_label="SQNR dB")
    plot.add_layout(Span(dimension="width", location=SPARED_DB, name="spared", line_dash="dotted"))
    for index in range(len(METHODS)):
        source = ColumnDataSource(
            {k: [] for k in ("kept", "sqnr", "method")}, name=f"detail-curve{index}"
        )
        line = plot.line(x="kept", y="sqnr", source=source, line_width=2)
        mark = plot.scatter(x="kept", y="sqnr", source=source, marker=MARKERS[index], size=7)
        line.tags = mark.tags = [f"series-{index}"]
        tips = [("method", "@method"), ("kept", "@kept{0} %"), ("SQNR", "@sqnr{0.0} dB")]
        plot.add_tools(HoverTool(renderers=[mark], tooltips=tips))
    return plot


# ---------------------------------------------------------------------- any


def _figure(name: str, **options: Any) -> figure:
    settings = {"height": 200, "toolbar_location": None, "tools": "", **options}
    if name.startswith("detail-"):  # the page's script sets them with the data
        settings = {
            "x_range": Range1d(start=0, end=1),
            "y_range": Range1d(start=0, end=1),
            **settings,
        }
    plot = figure(
        name=name,
        sizing_mode="stretch_width",
        min_border_right=8,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        **settings,
    )
    # a finger or a wheel on a chart scrolls the page, until a tool is chosen
    plot.toolbar.active_drag = None
    plot.toolbar.active_scroll = None
    plot.toolbar.logo = None
    for axis in plot.axis:
        axis.axis_label_text_font_style = "normal"
        axis.minor_tick_line_color = None
    return plot
