"""The page of a run: it says what was measured, loads nothing, and takes any name."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import onnxq
from onnxq import report_html
from onnxq.analysis.weight_ranges import ChannelRanges, LayerRanges
from onnxq.cli import main
from onnxq.model import load
from onnxq.report import Changes, PassRecord, Report
from tests import models

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"
NASTY = "<script>alert('1')</script> \"quoted\" & 'so'"
TEXT = (
    "g (float[N,4] x) => (float[] y) <float[4,3] w, float[3,2] v> { h = Gemm(x, w) y = Gemm(h, v) }"
)
# what a page can load by, beside scripts and styles
LOADS = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements, texts and table rows; fails where elements do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.rows, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, start):
        return next(r for r in self.rows if r and r[0].startswith(start))


def onnxq_line(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    names = [folder / n for n in ("out.onnx", "page.html", "facts.json")]
    out, page, facts = names
    files = ["--report", page, "--json", facts, "--seed", 7]
    result = onnxq_line("quantize", MODEL, out, "--calib", CALIB, "--limit", 16, *files)
    assert result.exit_code == 0
    return page.read_text(encoding="utf-8"), json.loads(facts.read_text()), out


def test_the_page_says_what_the_facts_say(digits):
    text, facts, out = digits
    page = Page(text)
    assert f"{out.stat().st_size / 1e3:.1f} kB" in page.row("bytes")[1]
    assert f"{100 * facts['integers']['share']:.1f} %" in page.row("MACs in integers")[1]
    assert f"SQNR {facts['outputs'][0]['sqnr_db']:.1f} dB" in page.row("output logits")[1]
    for step in facts["passes"]:
        assert page.row(step["name"])[1] == f"{step['seconds']:.2f}"
    assert page.row("onnxruntime")[1] == facts["versions"]["onnxruntime"]
    assert page.row("onnxq")[1] == onnxq.__version__
    assert facts["weights"]
    for layer in facts["weights"]:
        _, before, after, *spreads = page.row(layer["name"])
        assert spreads == [f"{layer[k]['spread']:.2f}" for k in ("before", "after")]
        assert before.startswith(f"{layer['before']['low']:.3g} to {layer['before']['high']:.3g}")
        assert after.startswith(f"{layer['after']['low']:.3g} to {layer['after']['high']:.3g}")


def test_the_recipe_of_the_page_runs_again(digits, tmp_path):
    text, _, out = digits
    recipe = tmp_path / "again.toml"
    recipe.write_text(html.unescape(re.search("<pre>(.*?)</pre>", text, re.DOTALL)[1]))
    assert "the seed was 7." in text
    again = tmp_path / "again.onnx"
    rest = ["--calib", CALIB, "--limit", 16, "--seed", 7, "--report", tmp_path / "again.html"]
    assert onnxq_line("run", recipe, MODEL, again, *rest).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    assert Page((tmp_path / "again.html").read_text(encoding="utf-8")).row("bytes")


def test_the_page_loads_nothing(digits):
    text, _, _ = digits
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "use"} & {t for t, _ in page.elements}
    assert not [a for _, a in page.elements if LOADS & set(a)]
    assert not re.search(r"https?:|//|url\(|@import", text)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    assert any(a.get("name") == "viewport" for _, a in page.elements)
    assert len(text) < 30_000


def test_each_chart_says_in_words_what_it_shows(digits):
    text, facts, _ = digits
    labels = [a["aria-label"] for t, a in Page(text).elements if t == "svg"]
    wanted = [
        f"{k}: {layer[k]['channels']} channels, {layer[k]['low']:.3g} to {layer[k]['high']:.3g}"
        for layer in facts["weights"]
        for k in ("before", "after")
    ]
    assert labels == wanted


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
    page = Page(text)
    assert "<script" not in text
    assert "script" not in {t for t, _ in page.elements}
    assert sum(t == "h1" for t, _ in page.elements) == 1
    assert page.row(NASTY)
    assert page.row(f"output {NASTY}")
    left_out = [r for r in page.rows if r[0] == "</table><h1 onclick=x>"]
    assert [r[1] for r in left_out] == ["in float (Gemm)"]
    assert "excluded" in left_out[0][2]
    assert f'exclude = ["{excluded}"]' in "".join(page.texts)


# ---------------------------------------------------------------------- charts


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


def bands(text):
    """The levels of each chart: kind, upper ends, lower ends."""
    for kind, path in re.findall(r'<path class="(before|after)" d="([^"]*)"', text):
        moves = [(m[0], int(m[1])) for m in re.findall(r"([hvV])(-?\d+)", path)]
        y = int(re.match(r"M0 (\d+)", path)[1])
        top, bottom = [], []
        for move, value in moves:
            if move == "h":
                (top if value > 0 else bottom).extend([y] * abs(value))
            else:
                y = value if move == "V" else y + value
        yield kind, top, bottom[::-1]


def test_charts_are_to_scale():
    before = [(-1, 1), (-0.5, 0.25), (-0.5, 0.25), (0.5, 0.5)]
    text = report_html.page("m", a_report(), [layer(before, [(-1, 0), (0, 1)])], "")
    found = list(bands(text))
    # 120 units from 1 to -1; what has no height takes one
    assert found[0] == ("before", [0, 45, 45, 30], [120, 90, 90, 31])
    assert found[1] == ("after", [60, 0], [120, 60])
    assert "scale of its own" not in text
    assert 'd="M0 60h4"' in text  # zero


def test_charts_of_very_different_ranges_have_scales_of_their_own():
    text = report_html.page("m", a_report(), [layer([(-10, 10), (0, 5)], [(-1, 1), (0, 1)])], "")
    assert [top for _, top, _ in bands(text)] == [[0, 30], [0, 0]]
    assert text.count(", scale of its own") == 2


def test_layers_that_cannot_be_drawn():
    layers = [
        layer(None, [(0, 0), (0, 0)], "made"),
        layer([(np.nan, 1)], [(-1, 1)], "broken"),
        layer([(0, 0)], [(0, 0)], "zeros"),
    ]
    page = Page(report_html.page("m", a_report(), layers, ""))
    assert page.row("made")[1:] == ["made by a pass", "0 to 0", "-", "none"]
    assert page.row("broken")[1:] == ["holds values that are not finite", "-1 to 1", "none", "1.00"]
    assert page.row("zeros")[3:] == ["none", "none"]
    assert "no layers" in report_html.page("m", a_report(), [], "")


@pytest.mark.parametrize(("layers", "channels"), [(28, 1024), (1, 100_000), (300, 512)])
def test_pages_stay_small(layers, channels):
    rng = np.random.default_rng(0)
    ranges = np.stack([-rng.random(channels), rng.random(channels)], axis=1)
    text = report_html.page("m", a_report(), [layer(ranges, ranges)] * layers, "")
    assert len(text) < 300_000


def test_how_weights_are_stored():
    report = a_report()
    layers = [
        {"name": n, "kernel": k, "macs": m, "integer": False}
        for n, k, m in (("a", "MatMulNBits", 30), ("b", "Conv", 10))
    ]
    report.facts["integers"] = {"macs": 40, "share": 0.0, "layers": layers}
    for layer_ in layers:
        layer_ |= {"op": "Gemm", "reason": "so"}
    report.facts["storage"] = [{"text": "2 of <7> values"}]
    text = report_html.page("m", report, [], "")
    assert "2 of &lt;7&gt; values" in text
    assert "75.0 %, activations in float" in text


def test_a_title_that_is_no_text():
    text = report_html.page("model\udcff.onnx", a_report(), [], "")
    assert "<h1>model?.onnx</h1>" in text
    text.encode("utf-8")
