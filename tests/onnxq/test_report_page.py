"""Pages: they say what was found, load nothing, and take any name."""

import base64
import dataclasses
import hashlib
import html
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import onnxq
from onnxq.analysis.findings import Compression
from onnxq.analysis.weight_ranges import ChannelRanges, LayerRanges
from onnxq.cli import main
from onnxq.errors import OnnxqError
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import FoldBatchNorm
from onnxq.report import Changes, PassRecord, Report
from onnxq.report_page.analysis import of_analysis
from onnxq.report_page.layer_charts import activation, bars, per_channel
from onnxq.report_page.page import page, unpacked
from onnxq.report_page.run import of_run
from tests import analyses, models

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"
NASTY = "<script>alert('1')</script> \"quoted\" & 'so' $$x$$"
TEXT = (
    "g (float[N,4] x) => (float[] y) <float[4,3] w, float[3,2] v> { h = Gemm(x, w) y = Gemm(h, v) }"
)
# what a page can load by, beside scripts and styles
LOADS = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}
VOID = {"meta", "br", "input"}


class Page(HTMLParser):
    """Elements, texts, facts, scripts and rows; fails where elements do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.rows, self.texts = [], [], [], []
        self.scripts, self.terms = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("dt", "dd"):
            self.terms.append("")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if {"dt", "dd"} & set(self.open):
            self.terms[-1] += data

    def row(self, start):
        """The row of a table that begins so; rows of layers after their place."""
        rows = [r[1:] if r and r[0].isdecimal() else r for r in self.rows]
        return next(r for r in rows if r and r[0].startswith(start))

    def fact(self, name):
        return self.terms[self.terms.index(name) + 1]


def layer_rows(text):
    return [r for r in Page(text).rows if r and r[0].isdecimal()]


def onnxq_line(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    names = [folder / n for n in ("out.onnx", "page.html", "facts.json")]
    out, file, facts = names
    files = ["--report", file, "--json", facts, "--seed", 7]
    result = onnxq_line("quantize", MODEL, out, "--calib", CALIB, "--limit", 16, *files)
    assert result.exit_code == 0
    return file.read_text(encoding="utf-8"), json.loads(facts.read_text()), out


# ---------------------------------------------------------------------- a run


def test_the_page_says_what_the_facts_say(digits):
    text, facts, out = digits
    found = Page(text)
    assert f"{out.stat().st_size / 1e3:.1f} kB" in found.fact("bytes")
    assert f"{100 * facts['integers']['share']:.1f} %" in found.fact("MACs in integers")
    assert f"SQNR {facts['outputs'][0]['sqnr_db']:.1f} dB" in found.fact("output logits")
    for step in facts["passes"]:
        assert found.row(step["name"])[1] == f"{step['seconds']:.2f}"
    assert found.row("onnxruntime")[1] == facts["versions"]["onnxruntime"]
    assert found.row("onnxq")[1] == onnxq.__version__
    assert facts["weights"]
    for layer in facts["weights"]:
        _, op, _, _, before, after, *spreads = found.row(layer["name"])
        assert op == layer["op"]
        assert spreads == [f"{layer[k]['spread']:.2f}" for k in ("before", "after")]
        assert before == f"{layer['before']['low']:.3g} to {layer['before']['high']:.3g}"
        assert after == f"{layer['after']['low']:.3g} to {layer['after']['high']:.3g}"


def test_macs_and_kernels_of_layers(digits):
    text, facts, _ = digits
    found = Page(text)
    ran = {n["name"]: n for n in facts["integers"]["layers"]}
    for layer in facts["weights"]:
        _, _, macs, where, *_ = found.row(layer["name"])
        assert macs == f"{ran[layer['name']]['macs']:,}"
        assert where == ("integers" if ran[layer["name"]]["integer"] else "float")


def test_the_recipe_of_the_page_runs_again(digits, tmp_path):
    text, _, out = digits
    recipe = tmp_path / "again.toml"
    recipe.write_text(html.unescape(re.search("<pre[^>]*>(.*?)</pre>", text, re.DOTALL)[1]))
    assert "the seed was 7." in text
    again = tmp_path / "again.onnx"
    rest = ["--calib", CALIB, "--limit", 16, "--seed", 7, "--report", tmp_path / "again.html"]
    assert onnxq_line("run", recipe, MODEL, again, *rest).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    assert Page((tmp_path / "again.html").read_text(encoding="utf-8")).fact("bytes")


def test_the_page_loads_nothing(digits):
    text, _, _ = digits
    found = Page(text)
    assert not {"link", "img", "iframe", "object", "use", "base"} & {t for t, _ in found.elements}
    assert not [a for _, a in found.elements if LOADS & set(a)]
    assert not [n for _, a in found.elements for n in a if n.startswith("on")]
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?:|url\(|@import", outside)
    policy = next(a["content"] for _, a in found.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    hashes = re.findall(r"'sha256-([^']*)'", policy)
    run = [script for attributes, script in found.scripts if not attributes]
    assert [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in run] == hashes
    assert [a for a, _ in found.scripts if a] == [
        {"type": "application/octet-stream", "id": "data"}
    ]


def test_the_page_follows_light_and_dark_and_small_screens(digits):
    text, _, _ = digits
    assert "prefers-color-scheme: dark" in text
    assert any(a.get("name") == "viewport" for _, a in Page(text).elements)


def test_each_chart_of_a_layer_says_in_words_what_it_shows(digits):
    text, facts, _ = digits
    found = unpacked(text)["layers"]
    for layer, detail in zip(facts["weights"], found, strict=True):
        for kind in ("before", "after"):
            ends = f"{layer[kind]['low']:.3g} to {layer[kind]['high']:.3g}"
            text = f"{layer[kind]['channels']} channels, {ends}"
            assert detail["charts"][kind]["text"] == text


def test_histograms_of_weights_before_and_after(digits):
    text, _, _ = digits
    pages = {}
    for detail, row in zip(unpacked(text)["layers"], layer_rows(text), strict=True):
        pages[row[1]] = detail["charts"]
    float_model = load(MODEL)
    FoldBatchNorm().apply(float_model, Context())
    for layer in float_model.layers():
        drawn = pages[layer.name]["values-before"]
        counts, edges = np.histogram(layer.weight, 64)
        share = 100 * counts / layer.weight.size
        np.testing.assert_allclose(drawn["share"], share, rtol=5e-3)
        assert (drawn["low"], drawn["high"]) == (edges[0], edges[-1])
        after = pages[layer.name]["values-after"]
        assert sum(after["share"]) == pytest.approx(100, rel=5e-3)
        # rounding moves no end by more than a step
        steps = float(abs(layer.weight).max()) / 100
        assert after["low"] == pytest.approx(drawn["low"], abs=steps)
        assert after["high"] == pytest.approx(drawn["high"], abs=steps)


def test_what_a_layer_reads_is_shown_with_the_range_that_was_chosen(tmp_path):
    proto = models.parse("g (float[N,4] x) => (float[] y) <float[4,3] w> { y = Gemm(x, w) }")
    data = [{"x": np.full((1, 4), v, np.float32)} for v in (-1.0, 1.0, 1.0, 3.0)]
    out = tmp_path / "page.html"
    model, _ = onnxq.quantize(load(proto), calib=data, report=out)
    chosen = model.encodings["x"]
    (detail,) = unpacked(out.read_text(encoding="utf-8"))["layers"]
    drawn = detail["charts"]["activation"]
    assert drawn["clip"] == [chosen.low, chosen.high]
    assert (drawn["low"], drawn["high"]) == (-1, 3)
    share = np.array(drawn["share"])
    assert share[share > 0].tolist() == [25, 50, 25]
    assert ["values", "-1 to 3"] in detail["facts"]
    assert ["range chosen", f"{chosen.low:.4g} to {chosen.high:.4g}"] in detail["facts"]


def test_names_are_text_whatever_they_hold(tmp_path):
    proto = models.parse(TEXT)
    proto.graph.node[0].name = NASTY
    proto.graph.node[1].name = "</table><h1 onclick=x>"
    proto.graph.output[0].name = proto.graph.node[1].output[0] = NASTY
    data = [models.feeds(proto, seed=seed) for seed in range(3)]
    out = tmp_path / "page.html"
    excluded = "</table>*"
    onnxq.quantize(load(proto), calib=data, exclude=[excluded], report=out)
    text = out.read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.scripts) == text.count("<script") == 3
    assert sum(t == "h1" for t, _ in found.elements) == 1
    assert found.row(NASTY)
    assert found.fact(f"output {NASTY}")
    left_out = [r for r in found.rows if r[0] == "</table><h1 onclick=x>"]
    assert [r[1] for r in left_out] == ["in float (Gemm)"]
    assert "excluded" in left_out[0][2]
    assert f'exclude = ["{excluded}"]' in "".join(found.texts)


def a_report():
    record = PassRecord("clean", {}, 0.5, 1000, Changes())
    integers = {"macs": 0, "share": 0.0, "layers": []}
    facts = {"bytes": {"before": 10, "after": 0}, "integers": integers, "seconds": 0.5}
    return Report([record], [], {**facts, "storage": [], "versions": {}})


def layer(before, after, name="a"):
    pair = [
        None if r is None else ChannelRanges(*np.asarray(r, np.float64).T) for r in (before, after)
    ]
    return LayerRanges(name, "Conv", *pair, quantized=True)


def run_page(layers, report=None):
    return page(of_run("m", report or a_report(), layers, ""))


def test_layers_that_cannot_be_drawn():
    layers = [
        layer(None, [(0, 0), (0, 0)], "made"),
        layer([(np.nan, 1)], [(-1, 1)], "broken"),
        layer([(0, 0)], [(0, 0)], "zeros"),
    ]
    text = run_page(layers)
    found = Page(text)
    assert found.row("made")[4:] == ["made by a pass", "0 to 0", "-", "none"]
    assert found.row("broken")[4:] == ["not finite", "-1 to 1", "none", "1.00"]
    assert found.row("zeros")[6:] == ["none", "none"]
    made, broken, _ = (d["charts"]["before"] for d in unpacked(text)["layers"])
    assert made == {"text": "made by a pass"}
    assert broken == {"text": "holds values that are not finite"}
    assert "no layers" in run_page([])


def test_how_weights_are_stored():
    report = a_report()
    layers = [
        {"name": n, "kernel": k, "macs": m, "integer": False, "op": "Gemm", "reason": "so"}
        for n, k, m in (("a", "MatMulNBits", 30), ("b", "Conv", 10))
    ]
    report.facts["integers"] = {"macs": 40, "share": 0.0, "layers": layers}
    report.facts["storage"] = [{"text": "2 of <7> values"}]
    text = run_page([], report)
    assert "2 of &lt;7&gt; values" in text
    assert "75.0 %, activations in float" in text


def compressed(of="macs", outputs=(20.0,), **others):
    """A report of a compression to half of the MACs, or of the bytes."""
    report = a_report()
    points = [("auto", 0.25, 0.1), ("auto", 0.5, 0.01), ("auto", 1.0, 0.0)]
    points += [("weight-svd", 0.5, 0.1), ("weight-svd", 1.0, 0.0)]
    found = [{"method": m, "kept": k, "error": e} for m, k, e in points]
    report.facts["compression"] = {
        "budget": {"of": of, "share": 0.5},
        "macs": {"before": 1000, "after": 500},
        "bytes": {"before": 1000, "after": 600},
        "layers": [],
        "tradeoff": {"of": of, "chosen": found[1], "points": found, **others},
    }
    report.facts["outputs"] = [
        {"name": "y", "samples": 8, "left_out": 0, "sqnr_db": v} for v in outputs
    ]
    return report


def tradeoff(report):
    """Label -> points of the chart, with their mark; and what it says of itself."""
    (plot,) = of_run("m", report, [layer([(0, 1)], [(0, 1)])], "").plots
    found = {s.label: (s.mark, [*zip(s.x, s.y, strict=True)]) for s in plot.series}
    return found, plot


@pytest.mark.parametrize(
    ("of", "words", "kept"), [("macs", "MACs", 50.0), ("bytes", "bytes", 60.0)]
)
def test_what_other_budgets_would_cost(of, words, kept):
    series, plot = tradeoff(compressed(of))
    assert series["auto"] == ("line", [(25.0, pytest.approx(10)), (50.0, pytest.approx(20))])
    assert series["weight-svd"] == ("line", [(50.0, pytest.approx(10))])
    assert series["chosen, as expected"] == ("dot", [(50.0, pytest.approx(20))])
    assert series["measured"] == ("dot", [(kept, 20.0)])
    assert plot.across == f"% of {words} kept"
    assert "with each alone" in plot.about
    text = run_page([layer([(0, 1)], [(0, 1)])], compressed(of))
    assert 'id="plot-tradeoff"' in text
    legend = [a for t, a in Page(text).elements if a.get("data-chart") == "tradeoff"]
    assert len(legend) == len(series)
    assert "plot-tradeoff" in unpacked(text)["roots"].values()


def test_measured_outputs_that_have_no_error_are_not_drawn():
    series, plot = tradeoff(compressed(outputs=(20.0, 30.0, 200.0, None)))
    assert series["measured"] == ("dot", [(50.0, 20.0), (50.0, 30.0)])
    assert "a mark for each output" in plot.about
    assert "measured" not in tradeoff(compressed(outputs=(None,)))[0]


def test_one_method_is_not_set_against_itself():
    point = {"method": "weight-svd", "kept": 0.5, "error": 0.01}
    series, plot = tradeoff(compressed(points=[point], chosen=point))
    assert [*series] == ["weight-svd", "chosen, as expected", "measured"]
    assert "with each alone" not in plot.about


def test_without_splits_there_is_no_chart_of_budgets():
    report = compressed()
    del report.facts["compression"]["tradeoff"]
    assert of_run("m", report, [], "").plots == ()
    assert of_run("m", a_report(), [], "").plots == ()
    assert "plot-tradeoff" not in run_page([], report)


def test_a_title_that_is_no_text():
    text = page(of_run("model\udcff.onnx", a_report(), [layer([(0, 1)], [(0, 1)], "l\udcff")], ""))
    assert "<h1>model?.onnx</h1>" in text
    assert Page(text).row("l?")
    text.encode("utf-8")


# ---------------------------------------------------------------------- what charts draw


def test_ranges_share_steps_where_there_are_many_channels():
    rng = np.random.default_rng(0)
    low, high = -rng.random(10), rng.random(10)
    drawn = per_channel(ChannelRanges(low, high), 4)
    assert drawn["edges"] == [0, 2, 5, 7, 10]
    for index, (a, b) in enumerate(zip(drawn["edges"], drawn["edges"][1:], strict=False)):
        assert drawn["low"][index] == pytest.approx(low[a:b].min(), rel=5e-3)
        assert drawn["high"][index] == pytest.approx(high[a:b].max(), rel=5e-3)
    assert per_channel(ChannelRanges(low, high), 10)["edges"] == list(range(11))


def test_histograms_are_shares_of_all_values():
    drawn = bars(-1.0, 1.0, [1, 2, 3, 2], points=4)
    assert drawn["share"] == [12.5, 25.0, 37.5, 25.0]
    assert bars(-1.0, 1.0, [1, 2, 3, 2], points=3)["share"] == [37.5, 62.5]
    assert bars(0.0, 0.0, [0, 0], points=4)["share"] == [0.0, 0.0]


def test_what_has_no_histogram_says_so():
    read = dataclasses.replace(analyses.layer("a", 1.0, 1).activation, histogram=None)
    assert activation(read, 16)["activation"] == {"text": "no histogram was kept"}


# ---------------------------------------------------------------------- an analysis


def analysis_page(found):
    return page(of_analysis("m.onnx", found))


def test_the_most_fragile_layers_come_first_with_reason_and_command():
    text = analysis_page(analyses.many(40))
    found = analyses.many(40).fragile[:5]
    listed = text.partition('<ol class="fragile">')[2].partition("</ol>")[0]
    at = [listed.index(f">{layer.name}</button>") for layer in found]
    assert at == sorted(at)
    for layer_ in found:
        assert f"{100 * layer_.share:.1f} % of the noise" in listed
        assert layer_.reason in listed
        assert html.escape(layer_.advice[0].command) in listed
    lead = text.partition('<p class="lead">')[2].partition("</p>")[0]
    assert found[0].name in lead
    assert found[0].reason in lead
    assert unpacked(text)["chosen"] == [x.name for x in analyses.many(40).layers].index(
        found[0].name
    )


def test_the_table_of_an_analysis():
    found = analyses.analysis([analyses.layer("a", 0.75, 1), analyses.layer("b", 0.25, 2, seed=1)])
    text = analysis_page(found)
    row = Page(text).row("a")
    # 0.75e-2 * 0.5 for int8/channel and for uint8 is 24.3 dB each
    assert row[1:6] == ["Conv", "1", "75.0", "24.3", "24.3"]
    assert Page(text).fact("expected SQNR") == "20.0 dB"
    drawn = unpacked(text)["layers"][0]["charts"]["formats"]
    assert drawn["names"][2] == "int4/channel weights"
    assert drawn["expected"][2] == 1.2  # 10 log10 of 1 / 0.75
    assert drawn["measured"][2] == 0.8  # a tenth more noise
    assert Page(text).row("int8/channel weights")[1:] == ["2", "0.97"]


def test_what_has_no_error_does_not_squash_the_rest():
    found = analyses.many(3)
    exact = dataclasses.replace(found.tensors[0], sqnr_db=200.0)
    drawn = of_analysis("m", dataclasses.replace(found, tensors=[exact, *found.tensors[1:]]))
    (along,) = (c for c in drawn.charts if c.key == "along")
    assert np.isnan(along.series[0].values[0])
    assert list(along.series[0].values[1:]) == [t.sqnr_db for t in found.tensors[1:]]


def test_what_is_not_known_is_said():
    found = analyses.analysis(
        [
            analyses.layer("unreached", None, None, executed=False),
            analyses.layer("broken", 1.0, 1, broken=True),
        ]
    )
    text = analysis_page(found)
    rows = Page(text)
    assert rows.row("unreached")[2:6] == ["-", "-", "-", "-"]
    unreached, broken = unpacked(text)["layers"]
    assert unreached["reason"] == "No sample reached it."
    assert unreached["charts"]["activation"] == {"text": "no sample reached this layer"}
    assert unreached["charts"]["formats"] == {"text": "no sample reached it"}
    assert broken["charts"]["ranges"] == {"text": "holds values that are not finite"}
    assert broken["charts"]["values"] == {"text": "holds values that are not finite"}
    nothing = analysis_page(analyses.analysis([]))
    assert "nothing to quantize" in nothing
    assert "no layers" in nothing


def compressions(name):
    made = [("weight-svd", 50, 0.01), ("weight-svd", 25, 0.1), ("channel-pruning", 50, 0.1)]
    return tuple(
        Compression(
            m, (name,) if m == "weight-svd" else (name, "b"), macs / 100, macs, 100, 10, e, e
        )
        for m, macs, e in made
    )


def test_curves_and_savings_of_compression():
    first = dataclasses.replace(
        analyses.layer("a", 0.75, 1),
        macs=100,
        compressions=compressions("a"),
        whole={"spatial-svd": "its window is 1 x 1"},
    )
    second = dataclasses.replace(analyses.layer("b", 0.25, 2), macs=300)
    text = analysis_page(analyses.analysis([first, second]))
    drawn, none = (d["charts"] for d in unpacked(text)["layers"])
    assert drawn["curves"]["methods"] == {
        "spatial-svd": [],
        "weight-svd": [[25.0, 10.0], [50.0, 20.0]],
        "channel-pruning": [[50.0, 10.0]],
    }
    assert drawn["curves"]["text"] == (
        "weight-svd: 50 % can go with 20 dB left; channel-pruning: nothing can go with 20 dB left;"
        " spatial-svd: no, its window is 1 x 1"
    )
    assert "curves" not in none
    page = Page(text)
    assert page.row("a")[-4:-3] == ["50"]
    assert "12.5 %" in text


def test_names_in_an_analysis_are_text():
    found = analyses.analysis(
        [analyses.layer(NASTY, 0.75, 1), analyses.layer("</script><b onclick=x>", 0.25, 2)]
    )
    text = analysis_page(found)
    assert len(Page(text).scripts) == text.count("<script") == 3
    assert not [a for _, a in Page(text).elements if "onclick" in a]
    assert Page(text).row(NASTY)


def test_the_verb_writes_the_page_of_what_it_found(tmp_path):
    file, facts = tmp_path / "page.html", tmp_path / "facts.json"
    line = ["analyze", MODEL, "--calib", CALIB, "--limit", 8, "--report", file, "--json", facts]
    assert onnxq_line(*line).exit_code == 0
    text, found = file.read_text(encoding="utf-8"), json.loads(facts.read_text())
    rows = Page(text)
    assert found["layers"]
    for layer_, detail in zip(found["layers"], unpacked(text)["layers"], strict=True):
        assert rows.row(layer_["name"])[2:4] == [
            str(layer_["fragility"]),
            f"{100 * layer_['share']:.1f}",
        ]
        assert detail["charts"]["activation"]["clip"] == [
            layer_["activation"]["clip_low"],
            layer_["activation"]["clip_high"],
        ]
        assert len(detail["charts"]["formats"]["names"]) == sum(
            len(formats) for formats in layer_["sensitivities"].values()
        )
    first = min(found["layers"], key=lambda entry: entry["fragility"])
    assert f"The most fragile layer is {html.escape(first['name'])}" in text
    assert rows.row("sha256")[1] == found["model"]["sha256"]


@pytest.mark.parametrize("count", [40, 1000])
def test_pages_stay_small(count):
    assert len(analysis_page(analyses.many(count)).encode()) < 2_000_000


@pytest.mark.parametrize(("layers", "channels"), [(28, 1024), (1, 100_000), (1000, 512)])
def test_pages_of_runs_stay_small(layers, channels):
    rng = np.random.default_rng(0)
    ranges = np.stack([-rng.random(channels), rng.random(channels)], axis=1)
    assert len(run_page([layer(ranges, ranges)] * layers).encode()) < 2_000_000


# ---------------------------------------------------------------------- without the library


def test_without_the_library_a_line_says_what_to_install(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    hidden = {"bokeh"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else found(name, *a)
    )
    out = tmp_path / "out.onnx"
    line = ["quantize", MODEL, out, "--calib", CALIB, "--report", tmp_path / "page.html"]
    result = onnxq_line(*line)
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("pip install onnxq[report]")
    assert result.stderr.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []  # said before the work, not after it
    line = ["analyze", MODEL, "--calib", CALIB, "--report", tmp_path / "page.html"]
    assert onnxq_line(*line).stderr.strip().endswith("pip install onnxq[report]")
    with pytest.raises(OnnxqError, match="bokeh"):
        run_page([])
