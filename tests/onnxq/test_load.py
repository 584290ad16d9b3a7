"""Many samples in constant memory; models that protobuf cannot serialize."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
MB = 1 << 20
SIDE, LAYERS = 7168, 11  # 196 MiB of floats each: 2.1 GiB


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "onnxq", *map(str, arguments)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 1800},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


PEAK = """
import sys
import numpy as np
from onnxq import api

def samples():
    draw = np.random.default_rng(0)
    for _ in range(int(sys.argv[2])):
        yield {"input": draw.random((1, 1, 8, 8), np.float32)}

for count in (64, int(sys.argv[2])):  # the first loads what there is to load
    sys.argv[2] = count
    api.run("default", sys.argv[1], None, samples, threads=2)
    print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_ten_thousand_samples_take_no_more_memory_than_a_thousand():
    peaks = []
    for count in (1_000, 10_000):
        command = [sys.executable, "-c", PEAK, str(DIGITS / "digits.onnx"), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    assert abs(peaks[1] - peaks[0]) < 16 * MB


def large(path):
    """Layers whose weights are one after the other in a file of more than 2 GB."""
    draw = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for i in range(LAYERS):
        w = draw.standard_normal((SIDE, SIDE), np.float32) * np.float32(np.sqrt(2 / SIDE))
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], name=f"layer{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [x := f"r{i}"], name=f"relu{i}"))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", SIDE]) for n in ("x", x)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location="in.data")
    assert path.with_name("in.data").stat().st_size > 1 << 31


@pytest.mark.slow
def test_a_model_of_more_than_2_gb_from_end_to_end(tmp_path):
    source, small, samples = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "samples"
    large(source)
    samples.mkdir()
    for i in range(2):
        x = np.random.default_rng(i).standard_normal((1, SIDE)).astype(np.float32)
        np.savez(samples / f"{i}.npz", x=x)
    facts = tmp_path / "facts.json"
    run("quantize", source, small, "--calib", samples, "--recipe", "minmax", "--json", facts)
    bytes_ = json.loads(facts.read_text())["bytes"]
    assert bytes_["before"] > 1 << 31
    assert bytes_["after"] == pytest.approx(bytes_["before"] / 4, rel=0.01)
    run("inspect", source, "--json", facts)
    assert len(json.loads(facts.read_text())["layers"]) == LAYERS
    run("doctor", source, "--data", samples, "--json", facts)
    run("doctor", small, "--data", samples)
    run("compare", source, small, "--data", samples, "--json", facts)
    (output,) = json.loads(facts.read_text())["outputs"]
    assert output["cosine"] > 0.99
    # the float model again, weights beside it
    run("encodings", "export", small, tmp_path / "out.json", "--float", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx.data").stat().st_size > 1 << 31
    assert not [*tmp_path.glob(".onnxq-*")]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 12 << 30
