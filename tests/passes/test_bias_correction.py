"""Bias correction: means of outputs are those of the float weights."""

import numpy as np
import pytest

import onnxq
from onnxq.encoding import Encoding
from onnxq.errors import CalibrationError
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import GPTQ, BiasCorrection, Calibrate, Clean, FoldBatchNorm
from tests.checks import reasons
from tests.models import parse, zoo, zoo_samples
from tests.passes.test_gptq import LAYERS, coarse, differences, nearest, samples

BIASED = [n for n in LAYERS if n != "matmul"]


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
@pytest.mark.parametrize("name", BIASED)
def test_means_are_restored(name, weights):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data, weights=weights)
    before = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert BiasCorrection(limit=0).apply(model, ctx)
    after = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert before > 1e-2
    assert after < 1e-3 * before


def test_weights_are_left_alone():
    proto = parse(LAYERS["conv"])
    model, ctx = coarse(proto, samples(proto))
    before = model.layers()[0].weight.copy()
    BiasCorrection().apply(model, ctx)
    np.testing.assert_array_equal(model.layers()[0].weight, before)


def test_a_shared_bias_is_corrected_for_each_layer():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4] b, float[4,4,3,3] v>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, b) }"
    )
    proto = parse(text)
    model, ctx = coarse(proto, samples(proto))
    BiasCorrection().apply(model, ctx)
    one, two = (layer.bias for layer in model.layers())
    assert not np.array_equal(one, two)


def test_what_it_declines():
    proto = parse(LAYERS["matmul"])
    model, ctx = coarse(proto, samples(proto))
    changes = BiasCorrection().apply(model, ctx)
    assert not changes
    assert reasons(changes) == {"MatMul_0": "MatMul takes no bias"}


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,4,5,5] x) => (float[] y) <float[4,3,2,2] w> { y = ConvTranspose(x, w) }",
        "g (float[6,N] x) => (float[] y) <float[6,5] w> { y = Gemm<transA=1>(x, w) }",
        "g (float[6,N] x) => (float[] y) <float[5,6] w> { y = Gemm(w, x) }",
    ],
)
def test_layers_of_other_kinds_are_declined(text):
    model = load(parse(text))
    [layer] = model.layers()
    model.encodings["w"] = Encoding.symmetric(np.array(9.0), "int8")
    changes = BiasCorrection().apply(model, Context([]))
    assert not changes
    assert reasons(changes) == {layer.name: f"{layer.op} of this kind is not corrected"}
    assert layer.bias is None


@pytest.mark.parametrize("step", [BiasCorrection(limit=0), GPTQ(samples=0)])
def test_factors_of_a_gemm_count(step):
    proto = parse(
        "g (float[N,8] x) => (float[] y) <float[8,6] w, float[1,6] b>"
        "{ y = Gemm<alpha=0.5, beta=4.0>(x, w, b) }"
    )
    data = samples(proto)
    model = load(proto)
    model.encodings["w"] = Encoding.symmetric(np.array(40.0), "int8")
    before = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert step.apply(model, Context(data))
    after = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert before > 1e-2
    assert after < 1e-3 * before


def test_excluded_layers_are_left_alone():
    proto = parse(LAYERS["conv"])
    model, ctx = load(proto), Context(samples(proto))
    Calibrate(exclude=("Conv",)).apply(model, ctx)
    assert not BiasCorrection().apply(model, ctx)


def test_the_limit_limits():
    proto = parse(LAYERS["conv"])
    data = samples(proto)
    biases = []
    for limit in (1, 0):
        model, ctx = coarse(proto, data)
        BiasCorrection(limit=limit).apply(model, ctx)
        biases.append(model.layers()[0].bias)
    assert not np.array_equal(*biases)


# behind the identity k a normalization of exactly normal channels; then layers of every kind
NORMAL = (
    "g (float[N,4,9,9] x) => (float[] y) <float[4,4,1,1] w, float[4] gamma = {1, 0.5, -2, 0.1},"
    "float[4] beta = {0.3, 1, -1, 2}, float[4] mean = {0,0,0,0}, float[4] var = {1,1,1,1}, LAYER }"
)
READERS = {
    "conv": "float[6,4,3,3] v> { NORM r = Relu(n) y = Conv<pads=[1,1,2,0], strides=[2,1]>(r, v)",
    "depthwise": "float[4,1,3,3] v, float[4] d>"
    "{ NORM r = LeakyRelu(n) y = Conv<group=4, pads=[1,1,1,1]>(r, v, d)",
    "grouped": "float[6,2,3,3] v, float lo = {-0.5}, float hi = {1}>"
    "{ NORM r = Clip(n, lo, hi) y = Conv<group=2, dilations=[2,2]>(r, v)",
    "gemm": "float[324,5] v, float[5] d>"
    "{ NORM r = Relu(n) f = Flatten(r) y = Gemm<alpha=0.5, beta=2.0>(f, v, d)",
}
NORM = "k = Conv(x, w) n = BatchNormalization<epsilon=0.0>(k, gamma, beta, mean, var)"


