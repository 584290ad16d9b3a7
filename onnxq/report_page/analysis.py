"""The page of an analysis: which layers of a model are fragile, why, and what would help."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from onnxq.analysis.error import LARGEST_SQNR_DB
from onnxq.analysis.findings import Analysis, Compression, LayerFindings
from onnxq.analysis.sensitivity import decibel
from onnxq.report import megabytes, millions
from onnxq.report_page.content import Chart, Column, Content, Fragile, Series, Table, finite
from onnxq.report_page.layer_charts import points_for
from onnxq.report_page.layer_detail import METHODS, SPARED_DB, detail, noise, remedies, sentence

__all__ = ["of_analysis"]

MOST_FRAGILE, MOST_CHEAP = 5, 8


def of_analysis(title: str, analysis: Analysis) -> Content:
    """What the page of an analysis shows.

    Args:
        title: The model.
        analysis: What was found.
    """
    layers = analysis.layers
    index = {layer.name: i for i, layer in enumerate(layers)}
    fragile = [
        Fragile(index[layer.name], noise(layer), sentence(layer.reason), remedies(layer.advice))
        for layer in analysis.fragile[:MOST_FRAGILE]
    ]
    formats = _formats(layers)
    points = points_for(len(layers))
    return Content(
        title=title,
        lead=_lead(analysis),
        facts=tuple(_facts(analysis)),
        names=[layer.name for layer in layers],
        columns=_columns(analysis),
        details=[detail(layer, points) for layer in layers],
        formats=[f"{written} {part}" for part, written in formats],
        fragile=fragile,
        chosen=fragile[0].layer if fragile else 0,
        charts=tuple(_charts(analysis, formats)),
        tables=tuple(_tables(analysis)),
        recipe=analysis.recipe,
        about_recipe="The passes that led to the model that was looked at.",
        versions=analysis.versions,
        notes=analysis.notes,
    )


# ---------------------------------------------------------------------- in sum


def _lead(analysis: Analysis) -> str:
    ranked = f"weights {analysis.weights}, activations {analysis.activations}"
    found = analysis.fragile
    if not analysis.layers:
        return "The model has no layers with constant weights: there is nothing to quantize."
    if not found:
        return f"What quantization does to each layer ({ranked}) is not known; the notes say why."
    worst = found[0]
    why = f": {worst.reason.rstrip('.')}" if worst.reason else ""
    return f"The most fragile layer is {worst.name}{why}. It makes {noise(worst)} with {ranked}."


def _facts(analysis: Analysis) -> Iterator[tuple[str, str]]:
    yield "bytes", megabytes(int(analysis.model.get("bytes") or 0))
    layers = analysis.layers
    macs = [layer.macs for layer in layers if layer.macs is not None]
    yield "MACs", f"{millions(sum(macs))} a sample" if macs or not layers else "not known"
    yield "parameters", millions(sum(layer.parameters for layer in layers))
    yield "layers", f"{len(layers):,}"
    expected = analysis.totals.get("sqnr_db")
    if expected is not None:
        unknown = sum(layer.share is None for layer in layers)
        more = f", {unknown} of {len(layers)} layers not known" if unknown else ""
        yield "expected SQNR", f"{expected:.1f} dB{more}"
    if analysis.seconds:
        yield "seconds", f"{sum(analysis.seconds.values()):.1f}"


def _tables(analysis: Analysis) -> Iterator[Table]:
    if analysis.agreement:
        yield Table(
            "Expected against measured",
            ("format", "#layers", "#rank correlation"),
            [
                (f"{a.format} {a.part}", f"{a.layers}", _number(a.spearman, "{:.2f}"))
                for a in analysis.agreement
            ],
            about="How alike the expected effects rank the layers as those measured, one layer"
            " quantized at a time (Spearman): 1 is the same order.",
        )
    if any(layer.compressions for layer in analysis.layers):
        yield Table(
            "Cheap to compress",
            ("layers", "method", "#keeps", "#saves of all MACs", "#SQNR at the outputs"),
            [_cheap(c, analysis) for c in analysis.cheap[:MOST_CHEAP]],
            otherwise=f"No layer can be made smaller with {SPARED_DB} dB left at the outputs.",
            about=f"What takes off most with {SPARED_DB} dB left at the outputs, each alone: layers"
            " of lower rank, or channels cut off with all that hangs on them. onnxq compress"
            " chooses among them and fits what is left.",
        )
    silent = [t for t in analysis.tensors if t.note]
    if silent:
        yield Table(
            "Tensors without a number",
            ("tensor", "node", "reason"),
            [(t.name, t.node, t.note) for t in silent],
        )
    operators = analysis.model.get("operators")
    if isinstance(operators, Mapping):
        yield Table(
            "Operators", ("operator", "#nodes"), [(o, f"{n}") for o, n in operators.items()]
        )
    about = [(k, _words(v)) for k, v in analysis.model.items() if k != "operators"]
    yield Table("Model", ("fact", "value"), about)
    parts = [(k, f"{v:.2f}") for k, v in analysis.seconds.items()]
    if parts:
        yield Table("Time", ("part", "#seconds"), parts)
    if analysis.samples:
        used = [(what, f"{n:,}") for what, n in analysis.samples.items()]
        yield Table("Samples", ("used for", "#samples"), used)


def _cheap(found: Compression, analysis: Analysis) -> tuple[str, ...]:
    macs = sum(layer.macs or 0 for layer in analysis.layers)
    return (
        ", ".join(found.layers),
        found.method,
        f"{100 * found.kept:.0f} %",
        f"{100 * found.saved / macs:.1f} %",
        f"{decibel(found.effect):.1f} dB" if found.effect > 0 else "no error",
    )


# ---------------------------------------------------------------------- along the graph


def _charts(analysis: Analysis, formats: Sequence[tuple[str, str]]) -> Iterator[Chart]:
    layers = analysis.layers
    if any(layer.share is not None for layer in layers):
        yield Chart(
            "share",
            "Where the noise comes from",
            f"What each layer adds to the squared error of the outputs with weights"
            f" {analysis.weights} and activations {analysis.activations}, in per cent of all. The"
            f" highest bars are the layers to mend.",
            "% of the noise",
            (Series("share of the noise", [_share(layer) for layer in layers], "bar", unit=" %"),),
        )
    if formats:
        first = {
            next((f for f in formats if f[0] == part), None) for part in ("weights", "activations")
        }
        ranked = {("weights", analysis.weights), ("activations", analysis.activations)}
        shown = ranked & set(formats) or first
        yield Chart(
            "formats",
            "What each format costs",
            "SQNR at the outputs if this layer alone is written in a format: lower is more"
            " fragile, 6 dB are one bit. Tick the formats to compare.",
            "SQNR dB",
            tuple(
                Series(
                    f"{written} {part}",
                    [_drawn(_decibel(layer, part, written)) for layer in layers],
                    shown=(part, written) in shown,
                    unit=" dB",
                )
                for part, written in formats
            ),
        )
    if layers and analysis.tensors:
        index = {layer.name: i for i, layer in enumerate(layers)}
        yield Chart(
            "along",
            "SQNR along the graph",
            "How far each tensor of the quantized model is from the float one: where the line"
            " falls, error enters or grows. What has none is not drawn.",
            "SQNR dB",
            (
                Series("as computed", [_drawn(t.sqnr_db) for t in analysis.tensors], "line"),
                Series("as written", [_drawn(t.written_sqnr_db) for t in analysis.tensors]),
            ),
            names=[f"{t.name} ({t.op})" if t.op else t.name for t in analysis.tensors],
            layers=[index.get(t.node, -1) for t in analysis.tensors],
        )
    yield from _savings(layers)
    costs: dict[str, list[int | None]] = {
        "MACs": [layer.macs for layer in layers],
        "bytes": [layer.bytes for layer in layers],
        "bit-operations": [layer.bit_operations for layer in layers],
        "activation memory": [layer.activation_bytes for layer in layers],
    }
    known = {name: values for name, values in costs.items() if any(values)}
    if known:
        yield Chart(
            "cost",
            "What each layer costs",
            "In per cent of all layers.",
            "% of all",
            tuple(
                Series(name, _percent(values), "bar", shown=not i, unit=" %")
                for i, (name, values) in enumerate(known.items())
            ),
        )


def _savings(layers: Sequence[LayerFindings]) -> Iterator[Chart]:
    methods = {c.method for layer in layers for c in layer.compressions}
    macs = sum(layer.macs or 0 for layer in layers)
    if methods and macs:
        yield Chart(
            "savings",
            "What compression could save",
            "Multiply-accumulates that each method could take off here, in per cent of all, with"
            f" {SPARED_DB} dB left at the outputs if nothing else changes. Pruning cuts channels"
            " off layers that are tied together, and counts them all at each.",
            "% of all MACs",
            tuple(
                Series(
                    method,
                    [_saved(layer, method, macs) for layer in layers],
                    unit=" %",
                    role=f"series-{METHODS.index(method)}",
                )
                for method in METHODS
                if method in methods
            ),
        )


def _saved(layer: LayerFindings, method: str, macs: int) -> float:
    """MACs that a method may take off, in per cent of all; NaN where it takes off nothing."""
    found = layer.spared(method)
    return math.nan if found is None else 100 * found.saved / macs


def _columns(analysis: Analysis) -> list[Column]:
    layers = analysis.layers
    rank = [layer.fragility for layer in layers]
    weights, activations = (
        [_decibel(layer, part, written) for layer in layers]
        for part, written in (("weights", analysis.weights), ("activations", analysis.activations))
    )
    spread = [layer.weights.spread for layer in layers]
    compressed = []
    if any(layer.compressions for layer in layers):
        about = f"MACs that compression could save, % of the layer's, {SPARED_DB} dB left"
        compressed = [_numbers("spare %", [_spare(x) for x in layers], "{:.0f}", about)]
    return [
        Column("operator", [layer.op for layer in layers], wide=True),
        _numbers("rank", rank, "{}", "1 is the most fragile"),
        _numbers("noise %", [_share(layer) for layer in layers], "{:.1f}", "Share of the noise"),
        _numbers("weights dB", weights, "{:.1f}", f"SQNR with {analysis.weights}"),
        _numbers("inputs dB", activations, "{:.1f}", f"SQNR with {analysis.activations}"),
        *compressed,
        _numbers("spread", spread, "{:.1f}", "Largest channel over the median one", wide=True),
        _numbers("MACs", [layer.macs for layer in layers], "{:,}", "A sample", wide=True),
        _numbers("bytes", [layer.bytes for layer in layers], "{:,}", "Stored in float", wide=True),
    ]


# ---------------------------------------------------------------------- words and numbers


def _formats(layers: Sequence[LayerFindings]) -> list[tuple[str, str]]:
    """Every part and format that any layer knows something of, weights first."""
    found = dict.fromkeys(
        (s.part, s.format)
        for layer in layers
        for s in layer.sensitivities
        if s.effect is not None or s.measured is not None
    )
    return sorted(found, key=lambda pair: pair[0] != "weights")


def _decibel(layer: LayerFindings, part: str, written: str) -> float:
    found = (s for s in layer.sensitivities if (s.part, s.format) == (part, written))
    wanted = next(found, None)
    if wanted is None:
        return math.nan
    return finite(decibel(wanted.effect if wanted.effect is not None else wanted.measured))


def _drawn(sqnr_db: float | None) -> float:
    """An SQNR as charts draw it: without error, it would be far above all others."""
    return math.nan if sqnr_db is None or sqnr_db >= LARGEST_SQNR_DB else sqnr_db


def _share(layer: LayerFindings) -> float:
    return finite(None if layer.share is None else 100 * layer.share)


def _spare(layer: LayerFindings) -> float:
    """MACs that may go, in per cent of those of the layers that change; NaN where not known."""
    if not layer.compressions:
        return math.nan
    found = layer.spared()
    return 0.0 if found is None else 100 * (1 - found.kept)


def _percent(values: Sequence[int | None]) -> list[float]:
    total = sum(v or 0 for v in values)
    return [100 * v / total if v is not None and total else math.nan for v in values]


def _numbers(
    title: str,
    values: Sequence[float | None],
    form: str,
    about: str = "",
    wide: bool = False,
) -> Column:
    keys = [finite(v) for v in values]
    return Column(title, [_number(v, form) for v in values], keys, about, wide)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
