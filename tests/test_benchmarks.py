"""The benchmarks run, measure what they say, and tell when they cannot."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onnxq.encoding import Encoding, Encodings
from onnxq.quantsim import Exported

ROOT = Path(__file__).parent.parent
MODEL, CALIB = (ROOT / "examples" / "digits" / name for name in ("digits.onnx", "calib"))


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """The benchmarks as modules, found as they find one another; results go to tmp_path."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = ("_zoo", "adaround", "calibration", "compression", "latency", "simulation")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import _zoo
    import adaround
    import calibration
    import compression
    import latency
    import simulation

    monkeypatch.setattr(_zoo, "OUT", tmp_path)
    modules = (_zoo, adaround, calibration, compression, latency, simulation)
    yield {module.__name__: module for module in modules}
    for name in (*names, "_memory"):
        del sys.modules[name]


def rows(text):
    """The cells of a Markdown table by the first one of their row."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_calibration(scripts, tmp_path, capsys):
    arguments = ["--model", str(MODEL), "--calib", str(CALIB), "--quick", "--no-memory"]
    scripts["calibration"].main(arguments)
    facts = json.loads((tmp_path / "calibration.json").read_text())
    assert facts["model"] == "digits"
    taken = facts["seconds"]["taken"]
    assert len(taken["bare"]) == len(taken) - 1 == 1 + 5 + 5 + 4
    assert all(wall > 0 and processor > 0 for t in taken.values() for wall, processor in t)
    table = rows(capsys.readouterr().out)
    assert set(table) >= {"minmax", "moving-average", "percentile", "entropy", "mse"}
    assert table["mse"][2] == "has none"


def test_both_calibrators_see_the_same_values(scripts, tmp_path):
    calibration = scripts["calibration"]
    feeds = [*scripts["_zoo"].stream(CALIB, 5)]
    model = calibration.prepared(MODEL, feeds)
    model.save(tmp_path / "m.onnx")
    ours = calibration.ours(model, calibration.encoded(model, feeds), feeds, "minmax")
    theirs = calibration.theirs(tmp_path / "m.onnx", feeds, "minmax")
    assert len(ours) >= 5
    for name, (low, high) in ours.items():
        seen = [float(v.reshape(())) for v in theirs[name].range_value]
        assert (low, high) == pytest.approx((min(seen[0], 0), max(seen[1], 0)), rel=1e-5, abs=1e-6)


def test_ratios_are_those_of_the_best(scripts):
    calibration = scripts["calibration"]
    taken = {"bare": [(4.0, 9.0), (2.0, 5.0)], "single": [(3.5, 3.0), (3.0, 4.0)]}
    for method in calibration.METHODS:
        taken[f"here {method}"] = [(9.0, 6.0), (3.1, 9.0)]
        taken[f"pass {method}"] = [(5.0, 7.5)]
    text = calibration.time_table({"tensors": {"here": 2, "onnxruntime": 3}, "taken": taken})
    minmax, mse = (rows(text)[method] for method in ("minmax", "mse"))
    assert minmax[0] == "3.10 s, 1.55x, processor 2.00x"
    assert minmax[1:] == ["5.00 s, 2.50x, processor 2.50x", "has none", "1.5x **missed**"]
    assert mse[3] == "2.0x"


def test_peak_of_a_fresh_process():
    command = [
        sys.executable,
        ROOT / "benchmarks" / "calibration.py",
        "--peak",
        "bare",
        "inference",
    ]
    command += ["2", "--model", MODEL, "--calib", CALIB]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert 20e6 < json.loads(done.stdout)["peak"] < 2e9


def test_memory_that_is_not_there(scripts, monkeypatch):
    calibration = scripts["calibration"]
    monkeypatch.setattr(calibration, "available", lambda: 1e6)
    needed = calibration.consume("onnxruntime", "percentile", MODEL, CALIB, 1000)["needed"]
    assert (
        needed == 10 * calibration.consume("onnxruntime", "percentile", MODEL, CALIB, 100)["needed"]
    )
    row = {"who": "a", "method": "b", "10": {"peak": 5e6}, "100": {"needed": needed}}
    table = rows(calibration.memory_table([row]))
    assert table["a b"] == ["5", f"not run: {needed / 1e6:.0f} needed"]


def test_latency(scripts, tmp_path, capsys):
    scripts["latency"].main([str(MODEL), "--calib", str(CALIB), "--quick"])
    (row,) = json.loads((tmp_path / "latency.json").read_text())
    assert row["model"] == "digits"
    assert list(row["ms"]) == ["float", "onnxq", "onnxruntime"]
    for low, median, high in row["ms"].values():
        assert 0 < low <= median <= high
    cells = rows(capsys.readouterr().out)["digits"]
    ms = {name: quartiles[0] for name, quartiles in row["ms"].items()}
    for cell, (top, under) in zip(
        cells[3:6],
        [("onnxq", "float"), ("onnxruntime", "float"), ("onnxq", "onnxruntime")],
        strict=True,
    ):
        assert float(cell) == pytest.approx(ms[top] / ms[under], abs=0.006)


def test_what_onnxruntime_cannot_quantize_is_told(scripts, tmp_path, monkeypatch):
    latency = scripts["latency"]
    ways = []

    def fails(start, result, reader, **options):
        assert isinstance(next(iter(reader.get_next().values())), np.ndarray)
        ways.append(start)
        raise ValueError("no way\nat all")

    monkeypatch.setattr(latency, "quant_pre_process", lambda source, target, **options: None)
    monkeypatch.setattr(latency, "quantize_static", fails)
    told = latency.theirs(MODEL, tmp_path, [*scripts["_zoo"].stream(CALIB, 2)])
    assert ways == [tmp_path / "prepared.onnx"] * 2 + [MODEL]
    wanted = ["pre-processing", "without symbolic shapes", "without pre-processing"]
    assert told == [f"{way}: no way" for way in wanted]
    row = {"model": "m", "ms": {"float": [2, 5, 6], "onnxq": [1, 1, 1]}, "notes": told}
    assert rows(latency.table([row]))["m"][2:6] == ["fails", "0.50", "", ""]


def test_models_that_are_slower_are_named(scripts):
    def row(name, onnxq, onnxruntime):
        ms = {"float": 9.0, "onnxq": onnxq, "onnxruntime": onnxruntime}
        return {"model": name, "ms": {k: [v, 50, 99] for k, v in ms.items()}, "notes": []}

    text = scripts["latency"].table([row("a", 1.04, 1), row("b", 1.06, 1), row("c", 2, 1)])
    assert text.endswith("by over 5%: b, c")
    assert scripts["latency"].table([row("a", 1.04, 1)]).endswith("by over 5%: none")


def test_samples_are_read_over_again_where_there_are_too_few(scripts):
    feeds = [f["input"] for f in scripts["_zoo"].stream(CALIB, 101)]
    np.testing.assert_array_equal(feeds[100], feeds[0])
    assert not np.array_equal(feeds[1], feeds[0])


def test_adaround(scripts, tmp_path, capsys):
    scripts["adaround"].main([str(MODEL), "--calib", str(CALIB), "--quick"])
    results = json.loads((tmp_path / "adaround.json").read_text())
    assert len(results) > 2
    table = capsys.readouterr().out
    for row in results:
        assert row["model"] == "digits"
        assert list(row["error"]) == ["gptq", "relaxation, tenth", "relaxation", "search"]
        assert row["error"]["search"] <= row["error"]["relaxation, tenth"] <= 1
        assert all(seconds >= 0 for seconds in row["seconds"].values())
        assert f"| {row['layer']} | {' x '.join(map(str, row['shape']))} |" in table
    assert f"of {len(results)} layers" in table
    assert "rows worse than nearest: 0; 0 layers left out" in table
    assert [line.split(":")[0] for line in table.splitlines()[-2:]] == ["K = 64", "K = 144"]


def test_what_the_search_missed_is_told(scripts):
    def row(search, relaxation, seconds):
        errors = {"relaxation": relaxation, "search": search}
        return {
            "model": "m",
            "layer": f"at {search}",
            "error": errors,
            "seconds": {"relaxation": 50.0, "search": seconds},
            "rows worse than nearest": 0,
        }

    good = scripts["adaround"].summary([row(0.5, 0.5, 1.0)] * 19 + [row(0.6, 0.5, 1.0)])
    assert good.startswith("search no worse than the relaxation on 95.0% of 20 layers, worst 1.200")
    assert "(m at 0.6), in 1/50 of its time (20.0 s)" in good
    bad = scripts["adaround"].summary([row(0.5, 0.5, 1.1), row(0.6, 0.5, 1.1)])
    assert "50.0% of 2 layers **missed**" in bad
    assert "in 1/45 of its time **missed**" in bad


def test_compression(scripts, tmp_path, capsys):
    options = ["--calib", str(CALIB), "--shares", "0.7", "0.01", "--seconds", "0.1"]
    scripts["compression"].main([str(MODEL), *options])
    found = json.loads((tmp_path / "compression.json").read_text())
    assert [(r["method"], r["share"]) for r in found] == [
        (method, share) for method in ("spatial-svd", "weight-svd", "auto") for share in (0.7, 0.01)
    ]
    for row in found[::2]:
        assert 0.5 < row["macs"] <= 0.7
        assert row["latency"] > 0
    assert all("cannot be met" in row["note"] for row in found[1::2])
    assert "cannot be met" in rows(capsys.readouterr().out)["digits"][3]


def test_fitted_models_that_are_no_better_are_marked(scripts):
    row = {"model": "m", "float": 9.0, "method": "auto", "share": 0.5, "macs": 0.5, "latency": 0.7}
    good = scripts["compression"].table([{**row, "plain": 1.0, "fitted": 8.0}])
    assert rows(good)["m"] == ["9.00", "auto", "0.500", "1.00", "8.00", "0.70"]
    bad = scripts["compression"].table([{**row, "plain": 8.0, "fitted": 8.0}])
    assert rows(bad)["m"][4] == "8.00 **missed**"


def test_without_the_zoo_a_benchmark_says_so(scripts, monkeypatch, capsys):
    monkeypatch.delenv("ONNXQ_ZOO", raising=False)
    for name in ("adaround", "calibration", "compression", "latency"):
        with pytest.raises(SystemExit) as left:
            scripts[name].main([])
        assert left.value.code == scripts["_zoo"].SKIPPED
        assert "set ONNXQ_ZOO" in capsys.readouterr().err


def test_simulation(scripts, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ONNXQ_AIMET", raising=False)
    scripts["simulation"].main([str(MODEL), "--calib", str(CALIB), "--quick"])
    (row,) = json.loads((tmp_path / "simulation.json").read_text())
    names = ["float", "integers", "floats", "fast floats"]
    assert [*row["ms"]] == names
    cells = rows(capsys.readouterr().out)["digits"]
    for cell, name in zip(cells[5:8], names[1:], strict=True):
        assert float(cell) == pytest.approx(row["ms"][name][0] / row["ms"]["float"][0], abs=0.006)


def test_what_an_exchange_of_encodings_tells(scripts):
    ms = {name: [1.0, 2.0, 3.0] for name in ("float", "integers", "floats", "fast floats")}
    found = {"ours": 5, "theirs": 4, "both": 3, "apart": 0.25}
    with_theirs = {"model": "m", "ms": {**ms, "aimet-onnx": [8.0, 9.0, 10.0]}}
    text = scripts["simulation"].table([{**with_theirs, "exchange": {"there": found}}])
    assert rows(text)["m"][-3:] == ["8.00", "8.00", "8.00"]
    assert "our encodings there: 3 tensors matched, of 5 here and 4 there" in text
    assert "within 2.5e-01 steps" in text
    alone = scripts["simulation"].table([{"model": "m", "ms": ms, "exchange": None}])
    assert rows(alone)["m"][4] == "not installed"
    assert rows(alone)["m"][-3:] == ["", "", ""]


def test_the_other_side_answers_by_lines(scripts, tmp_path, monkeypatch):
    """Times and ranges that another process tells, and what it said where it fails."""
    simulation = scripts["simulation"]
    script = tmp_path / "_aimet.py"
    script.write_text(
        "import json, sys\n"
        "print(json.dumps({'t': [[-1.0], [2.0]]}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    if line.strip(): sys.exit('no such thing as ' + line)\n"
        "    print(7.5, flush=True)\n"
    )
    monkeypatch.setattr(simulation, "__file__", str(tmp_path / "simulation.py"))
    files = Exported(tmp_path / "e", tmp_path / "m", None)
    feed = {"x": np.zeros((1, 3), np.float32)}
    with simulation.Aimet(sys.executable, files, [feed], tmp_path, 1) as theirs:
        assert theirs.ranges == {"t": [[-1.0], [2.0]]}
        theirs.run(feed)
        theirs.run(feed)
        assert theirs.ms == [7.5, 7.5]
        with pytest.raises(SystemExit, match="no such thing as calibrate"):
            theirs.calibrate()
    encoding = Encoding("uint8", np.array(0.01, np.float32), np.array(100, np.int32))
    found = simulation.matched(theirs.ranges, Encodings({"t": encoding, "u": encoding}))
    assert (found["ours"], found["theirs"], found["both"]) == (2, 1, 1)
    assert found["apart"] == pytest.approx(45, abs=1e-3)  # 1.55 is what the grid ends at
