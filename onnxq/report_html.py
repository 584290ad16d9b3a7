"""The report of a run as one page that opens offline: no scripts, nothing to load.

Everything that comes from a model, a file name or a recipe goes through `_text`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from onnxq.analysis.weight_ranges import ChannelRanges, LayerRanges, binned
from onnxq.report import Report, error_line, megabytes, millions, weight_only_share
from onnxq.version import __version__

__all__ = ["page"]

# Steps of a chart: more would be finer than a phone shows them.
MOST_STEPS = 96
# Steps of all charts before, and as many after; a step takes some 7 bytes at most.
ALL_STEPS = 5000
FEWEST_STEPS = 16
# Charts of a layer share a scale unless their ranges differ by more: a flat line says nothing.
COMMON = 4
# Units of a chart from its least to its greatest value.
HEIGHT = 120

# Orange and blue of Okabe and Ito, which all kinds of colour vision tell apart.
STYLE = """\
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1b; --dim: #5a5a5a; --line: #d4d4d4;
  --chart: #f5f5f5; --zero: #767676; --before: #d98200; --after: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --page: #151719; --text: #e8e8e8; --dim: #a8a8a8;
  --line: #3a3d40; --chart: #1f2225; --zero: #8c8c8c; --before: #e69f00; --after: #56b4e9 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--page);
  color: var(--text); font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .5rem 0; max-width: 46rem }
.dim, figcaption { color: var(--dim); font-size: .875rem; font-weight: normal }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0;
  border-bottom: 1px solid var(--line) }
