"""What `analyze` says of models, and of models and samples that are not as they should be."""

import json
import shlex
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import onnxq
from onnxq.cli import main
from onnxq.errors import ModelError, RecipeError
from tests import models
from tests.models import parse

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
TEXT = (
    "g (float[N,3,8,8] x) => (float[] y)"
    "<float[8,3,3,3] w, float[8] b, float[8,1,3,3] u, float[5,8,1,1] v>"
    "{ c = Conv(x, w, b) r = Relu(c) d = Conv<group=8>(r, u) s = Relu(d) y = Conv(s, v) }"
)
CHAIN = (
    "g (float[N,3,8,8] x) => (float[] y)"
    "<float[32,3,3,3] w, float[32,32,3,3] u, float[32,32,3,3] v>"
    "{ c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, u) s = Relu(d)"
    " y = Conv(s, v) }"
)


def names(proto, *wanted):
    for node, name in zip(
        (n for n in proto.graph.node if n.op_type == "Conv"), wanted, strict=True
    ):
        node.name = name
    return proto


def net(**values):
    return names(parse(TEXT, **values), "first", "depth", "last")


def feeds(proto, count=6):
    return [models.feeds(proto, seed=s, batch=1) for s in range(count)]


def verb(*args):
    return CliRunner().invoke(main, ["analyze", *map(str, args)])


def plain(result):
    """The result as JSON text and back, which knows no NaN."""
    text = json.dumps(result.to_dict(), allow_nan=False)
    return json.loads(text)


@pytest.fixture(scope="module")
def digits():
    return onnxq.analyze(DIGITS / "digits.onnx", DIGITS / "calib", measure="one-at-a-time")


def test_the_parts_of_an_analysis(digits):
    found = plain(digits)
    assert found["model"]["name"] == "digits.onnx"
    assert found["model"]["output_names"] == ["logits"]
    assert found["model"]["sha256"] == onnxq.load(DIGITS / "digits.onnx").digest()
    assert found["versions"]["onnxq"] == onnxq.__version__
    assert "calibrate" in found["recipe"]
    wanted = onnxq.inspect(DIGITS / "digits.onnx")
    by_name = {layer.cost.name: layer.cost for layer in wanted.layers}
    assert [layer["name"] for layer in found["layers"]] == [*by_name]
    for layer in found["layers"]:
        assert layer["macs"] == by_name[layer["name"]].macs
        assert layer["bit_operations"] == 64 * layer["macs"]
        shape = layer["output_shape"]
        assert layer["activation_bytes"] == 4 * np.prod(shape[1:])
        assert {*layer["sensitivities"]["weights"]} == {
            *("int8/tensor", "int8/channel", "int4/channel", "int16/channel")
        }
        assert {*layer["sensitivities"]["activations"]} == {"uint8", "uint16"}
        assert layer["executed"]
    assert found["totals"]["macs"] == sum(layer["macs"] for layer in found["layers"])
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert sorted(layer["fragility"] for layer in found["layers"]) == [1, 2, 3, 4, 5, 6]


def test_coarser_formats_cost_more(digits):
    for layer in digits.layers:
        weights = [
            layer.sensitivity("weights", f).effect
            for f in ("int16/channel", "int8/channel", "int4/channel")
        ]
        assert weights == sorted(weights)
        assert weights[2] > 50 * weights[1]
        fine, coarse = (layer.sensitivity("activations", f).effect for f in ("uint16", "uint8"))
        assert coarse > 1000 * fine


def test_expected_effects_are_near_the_measured_ones(digits):
    for layer in digits.layers:
        for found in layer.sensitivities:
            assert 1 / 3 < found.effect / found.measured < 3, (layer.name, found)
    assert all(a.spearman > 0.7 for a in digits.agreement)


def test_all_noise_together_is_near_the_error_of_the_quantized_model(digits):
    written = digits.tensors[-1]
    assert written.name == "logits"
    assert abs(digits.totals["sqnr_db"] - written.sqnr_db) < 3


