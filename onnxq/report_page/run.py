"""The page of a run: what passes did to a model, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxq.analysis.error import LARGEST_SQNR_DB
from onnxq.analysis.weight_ranges import ChannelRanges, LayerRanges
from onnxq.report import Report, error_line, megabytes, millions, weight_only_share
from onnxq.report_page.content import (
    Chart,
    Column,
    Content,
    Detail,
    Mark,
    Plot,
    Points,
    Series,
    Table,
    finite,
)
from onnxq.report_page.layer_charts import activation, histogram, per_channel, points_for, reads
from onnxq.report_page.watch import Seen
from onnxq.version import __version__

__all__ = ["of_run"]

# What a budget is of, in words.
_NAMES = {"macs": "MACs", "bytes": "bytes"}


def of_run(
    title: str,
    report: Report,
    layers: Sequence[LayerRanges],
    recipe: str,
    seed: int = 0,
    seen: Mapping[str, Seen] | None = None,
) -> Content:
    """What the page of a run shows.

    Args:
        title: What was compressed.
        report: What the run did, with its measured facts.
        layers: Ranges of the weights before and after.
        recipe: What ran, as TOML.
        seed: Seed of the run.
        seen: Layer -> what else was seen of it.
    """
    ran = {n["name"]: n for n in report.facts["integers"]["layers"]}
    found = [ran.get(layer.name, {}) for layer in layers]
    points = points_for(len(layers))
    return Content(
        title=title,
        lead=f"What onnxq {__version__} made of it. {_weights(report)}",
        facts=tuple(_facts(report)),
        names=[layer.name for layer in layers],
        columns=_columns(layers, found),
        details=[
            _detail(layer, n, (seen or {}).get(layer.name), points)
            for layer, n in zip(layers, found, strict=True)
        ],
        chosen=_widest(layers),
        plots=tuple(_tradeoff(report)),
        charts=tuple(_charts(layers, found)),
        tables=(*_compression(report), _left_out(report), _passes(report)),
        recipe=recipe,
        about_recipe=f"What ran, with every option. Saved as a file, onnxq run takes it; the seed"
        f" was {seed}.",
        versions={"onnxq": __version__, **report.facts["versions"]},
        notes=report.notes,
    )


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    facts = report.facts
    before, after = facts["bytes"]["before"], facts["bytes"]["after"]
    times = f", {before / after:.1f} times smaller" if after else ""
    yield "bytes", f"{megabytes(before)} to {megabytes(after)}{times}"
    integers = facts["integers"]
    if integers["macs"]:
        share = f"{100 * integers['share']:.1f} % of {millions(integers['macs'])} a sample"
        yield "MACs in integers", share
    if alone := weight_only_share(report):
        yield "MACs on integer weights", f"{100 * alone:.1f} %, activations in float"
    for output in facts.get("outputs", []):
        yield f"output {output['name']}", error_line(output)
    for stored in facts["storage"]:
        yield "weights", stored["text"]
    yield "seconds", f"{facts['seconds']:.1f}"


def _compression(report: Report) -> Iterator[Table]:
    """What became of each layer; nothing where there was no budget."""
    found = report.facts.get("compression")
    if found is None:
        return
    budget, macs = found["budget"], found["macs"]
    rows = [
        (
            layer["name"],
            layer["method"],
            str(layer["rank_or_channels"]),
            f"{100 * layer['macs']['after'] / max(layer['macs']['before'], 1):.0f} %",
            f"{100 * layer['error']:.2f} %",
        )
        for layer in found["layers"]
    ]
    yield Table(
        "Compression",
        ("layer", "method", "#rank", "#MACs", "#error"),
        rows,
        about=f"{millions(macs['before'])} to {millions(macs['after'])} MACs a sample,"
        f" {100 * macs['after'] / max(macs['before'], 1):.1f} %; the budget was"
        f" {100 * budget['share']:.1f} % of the {budget['of']}. Errors are those of the layer's own"
        " output, from statistics of its input.",
    )


def _tradeoff(report: Report) -> Iterator[Plot]:
    """What other budgets would cost; nothing where layers were not split to one."""
    compression = report.facts.get("compression", {})
    found = compression.get("tradeoff")
    if found is None:
        return
    of, words = found["of"], _NAMES[found["of"]]
    methods = [*dict.fromkeys(p["method"] for p in found["points"])]
    series = [
        _points(method, [p for p in found["points"] if p["method"] == method], "line")
        for method in methods
    ]
    series.append(_points("chosen, as expected", [found["chosen"]], "dot"))
    measured = [
        o["sqnr_db"] for o in report.facts.get("outputs", []) if o.get("sqnr_db") is not None
    ]
    known = [v for v in measured if abs(v) < LARGEST_SQNR_DB]
    kept = 100 * compression[of]["after"] / max(compression[of]["before"], 1)
    series.append(Points("measured", [kept] * len(known), known, "dot"))
    integers = any(p.name == "insert-qdq" for p in report.passes)
    yield Plot(
        "tradeoff",
        "What other budgets would cost",
        f"Expected SQNR of the outputs against the {words} that are kept"
        + (", with all methods and with each alone" if len(methods) > 1 else "")
        + ". That weights are fitted anew is not in it; what is measured has that"
        + (", and the error of integers" if integers else "")
        + ("." if len(known) < 2 else ", a mark for each output."),
        f"% of {words} kept",
        "SQNR dB",
        [s for s in series if s.x],
    )


def _points(label: str, points: Sequence[Mapping[str, Any]], mark: Mark) -> Points:
    """Points in per cent and dB, without those that have no error."""
    known = [p for p in points if 0 < p["error"] < math.inf]
    values = [-10 * math.log10(p["error"]) for p in known]
    return Points(label, [100 * p["kept"] for p in known], values, mark)


def _weights(report: Report) -> str:
    folded = any(p.name == "fold-batch-norm" for p in report.passes)
    float_model = "the float model after BatchNorm folding" if folded else "the float model"
    return f"Before is {float_model}; after, the weights as they are written."


def _columns(layers: Sequence[LayerRanges], found: Sequence[dict[str, Any]]) -> list[Column]:
    macs = [n.get("macs") for n in found]
    before = [finite(_spread(layer.before)) for layer in layers]
    after = [finite(_spread(layer.after)) for layer in layers]
    spread = "Largest |weight| of a channel over that of the median channel"
    return [
        Column("operator", [layer.op for layer in layers], wide=True),
        Column(
            "MACs",
            ["-" if m is None else f"{m:,}" for m in macs],
            [finite(m) for m in macs],
            "Multiply-accumulates a sample",
        ),
        Column("runs in", [_where(*pair) for pair in zip(layers, found, strict=True)]),
        Column("before", [_range(layer.before) for layer in layers], _width(layers, 0), wide=True),
        Column("after", [_range(layer.after) for layer in layers], _width(layers, 1), wide=True),
        Column("spread before", [_shown(layer.before) for layer in layers], before, spread),
        Column("spread after", [_shown(layer.after) for layer in layers], after, spread),
    ]


def _detail(layer: LayerRanges, found: dict[str, Any], seen: Seen | None, points: int) -> Detail:
    macs = found.get("macs")
    facts = [("operator", layer.op), ("channels", f"{layer.after.low.size:,}")]
    if macs is not None:
        facts.append(("MACs a sample", f"{macs:,}"))
    facts.append(("runs in", _where(layer, found)))
    made = {"text": "made by a pass"}
    charts = {
        "before": made if layer.before is None else per_channel(layer.before, points),
        "after": per_channel(layer.after, points),
    }
    if seen is not None:
        if layer.before is not None:
            charts["values-before"] = histogram(seen.before, points)
        charts["values-after"] = histogram(seen.after, points)
        if seen.reads is not None:
            charts |= activation(seen.reads, points)
            facts += reads(seen.reads)
    return Detail(facts, str(found.get("reason") or ""), charts=charts)


def _charts(layers: Sequence[LayerRanges], found: Sequence[dict[str, Any]]) -> Iterator[Chart]:
    macs = np.array([finite(n.get("macs")) for n in found])
    if np.nansum(macs) > 0:
        share = 100 * macs / np.nansum(macs)
        integer = np.array([bool(n.get("integer")) for n in found])
        kinds = {"in integers": (integer, "after"), "in float": (~integer, "before")}
        yield Chart(
            "cost",
            "Where the work is",
            "Multiply-accumulates of each layer, in per cent of all.",
            "% of MACs",
            tuple(
                Series(label, np.where(there, share, np.nan).tolist(), "bar", unit=" %", role=role)
                for label, (there, role) in kinds.items()
                if there.any()
            ),
        )
    spreads = [[finite(_spread(r)) for r in (layer.before, layer.after)] for layer in layers]
    if np.isfinite(spreads).any():
        yield Chart(
            "spread",
            "How unequal channels are",
            "Largest |weight| of a channel over that of the median channel: what is far above 1"
            " leaves few steps to most channels where one scale serves them all.",
            "spread",
            (
                Series("before", [s[0] for s in spreads], role="before"),
                Series("after", [s[1] for s in spreads], role="after"),
            ),
            logarithmic=True,
        )


def _left_out(report: Report) -> Table:
    rows = [(name, f"in float ({op})", why) for name, op, why in report.in_float]
    rows += [(name, f"left alone by {by}", why) for name, by, why in report.left_alone]
    return Table("Left out, and why", ("node", "what", "reason"), rows)


def _passes(report: Report) -> Table:
    rows = [(p.name, f"{p.seconds:.2f}", megabytes(p.nbytes)) for p in report.passes]
    return Table("Passes", ("pass", "#seconds", "#constants after it"), rows)


def _where(layer: LayerRanges, found: dict[str, Any]) -> str:
    if not layer.quantized:
        return "float"
    if found and not found["integer"]:
        return "float, integer weights"
    return "integers"


def _widest(layers: Sequence[LayerRanges]) -> int:
    """The layer whose channels are the most unequal."""
    spreads = [finite(_spread(layer.before)) for layer in layers]
    return int(np.nanargmax(spreads)) if np.isfinite(spreads).any() else 0


def _range(ranges: ChannelRanges | None) -> str:
    if ranges is None:
        return "made by a pass"
    if not ranges.finite:
        return "not finite"
    return f"{ranges.low.min(initial=0):.3g} to {ranges.high.max(initial=0):.3g}"


def _width(layers: Sequence[LayerRanges], index: int) -> list[float]:
    pairs = [(layer.before, layer.after)[index] for layer in layers]
    return [finite(None if r is None else float(np.ptp([r.low, r.high]))) for r in pairs]


def _spread(ranges: ChannelRanges | None) -> float | None:
    return None if ranges is None else ranges.spread


def _shown(ranges: ChannelRanges | None) -> str:
    if ranges is None:
        return "-"
    return f"{ranges.spread:.2f}" if np.isfinite(ranges.spread) else "none"