thead th { color: var(--dim); font-size: .875rem; font-weight: normal }
tbody th { font-weight: 600 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.facts { width: auto } .facts tbody th { font-weight: normal; color: var(--dim) }
pre { background: var(--chart); padding: .75rem; overflow-x: auto; font-size: .875rem;
  overflow-wrap: normal }
figure { margin: 0 }
svg { display: block; width: 100%; height: 4.5rem; background: var(--chart) }
.before { fill: var(--before) } .after { fill: var(--after) }
.zero { stroke: var(--zero); vector-effect: non-scaling-stroke }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .3em }
.key.before { background: var(--before) } .key.after { background: var(--after) }
.ranges { table-layout: fixed } .ranges th:first-child { width: 24% }
.ranges .number { width: 8% } .ranges thead .number { white-space: normal }
@media (max-width: 44rem) {
  .ranges, .ranges tbody { display: block } .ranges thead { display: none }
  .ranges tr { display: grid; grid-template-columns: 1fr 1fr; gap: .2rem .75rem;
    padding: .75rem 0; border-bottom: 1px solid var(--line) }
  .ranges tr > * { border: 0; padding: 0 }
  .ranges th:first-child { width: auto; grid-column: 1 / -1 }
  .ranges td { grid-column: 1 / -1 }
  .ranges td.number { width: auto; grid-column: auto; text-align: left; white-space: normal }
  .ranges td.number::before { content: attr(data-label) " "; color: var(--dim) }
}
"""


def page(
    title: str, report: Report, layers: Sequence[LayerRanges], recipe: str, seed: int = 0
) -> str:
    """The page.

    Args:
        title: What was compressed.
        report: What the run did, with its measured facts.
        layers: Ranges of the weights before and after.
        recipe: What ran, as TOML.
        seed: Seed of the run.

    Returns:
        A whole HTML document.
    """
    versions = {"onnxq": __version__, **report.facts["versions"]}
    parts = (
        f"<h1>{_text(title)}</h1>",
        f'<p class="dim">What onnxq {_text(__version__)} made of it.</p>',
        *_summary(report),
        *_compression(report),
        *_weights(report, layers),
        *_declined(report),
        "<h2>Recipe</h2>",
        '<p class="dim">What ran, with every option. Saved as a file, <code>onnxq run</code> takes'
        f" it; the seed was {seed}.</p>",
        f"<pre>{_text(recipe.strip())}</pre>",
        "<h2>Versions</h2>",
        *_table((), [[_text(n), _text(v)] for n, v in versions.items()], "facts"),
    )
    body = "\n".join(parts)
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}: onnxq report</title>
<style>
{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


# ---------------------------------------------------------------------- sections


def _summary(report: Report) -> Iterator[str]:
    facts = report.facts
    before, after = facts["bytes"]["before"], facts["bytes"]["after"]
    times = f", {before / after:.1f} times smaller" if after else ""
    rows = [["bytes", f"{megabytes(before)} to {megabytes(after)}{times}"]]
    integers = facts["integers"]
    if integers["macs"]:
        share = f"{100 * integers['share']:.1f} % of {millions(integers['macs'])} a sample"
        rows.append(["MACs in integers", share])
    if alone := weight_only_share(report):
        rows.append(["MACs on integer weights", f"{100 * alone:.1f} %, activations in float"])
    rows += [["weights", _text(stored["text"])] for stored in facts["storage"]]
    for output in facts.get("outputs", []):
        rows.append([f"output {_text(output['name'])}", _text(error_line(output))])
    rows.append(["seconds", f"{facts['seconds']:.1f}"])
    yield "<h2>Summary</h2>"
    yield from _table((), rows, "facts")
    yield from (f"<p>Note: {_text(note)}</p>" for note in report.notes)
    yield "<h2>Passes</h2>"
    passes = [[_text(p.name), f"{p.seconds:.2f}", megabytes(p.nbytes)] for p in report.passes]
    yield from _table(("pass", "#seconds", "#constants after it"), passes, "facts")


def _compression(report: Report) -> Iterator[str]:
    """What became of each layer; nothing where there was no budget."""
    found = report.facts.get("compression")
    if found is None:
        return
    budget, macs = found["budget"], found["macs"]
    yield "<h2>Compression</h2>"
    yield (
        f"<p>{millions(macs['before'])} to {millions(macs['after'])} MACs a sample,"
        f" {100 * macs['after'] / max(macs['before'], 1):.1f} %; the budget was"
        f" {100 * budget['share']:.1f} % of the {_text(budget['of'])}. Errors are those of the"
        " layer's own output, from statistics of its input.</p>"
    )
    rows = [
        [
            _text(layer["name"]),
            _text(layer["method"]),
            str(layer["rank_or_channels"]),
            f"{100 * layer['macs']['after'] / max(layer['macs']['before'], 1):.0f} %",
            f"{100 * layer['error']:.2f} %",
        ]
        for layer in found["layers"]
    ]
    yield from _table(("layer", "method", "#rank", "#MACs", "#error"), rows)


def _weights(report: Report, layers: Sequence[LayerRanges]) -> Iterator[str]:
    yield "<h2>Weights per channel</h2>"
    if not layers:
        yield "<p>The model has no layers with constant weights.</p>"
        return
    steps = min(max(ALL_STEPS // len(layers), FEWEST_STEPS), MOST_STEPS)
    folded = any(p.name == "fold-batch-norm" for p in report.passes)
    float_model = "the float model after BatchNorm folding" if folded else "the float model"
    yield (
        f'<p><span class="key before"></span>Before: {float_model}.'
        ' <span class="key after"></span>After: the weights as they are written.'
        " Output channels run from left to right, each from its least to its greatest weight; the"
        " line is zero. Scales are linear, and the same for both charts of a layer unless they"
        " say otherwise."
        f" Where there are more than {steps} channels, neighbours share a step.</p>"
        "<p>Spread is the largest |weight| of a channel over that of the median channel.</p>"
    )
    head = ("layer", "before", "after", "#spread before", "#spread after")
    yield from _table(head, (_layer(layer, steps) for layer in layers), "ranges")


def _layer(layer: LayerRanges, steps: int) -> list[str]:
    count = layer.after.low.size
    state = "" if layer.quantized else ", in float"
    name = f'{_text(layer.name)}<br><span class="dim">{_text(layer.op)}, {count} channels{state}'
    pair = layer.before, layer.after
    drawn = [r for r in pair if r is not None and r.finite]
    sizes = [high - low for low, high in map(_scale, ([r] for r in drawn))]
    own = len(drawn) == 2 and max(sizes) > COMMON * min(sizes) > 0
    first, second = ([r] if own and r is not None else drawn for r in pair)
    return [
        f"{name}</span>",
        _figure("before", layer.before, _scale(first), steps, own),
        _figure("after", layer.after, _scale(second), steps, own),
        _spread(layer.before),
        _spread(layer.after),
    ]


def _declined(report: Report) -> Iterator[str]:
    yield "<h2>Left out, and why</h2>"
    rows = [[_text(name), f"in float ({_text(op)})", _text(w)] for name, op, w in report.in_float]
    rows += [
        [_text(name), f"left alone by {_text(by)}", _text(why)]
        for name, by, why in report.left_alone
    ]
    if rows:
        yield from _table(("node", "what", "reason"), rows)
    else:
        yield "<p>Nothing.</p>"


# ---------------------------------------------------------------------- parts


def _text(value: object) -> str:
    """Anything as text of the page; file names may hold bytes that are no text at all."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> Iterator[str]:
    """A table of escaped cells; columns whose title starts with # hold numbers."""
    numbers = [title.startswith("#") for title in head]
    titles = [title.removeprefix("#") for title in head]
    yield f'<table class="{kind}">' if kind else "<table>"
    if head:
        cells = [
            f'<th scope="col" class="number">{t}</th>' if n else f'<th scope="col">{t}</th>'
            for t, n in zip(titles, numbers, strict=True)
        ]
        yield f"<thead><tr>{''.join(cells)}</tr></thead>"
    yield "<tbody>"
    for first, *rest in rows:
        cells = [f'<th scope="row">{first}</th>']
        for index, cell in enumerate(rest, 1):
            number = bool(head) and numbers[index]
            cells.append(
                f'<td class="number" data-label="{titles[index]}">{cell}</td>'
                if number
                else f"<td>{cell}</td>"
            )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table>"


