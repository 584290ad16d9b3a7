"""Pages in a browser: charts are drawn to scale, linked to the table, and nothing is loaded."""

import re
import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from onnxq.analysis.weight_ranges import ChannelRanges, LayerRanges
from onnxq.report_page.analysis import of_analysis
from onnxq.report_page.page import page, unpacked
from onnxq.report_page.run import of_run
from tests import analyses
from tests.onnxq.test_report_page import a_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

NASTY = "<img src=x onerror=alert(1)> </script> \"q\" & 'so' $$x$$"
SHARES = (0.1, 0.4, 0.2, 0.3)
BLUE, BRIGHT_BLUE = (0x00, 0x72, 0xB2), (0x56, 0xB4, 0xE9)  # --series-0, light and dark
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        # as root, as in containers, Chromium has no sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens pages; fails where one complains, or asks for anything but itself."""
    contexts, wrong, asked, files = [], [], [], []

    def opens(content, **options):
        file = tmp_path / f"page{len(files)}.html"
        file.write_text(page(content), encoding="utf-8")
        files.append(file.as_uri())
        contexts.append(chromium.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda m: m.type in ("warning", "error") and wrong.append(m.text))
        tab.on("pageerror", lambda e: wrong.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url))
        tab.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        tab.goto(files[-1])
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield opens
    for context in contexts:
        context.close()
    assert wrong == []
    assert asked == files


def four(**others):
    order = sorted(range(4), key=lambda i: -SHARES[i])
    names = ("conv_a", "conv_b", NASTY, "conv_d")
    return analyses.analysis(
        [
            analyses.layer(n, s, order.index(i) + 1, seed=i)
            for i, (n, s) in enumerate(zip(names, SHARES, strict=True))
        ],
        **others,
    )


def content(found=None):
    return of_analysis("m.onnx", found or four())


def pixels(tab, selector, colour):
    """Where an element shows a colour: a mask [H, W]."""
    shot = np.asarray(Image.open(BytesIO(tab.locator(selector).screenshot())).convert("RGB"))
    return (np.abs(shot.astype(int) - colour) < 24).all(axis=2)


def runs(mask):
    """Pixels of each group of columns that hold any."""
    columns = mask.sum(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns > 0, [0]])))
    return [int(columns[a:b].sum()) for a, b in edges.reshape(-1, 2) if b - a > 4]


def drawn_bars(tab, colour, count=4):
    """The bars of the first chart, once they are all painted in a colour."""
    for _ in range(50):
        areas = runs(pixels(tab, "#plot-share", colour))
        if len(areas) == count:
            return np.array(areas)
        tab.wait_for_timeout(100)
    raise AssertionError(f"{len(areas)} bars of {colour}")


def chosen(tab):
    """The layer that is chosen: in the table, in the detail, in two sources, and at a line."""
    return tab.evaluate(
        """() => [
          [...document.querySelectorAll("#layers [aria-selected=true]")]
            .map((row) => row.dataset.layer),
          document.getElementById("layer-name").textContent,
          state.sources.get("layers").selected.indices,
          span("share", "chosen").location,
          state.sources.get("along").selected.indices,
        ]"""
    )


def names(tab):
    return tab.locator("#layers tbody tr:not([hidden]) th").all_inner_texts()


def test_bars_are_to_scale(opened):
    tab = opened(content())
    areas = drawn_bars(tab, BLUE)
    # the line of the chosen layer covers a part of its bar
    np.testing.assert_allclose(areas / areas.sum(), SHARES, atol=0.02)


def test_every_chart_has_marks(opened):
    tab = opened(content())
    drawn_bars(tab, BLUE)
    count = tab.locator(".plot").count()
    assert count == 4 + 5  # along the graph, and of the layer that is chosen
    for index in range(count):
        shot = tab.locator(".plot").nth(index).screenshot()
        image = np.asarray(Image.open(BytesIO(shot)).convert("RGB")).astype(int)
        colourful = image.max(axis=2) - image.min(axis=2) > 60
        assert colourful.sum() > 50, tab.locator(".plot").nth(index).get_attribute("id")


def test_the_most_fragile_layer_is_chosen_at_first(opened):
    assert chosen(opened(content())) == [["1"], "conv_b", [1], 2, [2]]