def test_one_large_weight_channel_is_found_where_scales_are_per_tensor():
    proto = net()
    for tensor in proto.graph.initializer:
        factor = {"w": 100, "b": 100, "u": 1 / 100}.get(tensor.name)
        if factor is not None:
            values = numpy_helper.to_array(tensor).copy()
            values[3] *= factor
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    result = onnxq.analyze(onnxq.load(proto), feeds(proto), weights="int8/tensor")
    first = result.layers[0]
    assert "one channel of its weight is" in first.reason
    assert [o.channel for o in first.weights.outliers] == [3]
    assert any("first=int8/channel" in a.command for a in first.advice)


def test_an_outlying_input_channel_is_found():
    proto = net()
    data = feeds(proto)
    for feed in data:
        feed["x"][:, 1] *= 100
    first = onnxq.analyze(onnxq.load(proto), data).layers[0]
    assert first.reason.startswith("channel 1 of its input is")
    assert first.activation.is_input


def test_a_depthwise_layer_is_named_so():
    proto = net()
    result = onnxq.analyze(onnxq.load(proto), feeds(proto), weights="int4/channel")
    assert "sums only 9 products" in result.layers[1].reason


def test_commands_run_as_they_are_shown(tmp_path):
    proto = names(parse(TEXT), "first layer", "it's", "last")
    onnx.save(proto, tmp_path / "a model.onnx")
    calib = tmp_path / "calib"
    calib.mkdir()
    for index, feed in enumerate(feeds(proto)):
        np.savez(calib / f"{index}.npz", **feed)
    result = onnxq.analyze(tmp_path / "a model.onnx", calib)
    commands = [a.command for layer in result.layers for a in layer.advice]
    assert any("--exclude" in c for c in commands)
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "onnxq"
        words[3] = str(tmp_path / words[3])
        ran = CliRunner().invoke(main, words[1:])
        assert ran.exit_code == 0, ran.output


def by_method(layer):
    found = {}
    for c in layer.compressions:
        found.setdefault(c.method, []).append(c)
    return found


