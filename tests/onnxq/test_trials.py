"""Trials of single layers against the whole model, run from the start."""

import pickle
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from onnx import helper, numpy_helper

from onnxq.analysis.error import compare
from onnxq.encoding import Encoding, Format
from onnxq.errors import CalibrationError, OnnxqError
from onnxq.formats import weight_encoding
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import Calibrate
from onnxq.runtime import Session
from onnxq.simulation import simulated
from onnxq.trials import Trial, all_but_one, one_at_a_time
from tests import models
from tests.models import parse

# a residual addition, a second output, a matrix
TEXT = (
    "g (float[N,3,8,8] x) => (float[] y, float[] early)"
    "<float[4,3,3,3] w, float[4] b, float[4,4,3,3] v, float[4,5] m>"
    "{ c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, v)"
    " s = Add(d, r) p = GlobalAveragePool(s) f = Flatten(p) y = MatMul(f, m) early = Relu(d) }"
)
COARSE = Encoding("int8", np.array(0.1, np.float32), np.array(0, np.int32))


@pytest.fixture
def model():
    return load(parse(TEXT))


@pytest.fixture
def feeds(model):
    return [models.feeds(model.to_proto(), seed=s) for s in range(3)]


def trials(model):
    return {
        layer.name: [
            Trial("weight", weight=encoded(layer)),
            Trial("input", activation=COARSE),
            Trial("both", encoded(layer), COARSE),
        ]
        for layer in model.layers()
    }


def encoded(layer):
    return weight_encoding(layer, layer.weight, Format.parse("int4/channel"), Format.parse("uint8"))


def changed(model, name, weight, activation):
    """The model with one layer rounded, as ONNX says it."""
    copy = model.clone()
    layer = next(x for x in copy.layers() if x.name == name)
    if weight is not None:
        layer.set_weight(weight.fake_quantize(layer.weight))
    proto = copy.to_proto()
    if activation is not None:
        node = next(n for n in proto.graph.node if n.name == name)
        index = [*proto.graph.node].index(node)
        grid = [
            numpy_helper.from_array(np.asarray(a), n)
            for a, n in ((activation.scale, "s/"), (np.int8(0), "z/"))
        ]
        proto.graph.initializer.extend(grid)
        pair = [
            helper.make_node("QuantizeLinear", [node.input[0], "s/", "z/"], ["q/"]),
            helper.make_node("DequantizeLinear", ["q/", "s/", "z/"], ["x/"]),
        ]
        node.input[0] = "x/"
        for new in reversed(pair):
            proto.graph.node.insert(index, new)
    return proto


def effect(reference, other, feeds):
    sessions = [Session(p, threads=1, level="disabled") for p in (reference, other)]
    errors = compare(*sessions, feeds)
    return sum(0 if e.sqnr_db >= 200 else 10 ** (-e.sqnr_db / 10) for e in errors) / len(errors)


def test_each_trial_is_the_whole_model_with_that_layer_rounded(model, feeds):
    found = one_at_a_time(model, trials(model), feeds, threads=2)
    assert [*found] == [layer.name for layer in model.layers()]
    for name, row in trials(model).items():
        for trial in row:
            other = changed(model, name, trial.weight, trial.activation)
            wanted = effect(model.to_proto(), other, feeds)
            np.testing.assert_allclose(found[name][trial.key].effect, wanted, rtol=1e-3)


def test_a_mean_corrects_the_bias(model, feeds):
    name = model.layers()[0].name
    given = {name: [Trial("weight", weight=encoded(model.layers()[0]))]}
    mean = np.full((1, 27), 0.5)
    found = one_at_a_time(model, given, feeds, means={name: mean})[name]["weight"]
    copy = model.clone()
    layer = copy.layers()[0]
    rounded = encoded(layer).fake_quantize(layer.weight)
    shift = (rounded - layer.weight).reshape(4, -1) @ mean[0]
    layer.set_bias((layer.bias - shift).astype(np.float32))
    layer.set_weight(rounded)
    wanted = effect(model.to_proto(), copy.to_proto(), feeds)
    np.testing.assert_allclose(found.effect, wanted, rtol=1e-3)