def normal_model(name):
    """A folded model whose second layer is to be rounded coarsely, and samples of N(0, 1)."""
    text = NORMAL.replace("LAYER", READERS[name]).replace("NORM", NORM)
    model = load(parse(text, w=np.eye(4)[:, :, None, None]))
    FoldBatchNorm().apply(model, Context())
    layer = model.layers()[1]
    model.encodings[layer.weight_tensor.name] = Encoding.symmetric(np.array(40.0), "int8")
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(256, 4, 9, 9)).astype(np.float32)} for _ in range(8)]
    return model, data


def shifts(before, after):
    """What was added to each bias that there is."""
    return [
        b.bias - (0 if a.bias is None else a.bias * a.node.attrs.get("beta", 1.0))
        for a, b in zip(before.layers(), after.layers(), strict=True)
        if b.bias is not None
    ]


@pytest.mark.parametrize("name", READERS)
def test_normal_data_need_no_samples(name):
    model, data = normal_model(name)
    found = {}
    for method in ("empirical", "analytic"):
        other = model.clone()
        changes = BiasCorrection(method=method, limit=0).apply(other, Context(data))
        assert changes.done == ["1 biases corrected"]
        found[method] = shifts(model, other)[1]
    size = np.abs(found["empirical"]).max()
    assert size > 0.05
    assert np.abs(found["analytic"] - found["empirical"]).max() < 0.02 * size


def test_without_samples_auto_is_analytic():
    model, data = normal_model("conv")
    biases = []
    for step, samples_ in (
        (BiasCorrection(), None),
        (BiasCorrection(method="analytic"), data),
        (BiasCorrection(), data),
        (BiasCorrection(method="empirical"), data),
    ):
        other = model.clone()
        step.apply(other, Context(samples_))
        biases.append(other.layers()[1].bias)
    np.testing.assert_array_equal(biases[0], biases[1])
    np.testing.assert_array_equal(biases[2], biases[3])
    assert not np.array_equal(biases[1], biases[2])


def test_the_empirical_method_needs_samples():
    model, _ = normal_model("conv")
    with pytest.raises(CalibrationError, match="calibration samples"):
        BiasCorrection(method="empirical").apply(model, Context())


def test_inputs_of_which_nothing_is_known_are_declined():
    model, _ = normal_model("conv")
    first = model.layers()[0]
    model.encodings[first.weight_tensor.name] = Encoding.symmetric(np.array(40.0), "int8")
    before = first.bias.copy()
    changes = BiasCorrection(method="analytic").apply(model, Context())
    assert reasons(changes) == {first.name: "its input is not known: x is an input of the model"}
    np.testing.assert_array_equal(model.layers()[0].bias, before)
    assert model.layers()[1].bias is not None


def test_estimated_means_are_counted():
    proto = parse(
        NORMAL.replace(
            "LAYER",
            "float[6,4,3,3] v, float[5,6,1,1] u>"
            "{ NORM r = Relu(n) p = Conv(r, v) q = Relu(p) y = Conv(q, u)",
        ).replace("NORM", NORM),
        w=np.eye(4)[:, :, None, None],
    )
    model = load(proto)
    FoldBatchNorm().apply(model, Context())
    for layer in model.layers()[1:]:
        model.encodings[layer.weight_tensor.name] = Encoding.symmetric(np.array(40.0), "int8")
    changes = BiasCorrection().apply(model, Context())
    assert changes.done == ["2 biases corrected, 1 of them by estimated means"]


@pytest.mark.zoo
def test_analytic_corrections_of_a_real_network_are_those_of_samples(tmp_path):
    model = load(zoo("mobilenetv1_075"))
    data = onnxq.Calibration(zoo_samples("mobilenetv1_075", tmp_path, 32))
    ctx = Context(data)
    for step in (Clean(), FoldBatchNorm(), Calibrate(method="minmax")):
        step.apply(model, ctx)
    both = []
    for method in ("empirical", "analytic"):
        other = model.clone()
        BiasCorrection(method=method, limit=0).apply(other, ctx)
        both.append(shifts(model, other)[1:])  # of the first layer nothing is known
    left = [np.linalg.norm(a - e) / np.linalg.norm(e) for e, a in zip(*both, strict=True)]
    assert np.median(left) < 0.1
    # all but one: a channel that is alive by its statistics is zero on all of these pictures, and
    # the first depthwise layer reads it by a filter sixty times as large as the others
    assert sorted(left)[-2] < 0.4