@pytest.fixture(scope="module")
def smaller():
    """A model half of whose first channels are dead, and whose middle layer has little rank."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(32, 3, 3, 3)).astype(np.float32)
    w[16:] = 0
    u = np.einsum("or,rckl->ockl", rng.normal(size=(32, 8)), rng.normal(size=(8, 32, 3, 3)))
    v = rng.normal(size=(32, 32, 3, 3)).astype(np.float32)
    proto = names(parse(CHAIN, w=w, u=u.astype(np.float32) / 20, v=v), "first", "low", "last")
    return proto, onnxq.analyze(onnxq.load(proto), feeds(proto, 32))


def test_what_layers_may_become(smaller):
    _, smaller = smaller
    first, low, last = (by_method(layer) for layer in smaller.layers)
    # dead channels cost nothing; they are of two layers together
    half = next(c for c in first["channel-pruning"] if c.ratio == 0.5)
    assert half.layers == ("first", "low")
    assert half.effect < 1e-5
    assert half.kept == pytest.approx(0.5)
    assert half.whole_macs == smaller.layers[0].macs + smaller.layers[1].macs
    less = next(c for c in first["channel-pruning"] if c.ratio == 0.25)
    assert less.effect > 1e-2
    # a rank of 8 of 32 is all that there is
    rank = {round(c.ratio * 9 * 32 * 32 / (9 * 32 + 32)): c for c in low["weight-svd"]}
    assert min(rank) == 8
    assert rank[8].effect < 1e-5
    assert rank[8].layers == ("low",)
    # the last one has full rank, and its outputs are the model's
    assert smaller.layers[2].whole == {"channel-pruning": "y is an output of the model"}
    errors = [c.error for c in last["spatial-svd"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05


def test_effects_of_compression_are_near_the_least_that_a_rank_can_cost(smaller):
    """Of the layer that makes the output: the power outside of its principal directions."""
    proto, result = smaller
    session = ort.InferenceSession(proto.SerializeToString())
    made = np.concatenate([session.run(None, feed)[0] for feed in feeds(proto, 32)])
    rows = made.transpose(0, 2, 3, 1).reshape(-1, 32).astype(np.float64)
    powers = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    for c in by_method(result.layers[2])["weight-svd"]:
        rank = round(c.ratio * 9 * 32 * 32 / (9 * 32 + 32))
        least = powers[: 32 - rank].sum() / np.square(rows).mean(axis=0).sum()
        assert 0.8 * least < c.effect < 1.6 * least


def test_what_is_cheap_is_told(smaller):
    _, smaller = smaller
    best = smaller.cheap[0]
    assert best.saved == max(c.saved for layer in smaller.layers for c in [layer.spared()] if c)
    assert all(c.effect <= 0.01 for c in smaller.cheap)
    keys = [(c.method, c.layers) for c in smaller.cheap]
    assert len(keys) == len(set(keys))
    first = plain(smaller)["layers"][0]["compressions"][0]
    assert {*first} == {
        *("method", "layers", "ratio", "macs", "whole_macs", "bytes", "error", "effect")
    }


def test_compression_can_be_left_out():
    proto = net()
    result = onnxq.analyze(onnxq.load(proto), feeds(proto), compression=False)
    assert not any(layer.compressions or layer.whole for layer in result.layers)
    assert "compression" not in result.seconds
    assert result.cheap == []


def test_the_same_seed_gives_the_same_result():
    proto = net()
    first, second = (
        onnxq.analyze(onnxq.load(proto), feeds(proto), seed=3).to_dict() for _ in range(2)
    )
    del first["seconds"], second["seconds"]
    assert first == second


# ---------------------------------------------------------------------- bad input


def test_nan_activations_are_shown():
    text = TEXT.replace("d = Conv<group=8>(r, u)", "l = Log(c) d = Conv<group=8>(l, u)")
    proto = names(parse(text), "first", "depth", "last")
    result = onnxq.analyze(onnxq.load(proto), feeds(proto), measure="one-at-a-time")
    plain(result)
    assert "values are NaN or infinite in its input l" in result.layers[1].reason
    assert result.layers[1].share is None
    assert any(note.startswith("tensor l: ") for note in result.notes)


def test_nan_on_a_branch_leaves_the_others_ranked():
    text = TEXT.replace("(float[] y)", "(float[] y, float[] z)").replace(
        "y = Conv(s, v)", "l = Log(c) z = Conv<group=8>(l, u) y = Conv(s, v)"
    )
    proto = names(parse(text), "first", "depth", "strange", "last")
    result = onnxq.analyze(onnxq.load(proto), feeds(proto))
    plain(result)
    by_name = {layer.name: layer for layer in result.layers}
    assert by_name["strange"].share is None
    assert "NaN" in by_name["strange"].reason
    assert by_name["last"].share > 0
    assert by_name["depth"].share > 0


def test_a_layer_that_no_sample_reaches_is_shown():
    # a slice of the input that is empty
    text = (
        "g (float[N,3,8,8] x) => (float[] y)"
        "<float[8,3,1,1] w, float[3,5] v, int64[1] i, int64[1] k>"
        "{ c = Conv(x, w) e = Slice(x, i, i, k) p = Transpose<perm=[0,2,3,1]>(e) m = MatMul(p, v)"
        " t = ReduceSum<keepdims=0>(m) y = Add(c, t) }"
    )
    proto = parse(text, i=[0], k=[0])
    result = onnxq.analyze(onnxq.load(proto), feeds(proto))
    plain(result)
    idle = result.layers[1]
    assert (idle.op, idle.executed) == ("MatMul", False)
    assert idle.reason == "never executed: no sample reached it"
    assert result.layers[0].share == 1


def test_layers_that_no_output_needs_are_noted():
    text = TEXT.replace("y = Conv(s, v)", "y = Conv(s, v) unused = Conv(x, w)")
    proto = names(parse(text), "first", "depth", "last", "idle")
    result = onnxq.analyze(onnxq.load(proto), feeds(proto))
    assert "idle" not in [layer.name for layer in result.layers]
    assert "no output needs them: idle" in result.notes


def test_a_model_without_weights(tmp_path):
    proto = parse("g (float[N,4] x) => (float[] y) { y = Relu(x) }")
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", x=np.ones((3, 4), np.float32))
    shown = verb(tmp_path / "m.onnx", "--calib", tmp_path / "calib.npz", "--measure", "all-but-one")
    assert shown.exit_code == 0, shown.output
    assert "no layer with constant weights" in shown.stdout


def test_names_are_shown_as_they_are(tmp_path):
    odd = ["<b>[red]", "<script>alert(1)</script>", "[/]&amp;"]
    proto = names(parse(TEXT), *odd)
    onnx.save(proto, tmp_path / "m.onnx")
    result = onnxq.analyze(tmp_path / "m.onnx", feeds(proto))
    assert [layer["name"] for layer in plain(result)["layers"]] == odd
    calib = tmp_path / "calib"
    calib.mkdir()
    for index, feed in enumerate(feeds(proto)):
        np.savez(calib / f"{index}.npz", **feed)
    shown = verb(tmp_path / "m.onnx", "--calib", calib)
    assert shown.exit_code == 0, shown.output
    for name in odd:
        assert name in shown.stdout


def test_an_operator_without_derivative_is_told():
    text = TEXT.replace("s = Relu(d)", "h = Hardmax<axis=1>(d) s = Relu(h)")
    proto = names(parse(text), "first", "depth", "last")
    result = onnxq.analyze(onnxq.load(proto), feeds(proto), measure="one-at-a-time")
    plain(result)
    first, last = result.layers[0], result.layers[2]
    assert last.share == 1
    assert "no rule for the derivative of Hardmax" in first.reason
    assert first.sensitivity("weights", "int4/channel").measured is not None
    assert first.sensitivity("weights", "int4/channel").layer_sqnr_db is not None


def test_layers_of_float16_are_told():
    proto = net()
    half = helper.make_node("Cast", ["x"], ["h"], to=10)
    late = helper.make_node("Cast", ["i"], ["z"], to=1)
    inner = helper.make_node("MatMul", ["h", "k"], ["i"], name="half")
    proto.graph.node.extend([half, inner, late])
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((8, 2), np.float16), "k"))
    proto.graph.output.append(helper.make_tensor_value_info("z", 1, None))
    result = onnxq.analyze(onnxq.load(proto), feeds(proto))
    plain(result)
    by_name = {layer.name: layer for layer in result.layers}
    assert by_name["half"].reason == "it computes in float16, not in float32"
    assert by_name["last"].share > 0


def test_what_is_refused():
    proto = net()
    data = feeds(proto)
    with pytest.raises(RecipeError, match="not ranked by float"):
        onnxq.analyze(onnxq.load(proto), data, weights="float")
    with pytest.raises(RecipeError, match="nothing is measured"):
        onnxq.analyze(onnxq.load(proto), data, metric=lambda outputs: 0.0)
    small, _ = onnxq.quantize(onnxq.load(proto), calib=data)
    with pytest.raises(ModelError, match="quantized already"):
        onnxq.analyze(small, data)


def test_the_verb_writes_json_and_a_summary(tmp_path):
    target = tmp_path / "a.json"
    shown = verb(
        *(DIGITS / "digits.onnx", "--calib", DIGITS / "calib", "--json", target),
        *("--measure", "all-but-one", "--measure-samples", 4, "--resume", tmp_path / "work"),
    )
    assert shown.exit_code == 0, shown.output
    found = json.loads(target.read_text(), parse_constant=pytest.fail)
    first = min(found["layers"], key=lambda layer: layer["fragility"])
    assert shown.stdout.splitlines()[5].split()[0] == first["name"]
    assert first["advice"][0]["command"] in shown.stdout
    assert shown.stdout.count("all quantized but") == 5
    assert all(layer["left_in_float"] is not None for layer in found["layers"])
    assert len([*(tmp_path / "work").rglob("*.json")]) == len(found["layers"])


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["cifar_resnet20", "vww_mobilenetv1_025"])
def test_expected_effects_rank_real_layers_as_measured_ones(name, tmp_path):
    calib = models.zoo_samples(name, tmp_path / "calib", 64)
    result = onnxq.analyze(models.zoo(name), calib, measure="one-at-a-time", trial_samples=32)
    found = {(a.part, a.format): a.spearman for a in result.agreement}
    assert found["weights", "int8/channel"] > 0.88
    assert found["weights", "int4/channel"] > 0.85
    assert found["activations", "uint8"] > 0.75
