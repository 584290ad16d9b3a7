"""What a page shows, whatever it is about: facts, charts, the table of layers, text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Chart",
    "Column",
    "Content",
    "Detail",
    "Fragile",
    "Mark",
    "Plot",
    "Points",
    "Remedy",
    "Series",
    "Table",
    "finite",
]

Mark = Literal["bar", "dot", "line"]


@dataclass(frozen=True)
class Series:
    """One quantity along the graph.

    Args:
        label: What it is.
        values: One a layer, or one a tensor; NaN where there is none.
        mark: How it is drawn.
        shown: Whether it is drawn before it is asked for.
        unit: Follows its numbers.
        role: Name of its colour in the style sheet; empty: one for its place in the chart.
    """

    label: str
    values: Sequence[float]
    mark: Mark = "dot"
    shown: bool = True
    unit: str = ""
    role: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart along the graph, from the inputs on the left to the outputs on the right.

    Args:
        key: Its name in the page.
        title: What it shows.
        about: How it is read, one or two sentences.
        unit: Along its vertical axis.
        series: What is drawn, at most one colour each.
        names: What each place is called; None: the layers.
        layers: The layer that each place belongs to, -1 for none; None: the layers.
        logarithmic: Whether the vertical axis is.
    """

    key: str
    title: str
    about: str
    unit: str
    series: Sequence[Series]
    names: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    logarithmic: bool = False

    @property
    def roles(self) -> list[str]:
        """The name of each series' colour in the style sheet."""
        return [s.role or f"series-{i}" for i, s in enumerate(self.series)]


@dataclass(frozen=True)
class Points:
    """One of the series of a plot.

    Args:
        label: What it is.
        x: Places of its points.
        y: Their values, as many.
        mark: How it is drawn.
        shown: Whether it is drawn before it is asked for.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    mark: Mark = "line"
    shown: bool = True


@dataclass(frozen=True)
class Plot:
    """A chart of one quantity against another.

    Args:
        key: Its name in the page.
        title: What it shows.
        about: How it is read, one or two sentences.
        across: Along its horizontal axis.
        unit: Along its vertical axis.
        series: What is drawn, each in a colour of its own.
    """

    key: str
    title: str
    about: str
    across: str
    unit: str
    series: Sequence[Points]

    @property
    def roles(self) -> list[str]:
        """The name of each series' colour in the style sheet."""
        return [f"series-{i}" for i in range(len(self.series))]


@dataclass(frozen=True)
class Column:
    """A column of the table of layers.

    Args:
        title: Its head.
        cells: What it says of each layer.
        keys: Numbers to sort by; None: by the cells, which are words.
        about: What it means; empty if the title tells.
        wide: Whether it is left out on narrow screens.
    """

    title: str
    cells: Sequence[str]
    keys: Sequence[float] | None = None
    about: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Remedy:
    """What would help a layer.

    Args:
        text: What to do.
        command: The command to run; empty if there is none.
        gain: What it would bring; empty if not known.
    """

    text: str
    command: str = ""
    gain: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain JSON types."""
        return {"text": self.text, "command": self.command, "gain": self.gain}


@dataclass(frozen=True)
class Fragile:
    """One of the layers to look at first.

    Args:
        layer: Its index.
        what: How much it matters, a few words.
        reason: Why it is fragile.
        remedies: What would help.
    """

    layer: int
    what: str
    reason: str
    remedies: Sequence[Remedy]


@dataclass(frozen=True)
class Detail:
    """What the page shows of a layer that was chosen.

    Args:
        facts: Names and values.
        reason: Why it is as it is; empty if there is nothing to say.
        remedies: What would help.
        charts: Chart -> what it draws, see `layer_charts`; with a text alone where there
            is nothing to draw, and the reason is worth saying.
    """

    facts: Sequence[tuple[str, str]] = ()
    reason: str = ""
    remedies: Sequence[Remedy] = ()
    charts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "facts": [list(f) for f in self.facts],
            "reason": self.reason,
            "remedies": [r.to_dict() for r in self.remedies],
            "charts": {name: dict(chart) for name, chart in self.charts.items()},
        }


@dataclass(frozen=True)
class Table:
    """A table at the end of the page.

    Args:
        title: Its heading.
        head: Titles of its columns; those that start with # hold numbers.
        rows: Its cells.
        otherwise: What to say if it is empty.
        about: How it is read.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    otherwise: str = "Nothing."
    about: str = ""


@dataclass(frozen=True)
class Content:
    """A page.

    Args:
        title: What it is about.
        lead: What was done, and what came out, one or two sentences.
        facts: What matters, with its values.
        names: The layers, in graph order.
        columns: What the table says of each.
        details: What the page shows of each when it is chosen.
        formats: The number formats that details compare.
        fragile: The layers to look at first.
        chosen: The layer that is chosen at first.
        plots: Charts of the whole model.
        charts: Charts along the graph.
        tables: Tables at the end.
        recipe: What ran, as TOML.
        about_recipe: What to know of it.
        versions: Of onnxq and the libraries.
        notes: What was changed, given up or not known.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    names: Sequence[str]
    columns: Sequence[Column]
    details: Sequence[Detail]
    formats: Sequence[str] = ()
    fragile: Sequence[Fragile] = ()
    chosen: int = 0
    plots: Sequence[Plot] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    recipe: str = ""
    about_recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def finite(value: float | None) -> float:
    """A number, NaN for none and for what is not finite."""
    return value if value is not None and math.isfinite(value) else math.nan