def test_a_row_chooses_its_layer_everywhere(opened):
    made = content()
    tab = opened(made)
    tab.locator("#layers tbody tr").nth(3).click()
    assert chosen(tab) == [["3"], "conv_d", [3], 4, [6]]
    wanted = unpacked(page(made))["layers"][3]
    shown = tab.evaluate(
        """() => ["ranges", "values", "activation", "formats"].map((k) =>
          ({ ...state.sources.get(`detail-${k}`).data }))"""
    )
    charts = wanted["charts"]
    assert shown[0]["low"] == charts["ranges"]["low"]
    assert shown[0]["high"] == charts["ranges"]["high"]
    assert shown[1]["share"] == charts["values"]["share"]
    assert shown[2]["share"] == charts["activation"]["share"]
    assert shown[3]["expected"] == charts["formats"]["expected"]
    assert shown[3]["measured"] == charts["formats"]["measured"]
    clip = tab.evaluate(
        "['low', 'high'].map((e) => span('detail-activation', `clip-${e}`).location)"
    )
    assert clip == [0, 2.5]
    assert tab.locator("#layer-reason").inner_text() == wanted["reason"]
    assert tab.locator("#layer-remedies pre").inner_text() == wanted["remedies"][0]["command"]


def test_a_bar_chooses_its_row(opened):
    tab = opened(content())
    drawn_bars(tab, BLUE)
    mask = pixels(tab, "#plot-share", BLUE)
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask[:, columns[-4]])
    tab.locator("#plot-share").click(position={"x": int(columns[-4]), "y": int(rows[-2])})
    assert chosen(tab) == [["3"], "conv_d", [3], 4, [6]]
    assert tab.locator("#layers [aria-selected=true]").is_visible()


def test_a_fragile_layer_can_be_chosen_from_the_list(opened):
    tab = opened(content())
    tab.locator(".fragile button.link").nth(2).click()
    assert chosen(tab)[1] == NASTY


def test_sorting(opened):
    tab = opened(content())
    graph = ["conv_a", "conv_b", NASTY, "conv_d"]
    assert names(tab) == graph
    noise = tab.locator("#layers thead th", has_text="noise %")
    noise.locator("button").click()
    assert names(tab) == ["conv_b", "conv_d", NASTY, "conv_a"]
    assert noise.get_attribute("aria-sort") == "descending"
    noise.locator("button").click()
    assert names(tab) == ["conv_a", NASTY, "conv_d", "conv_b"]
    tab.locator("#layers thead button", has_text="layer").click()
    assert names(tab) == sorted(graph, key=lambda n: (n != NASTY, n))
    assert noise.get_attribute("aria-sort") is None
    tab.locator("#layers thead button", has_text="#").click()
    assert names(tab) == graph
    # what is chosen stays, wherever its row went
    assert chosen(tab)[1] == "conv_b"


def test_layers_that_are_not_known_come_last_either_way(opened):
    layers = [
        analyses.layer("unreached", None, None, executed=False),
        analyses.layer("large", 0.75, 1),
        analyses.layer("small", 0.25, 2, broken=True),
    ]
    tab = opened(content(analyses.analysis(layers)))
    noise = tab.locator("#layers thead button", has_text="noise %")
    noise.click()
    assert names(tab) == ["large", "small", "unreached"]
    noise.click()
    assert names(tab) == ["small", "large", "unreached"]
    tab.locator("#layers tbody tr", has_text="unreached").click()
    assert tab.locator("#detail-activation .says").inner_text() == "no sample reached this layer"
    assert not tab.locator("#plot-detail-activation").is_visible()
    tab.locator("#layers tbody tr", has_text="small").click()
    assert tab.locator("#detail-values .says").inner_text() == "holds values that are not finite"
    assert tab.locator("#plot-detail-activation").is_visible()


def test_the_table_by_keyboard(opened):
    tab = opened(content())
    tab.locator("#layers tbody tr").nth(1).locator("button").focus()
    tab.keyboard.press("ArrowDown")
    assert chosen(tab)[1] == NASTY
    tab.keyboard.press("End")
    assert chosen(tab)[1] == "conv_d"
    tab.keyboard.press("ArrowDown")
    assert chosen(tab)[1] == "conv_d"
    tab.keyboard.press("Home")
    assert chosen(tab)[1] == "conv_a"
    # one stop of the tabulator leads in
    assert tab.locator("#layers tbody button[tabindex='0']").count() == 1
    tab.locator("#layers thead button", has_text="rank").focus()
    tab.keyboard.press("Enter")
    assert names(tab)[0] == "conv_a"  # rank 4, the largest number