def test_the_metric_gets_the_outputs_of_each_sample_in_turn(model, feeds):
    plain = [Session(model.to_proto(), threads=1).run(f) for f in feeds]

    def distance(outputs):
        pairs = zip(outputs, plain, strict=True)
        return -sum(float(np.abs(a["y"] - b["y"]).sum()) for a, b in pairs)

    name = model.layers()[1].name
    given = {name: [Trial("nothing"), Trial("weight", weight=encoded(model.layers()[1]))]}
    found = one_at_a_time(model, given, feeds, metric=distance)[name]
    assert found["nothing"].effect < 1e-12
    assert abs(found["nothing"].metric) < 1e-3
    other = changed(model, name, encoded(model.layers()[1]), None)
    got = [Session(other, threads=1).run(f) for f in feeds]
    np.testing.assert_allclose(found["weight"].metric, distance(iter(got)), rtol=1e-3)


class Counting(ThreadPoolExecutor):
    """Counts what is submitted, and sends it as to another process."""

    def __init__(self):
        super().__init__(2)
        self.count = 0

    def submit(self, *args, **kwargs) -> Future:
        self.count += 1
        return super().submit(*pickle.loads(pickle.dumps(args)), **kwargs)


def test_any_executor_runs_the_layers(model, feeds):
    with Counting() as pool:
        found = one_at_a_time(model, trials(model), feeds, executor=pool)
    assert pool.count == 3
    assert found == one_at_a_time(model, trials(model), feeds, threads=1)


def test_finished_layers_are_taken_up_again(model, feeds, tmp_path):
    first = {k: v for k, v in trials(model).items() if k == model.layers()[0].name}
    whole = one_at_a_time(model, trials(model), feeds, resume=tmp_path)
    kept = sorted(tmp_path.rglob("*.json"))
    assert len(kept) == 3
    kept[1].unlink()
    with Counting() as pool:
        again = one_at_a_time(model, trials(model), feeds, resume=tmp_path, executor=pool)
    assert pool.count == 1
    assert again == whole
    with Counting() as pool:  # other trials are another matter
        one_at_a_time(model, first, feeds, resume=tmp_path, executor=pool)
    assert pool.count == 1
    kept[0].write_text("{")
    with pytest.raises(OnnxqError, match="delete it"):
        one_at_a_time(model, trials(model), feeds, resume=tmp_path)


def test_a_layer_left_in_float_among_quantized_ones(model, feeds):
    ctx = Context(feeds, threads=1)
    Calibrate().apply(model, ctx)
    names = [layer.name for layer in model.layers()]
    found = all_but_one(model, simulated(model, ctx.target), names, feeds)
    everything = effect(model.to_proto(), simulated(model, ctx.target).to_proto(), feeds)
    for layer in model.layers():
        copy = simulated(model, ctx.target)
        node = next(n for n in copy.graph.nodes if n.name == layer.name)
        proto = copy.to_proto()
        raw = node.inputs[0].inputs[0].inputs[0].inputs[0].inputs[0].name  # before its round trip
        twin = next(n for n in proto.graph.node if n.name == layer.name)
        twin.input[0] = raw
        for tensor in proto.graph.initializer:
            if tensor.name == layer.weight_tensor.name:
                tensor.CopyFrom(numpy_helper.from_array(layer.weight, tensor.name))
        wanted = effect(model.to_proto(), proto, feeds)
        np.testing.assert_allclose(found[layer.name].effect, wanted, rtol=0.02)
        assert found[layer.name].effect < 1.2 * everything


def test_infinities_that_a_format_makes_are_told():
    text = "g (float[N,3,4,4] x) => (float[] y) <float[4,3,1,1] w> { c = Conv(x, w) y = Log(c) }"
    model = load(parse(text, w=0.5))
    feeds = [{"x": np.ones((1, 3, 4, 4), np.float32)}]
    zero = Encoding("int8", np.array(100.0, np.float32), np.array(0, np.int32))
    name = model.layers()[0].name
    found = one_at_a_time(model, {name: [Trial("zero", zero), Trial("nothing")]}, feeds)[name]
    assert found["zero"].effect is None
    assert "NaN or infinite in one model" in found["zero"].note
    assert found["nothing"].effect == 0


def test_no_samples(model):
    with pytest.raises(CalibrationError, match="no samples"):
        one_at_a_time(model, trials(model), [])