def _spread(ranges: ChannelRanges | None) -> str:
    if ranges is None:
        return "-"
    return f"{ranges.spread:.2f}" if np.isfinite(ranges.spread) else "none"


def _figure(
    kind: str, ranges: ChannelRanges | None, scale: tuple[float, float], steps: int, own: bool
) -> str:
    """A chart of ranges with its ends in words, and whether the scale is its own."""
    if ranges is None:
        return '<p class="dim">made by a pass</p>'
    if not ranges.finite:
        return '<p class="dim">holds values that are not finite</p>'
    ends = f"{ranges.low.min():.3g} to {ranges.high.max():.3g}"
    zero = _unit(np.zeros(1), scale)[0]
    shown = binned(ranges, steps)
    width = shown.low.size
    return (
        f'<figure><svg viewBox="0 0 {width} {HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="{kind}: {ranges.low.size} channels, {ends}">'
        f'<path class="{kind}" d="{_band(shown, scale)}"/>'
        f'<path class="zero" d="M0 {zero}h{width}"/></svg><figcaption>{ends}'
        f"{', scale of its own' if own else ''}</figcaption></figure>"
    )


def _band(ranges: ChannelRanges, scale: tuple[float, float]) -> str:
    """The outline of the ranges: along their upper ends, and back along the lower ones."""
    top, bottom = _unit(ranges.high, scale), _unit(ranges.low, scale)
    bottom = np.maximum(bottom, top + 1)  # a channel of one value shows, too
    return f"M0 {top[0]}{_steps(top, 1)}V{bottom[-1]}{_steps(bottom[::-1], -1)}z"


def _steps(levels: np.ndarray, direction: int) -> str:
    """Moves along levels of one unit's width each."""
    changes = np.flatnonzero(np.diff(levels))
    runs = np.diff(changes + 1, prepend=0, append=levels.size)
    jumps = [f"v{jump}" for jump in np.diff(levels)[changes]] + [""]
    return "".join(f"h{direction * run}{jump}" for run, jump in zip(runs, jumps, strict=True))


def _scale(ranges: Sequence[ChannelRanges]) -> tuple[float, float]:
    """From the least to the greatest of ranges, with zero in it."""
    low = min((float(r.low.min()) for r in ranges), default=0.0)
    high = max((float(r.high.max()) for r in ranges), default=0.0)
    return min(low, 0.0), max(high, 0.0)


def _unit(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Values as whole units from the top of a chart."""
    low, high = scale
    span = (high - low) or 1.0
    return np.asarray(np.rint((high - values) / span * HEIGHT), np.int64)