def test_filtering(opened):
    tab = opened(content())
    tab.locator("#filter").fill("CONV_")
    assert names(tab) == ["conv_a", "conv_b", "conv_d"]
    tab.locator("#filter").fill("")
    assert len(names(tab)) == 4


def test_formats_are_shown_when_they_are_ticked(opened):
    tab = opened(content())
    visible = "state.plots.get('formats').renderers.filter((r) => r.name).map((r) => r.visible)"
    # those by which layers are ranked: int8/channel and uint8
    assert tab.evaluate(visible) == [False, True, False, False, True, False]
    tab.get_by_role("checkbox", name="int4/channel weights").check()
    assert tab.evaluate(visible) == [False, True, True, False, True, False]


def test_names_in_tips_are_text(opened):
    tab = opened(content())
    tab.locator("#layers tbody tr").nth(2).click()
    assert tab.locator("#layer-name").inner_text() == NASTY
    box = tab.locator("#plot-share").bounding_box()
    tab.locator("#plot-share").hover(position={"x": box["width"] * 0.64, "y": 120})
    tip = tab.locator(".bk-Tooltip").get_by_text("onerror")
    assert tip.inner_text() == NASTY
    assert tab.locator("img").count() == 0


def test_commands_are_copied(opened):
    tab = opened(content())
    tab.locator(".fragile .copy").first.click()
    selected = tab.evaluate("getSelection().toString()")
    assert selected == "onnxq quantize --format 'conv_b=int16'"
    said = sync_api.expect(tab.locator(".fragile .copy").first)
    said.to_have_text(re.compile("Copied|Selected"))


def test_dark(opened):
    tab = opened(content(), color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 25)"
    drawn_bars(tab, BRIGHT_BLUE)
    tab.emulate_media(color_scheme="light")
    drawn_bars(tab, BLUE)


def test_a_phone(opened):
    tab = opened(content(), viewport=PHONE, has_touch=True)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    for plot in tab.locator(".plot").all():
        assert 250 < plot.bounding_box()["width"] <= 360
    tab.locator("#layers tbody tr").nth(3).tap()
    assert chosen(tab)[1] == "conv_d"
    # a finger on a chart scrolls the page
    touch = "(e) => getComputedStyle(e).touchAction"
    assert tab.locator("#plot-share .bk-events").first.evaluate(touch) != "none"


def test_before_and_after(opened):
    rng = np.random.default_rng(0)

    def ranges(size):
        return ChannelRanges(-size * rng.random(8), size * rng.random(8))

    layers = [
        LayerRanges("even", "Conv", ranges(1), ranges(1), True),
        LayerRanges("evened", "Conv", ranges(100), ranges(1), True),
        LayerRanges("made", "Conv", None, ranges(1), True),
    ]
    tab = opened(of_run("m.onnx", a_report(), layers, "a = 1"))
    y = """() => ["before", "after"].map((k) => {
      const { start, end } = state.plots.get(`detail-${k}`).y_range; return [start, end]; })"""
    says = "#detail-after .says"
    tab.locator("#layers tbody tr").nth(0).click()
    before, after = tab.evaluate(y)
    assert before == after
    assert "scale of its own" not in tab.locator(says).inner_text()
    tab.locator("#layers tbody tr").nth(1).click()
    before, after = tab.evaluate(y)
    assert before[1] > 10 * after[1]
    assert "scale of its own" in tab.locator(says).inner_text()
    tab.locator("#layers tbody tr").nth(2).click()
    assert not tab.locator("#plot-detail-before").is_visible()
    assert tab.locator("#detail-before .says").inner_text() == "made by a pass"


def test_a_model_without_layers(opened):
    tab = opened(content(analyses.analysis([])))
    assert "no layers" in tab.locator("main").inner_text()


def test_a_thousand_layers(opened):
    tab = opened(content(analyses.many(1000)))
    tab.locator("#layers thead button", has_text="rank").click()
    tab.locator("#layers thead button", has_text="rank").click()
    worst = analyses.many(1000).fragile[0].name
    assert names(tab)[0] == worst
    assert chosen(tab)[1] == worst
