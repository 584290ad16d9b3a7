"""Encodings from a file take the place of calibration."""

import numpy as np
import pytest

from onnxq import encodings_json
from onnxq.encoding import Encoding
from onnxq.errors import OnnxqError, RecipeError
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, InsertQDQ, LoadEncodings
from tests import models
from tests.checks import run
from tests.models import parse

TEXT = (
    "g (float[N,3,16,16] x) => (float[] y) <float[4,3,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)


@pytest.fixture
def saved(tmp_path):
    proto = parse(TEXT)
    model = load(proto)
    Calibrate().apply(model, Context([models.feeds(proto, seed=s) for s in range(4)]))
    path = tmp_path / "e.json"
    encodings_json.save(model.encodings, path)
    return proto, model, path


def test_the_round_trip_is_exact(saved):
    proto, model, path = saved
    other = load(proto)
    changes = LoadEncodings(path=str(path)).apply(other, Context())
    assert changes
    assert dict(other.encodings) == dict(model.encodings)
    assert other.encodings.float_nodes == model.encodings.float_nodes


def test_the_quantized_model_is_the_same(saved):
    proto, model, path = saved
    ctx = Context()
    InsertQDQ().apply(model, ctx)
    other, _ = PassManager(LoadEncodings(path=str(path)), InsertQDQ())(proto)
    feed = models.feeds(proto, seed=9)
    np.testing.assert_array_equal(run(other, feed)["y"], run(model, feed)["y"])


@pytest.mark.parametrize(
    "text",
    [
        "{ y = Gemm(x, w) z = Gemm<transB=1>(x, w) }",
        "{ y = MatMul(x, w) m = Mul(x, w) t = MaxPool<kernel_shape=[1]>(m) z = MatMul(t, v) }",
        "{ m = Mul(x, w) t = MaxPool<kernel_shape=[1]>(m) z = MatMul(t, w) y = Neg(x) }",
    ],
)
def test_copies_of_shared_constants_are_made_again(text, tmp_path):
    shape = "N,6" if "Gemm" in text else "2,6,6"
    head = f"g (float[{shape}] x) => (float[] y, float[] z) <float[6,6] w, float[6,6] v>"
    proto = parse(f"{head} {text}", w=np.random.default_rng(0).uniform(1, 2, (6, 6)))
    model = load(proto)
    Calibrate().apply(model, Context([models.feeds(proto, seed=s) for s in range(4)]))
    assert any("." in name for name in model.encodings)
    encodings_json.save(model.encodings, tmp_path / "e.json")
    other = load(proto)
    LoadEncodings(path=str(tmp_path / "e.json")).apply(other, Context())
    other.check()
    feed = models.feeds(proto, seed=9)
    for each in (model, other):
        InsertQDQ().apply(each, Context())
    wanted, got = run(model, feed), run(other, feed)
    for name in ("y", "z"):
        np.testing.assert_array_equal(got[name], wanted[name])


def test_older_operator_sets_are_raised(saved):
    _, _, path = saved
    model = load(parse(TEXT, opset=11))
    LoadEncodings(path=str(path)).apply(model, Context())
    assert model.opset == 13
    assert "x" in model.encodings


@pytest.mark.parametrize(
    ("old", "new", "hint"), [("x", "xx", "did you mean x"), ("x", "none_such_1234", "this model")]
)
def test_names_that_the_model_does_not_have(saved, old, new, hint):
    proto, model, path = saved
    model.encodings[new] = model.encodings[old]
    encodings_json.save(model.encodings, path)
    with pytest.raises(RecipeError, match=hint):
        LoadEncodings(path=str(path)).apply(load(proto), Context())


def test_nodes_that_the_model_does_not_have(saved):
    proto, model, path = saved
    model.encodings.float_nodes["Conv_9"] = "excluded"
    encodings_json.save(model.encodings, path)
    with pytest.raises(RecipeError, match=r"no node 'Conv_9'.*did you mean Conv_"):
        LoadEncodings(path=str(path)).apply(load(proto), Context())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"activation_encodings": 3}'])
def test_broken_files(saved, content):
    proto, _, path = saved
    path.write_bytes(content)
    with pytest.raises(OnnxqError):
        LoadEncodings(path=str(path)).apply(load(proto), Context())


def test_a_missing_file(tmp_path):
    with pytest.raises(OnnxqError, match=r"none\.json"):
        LoadEncodings(path=str(tmp_path / "none.json")).apply(load(parse(TEXT)), Context())


def test_excluded_nodes_stay_in_float(saved):
    proto, _, path = saved
    model = load(proto)
    last = [n.name for n in model.graph.nodes][-1]
    changes = LoadEncodings(path=str(path), exclude=(last,)).apply(model, Context())
    assert model.encodings.float_nodes[last] == "excluded"
    assert changes
    InsertQDQ().apply(model, Context())
    assert sum(layer.weight_encoding is not None for layer in model.layers()) == 0
    assert [n.op for n in model.graph.nodes if n.name == last] == ["Conv"]
    assert len(model.layers()) == 1  # its weight is a constant still, the other's is not


def test_what_the_file_leaves_out_may_keep_what_it_has(saved):
    proto, wanted, path = saved
    text = path.read_text()
    rest = load(proto)
    Calibrate(method="minmax").apply(rest, Context([models.feeds(proto, seed=s) for s in range(4)]))
    before = dict(rest.encodings)
    kept = encodings_json.loads(text)
    for name in [*kept][::2]:
        del kept[name]
    encodings_json.save(kept, path)
    LoadEncodings(path=str(path), missing="keep").apply(rest, Context())
    assert rest.encodings.keys() == wanted.encodings.keys()
    for name, encoding in rest.encodings.items():
        assert encoding == (kept if name in kept else before)[name]


def test_scales_at_which_a_bias_overflows_are_raised(saved):
    proto, model, path = saved
    tiny = Encoding("int8", np.full(4, 1e-9, np.float32), np.zeros(4, np.int32), 0)
    model.encodings["w"] = tiny
    encodings_json.save(model.encodings, path)
    other = load(proto)
    changes = LoadEncodings(path=str(path)).apply(other, Context())
    bias, x = other.layers()[0].bias, float(other.encodings["x"].scale)
    scale = other.encodings["w"].scale
    assert np.all(np.abs(bias) / (scale * x) <= 2.0**30)
    assert np.all(scale >= 1e-9)
    assert any("bias overflows" in skip.why for skip in changes.skipped)


@pytest.mark.parametrize("version", encodings_json.OLD)
def test_older_versions_take_their_axes_from_the_model(saved, version):
    proto, model, path = saved
    encodings_json.save(model.encodings, path, version, {"w", "v"})
    other = load(proto)
    LoadEncodings(path=str(path)).apply(other, Context())
    assert dict(other.encodings) == dict(model.encodings)
    assert other.encodings.float_nodes == model.encodings.float_nodes
