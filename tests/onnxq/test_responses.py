"""What layers are to put out once others have changed: fitted as plain least squares would."""

import numpy as np
import pytest

from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.patches import rows_of
from onnxq.responses import Responses
from onnxq.runtime import Session
from tests.models import parse

TEXT = (
    "g (float[N,4,6,6] x) => (float[] z) <float[4,4,3,3] a, float[4,4,1,1] b, float[5,4,1,1] c,"
    "float[4] d, float[5] e> {"
    "  u = Conv <pads = [1, 1, 1, 1]> (x, a) v = Relu(u) w = Conv(v, b, d)"
    "  s = Add(w, u) r = Relu(s) z = Conv(r, c, e) }"
)


def samples(count=40, size=6):
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(1, 4, size, size)).astype(np.float32)} for _ in range(count)]


def responses(model, data, layers=None):
    return Responses(
        model,
        model.layers() if layers is None else layers,
        Context(data),
        rng=lambda index: np.random.default_rng(index),
        sequential=True,
        samples=0,
        patches=1 << 20,
        memory_mb=256,
    )


def values(model, data, *names):
    session = Session(model.to_proto([*names]), outputs=[*names])
    runs = [session.run(feed) for feed in data]
    return [
        np.concatenate([np.moveaxis(r[n], 1, -1).reshape(-1, r[n].shape[1]) for r in runs])
        for n in names
    ]


def test_nothing_changed_nothing_changes():
    model = load(parse(TEXT))
    before, data = model.clone(), samples()
    found = responses(model, data)
    for layer in model.layers():
        response = found.response(layer)
        np.testing.assert_allclose(response.solution(), rows_of(layer), atol=1e-4)
        response.settle(response.solution())
        found.settle(layer)
    for wanted, got in zip(values(before, data, "z"), values(model, data, "z"), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_a_layer_makes_up_for_the_branch_that_it_is_added_to():
    """The first layer gives less than it did; the second one is fitted to the sum that was."""
    model = load(parse(TEXT))
    before, data = model.clone(), samples()
    first, second, _ = model.layers()
    found = responses(model, data)
    found.response(first)
    first.set_weight(np.float32(0.6) * first.weight)
    found.settle(first)

    (total,) = values(before, data, "s")
    branch, x = values(model, data, "u", "v")
    target = total - branch
    with_one = np.column_stack([x, np.ones(len(x))])
    best = np.linalg.lstsq(with_one, target, rcond=None)[0]
    response = found.response(second)
    rows = response.solution()
    np.testing.assert_allclose(rows[0], best[:-1].T, atol=0.1)  # drawn towards the float weight
    response.settle(rows)
    found.settle(second)

    (made,) = values(model, data, "s")
    np.testing.assert_allclose(made.mean(0), total.mean(0), atol=1e-3)
    residual = np.mean((made - total) ** 2)
    assert residual <= 1.02 * np.mean((with_one @ best - target) ** 2)
    alone = np.linalg.lstsq(with_one, values(before, data, "w")[0], rcond=None)[0]
    assert residual < 0.9 * np.mean((with_one @ alone - target) ** 2)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("w = Conv(x, b) t = Conv(x, c) z = Add(w, t)", (("w", None), ("z", "w"))),
        ("w = Conv(x, b) t = Relu(w) z = Add(w, t) u = Conv(t, c)", (("w", None), ("u", None))),
        ("w = Conv(x, b) v = Conv(w, c) z = Add(v, w)", (("w", None), ("z", "w"))),
        ("w = Conv(x, b) v = Conv(w, c) t = Relu(v) z = Add(t, w)", (("w", None), ("v", None))),
        ("w = Conv(x, b) z = Add(w, d) v = Conv(z, c)", (("w", None), ("v", None))),
        (
            "m = GlobalAveragePool(x) w = Conv(m, b) z = Add(w, x) v = Conv(z, c)",
            (("w", None), ("v", None)),  # the sum is wider than what the layer puts out
        ),
    ],
)
def test_what_layers_are_to_put_out(body, wanted):
    text = (
        "g (float[N,4,6,6] x) => (float[] z) <float[4,4,1,1] b, float[4,4,1,1] c,"
        f"float[4,1,1] d> {{ {body} }}"
    )
    model = load(parse(text))
    found = responses(model, samples(2))
    for layer, pair in zip(model.layers(), wanted, strict=True):
        found.reach(layer)
        assert found._wanted(layer) == pair


@pytest.mark.parametrize(
    ("node", "weight"),
    [
        ("Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b)", "6,4"),
        ("Gemm <alpha = 2.0> (x, w)", "4,6"),
        ("MatMul(x, w)", "4,6"),
    ],
)
def test_matrices(node, weight):
    model = load(
        parse(f"g (float[N,4] x) => (float[] y) <float[{weight}] w, float[6] b> {{ y = {node} }}")
    )
    rng = np.random.default_rng(2)
    data = [{"x": rng.normal(1.0, size=(30, 4)).astype(np.float32)} for _ in range(4)]
    (wanted,) = (np.concatenate([Session(model.to_proto()).run(f)["y"] for f in data]),)
    found = responses(model, data)
    response = found.response(model.layers()[0])
    response.settle(response.solution())
    got = np.concatenate([Session(model.to_proto()).run(f)["y"] for f in data])
    np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_groups_are_fitted_apart():
    model = load(
        parse(
            "g (float[N,4,6,6] x) => (float[] z) <float[4,1,3,3] a, float[6,2,3,3] b>"
            "{ u = Conv <group = 4> (x, a) z = Conv <group = 2> (u, b) }"
        )
    )
    data = samples(20)
    (wanted,) = values(model, data, "z")
    found = responses(model, data)
    first, second = model.layers()
    first.set_weight(1.5 * first.weight)  # the second one can make up for it
    found.settle(first)
    response = found.response(second)
    rows = response.solution()
    assert rows.shape == (2, 3, 18)
    np.testing.assert_allclose(rows, rows_of(second) / 1.5, atol=1e-2)
    response.settle(rows)
    (got,) = values(model, data, "z")
    assert np.mean((got - wanted) ** 2) < 1e-4 * np.mean(wanted**2)


def test_cross_moments_with_something_else_than_patches():
    model = load(parse(TEXT))
    layer = model.layers()[0]
    data = samples(3)
    found = responses(model, data).response(layer).statistics
    x, u = [], []
    for feed in data:
        padded = np.pad(feed["x"][0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        x.append(windows.transpose(1, 2, 0, 3, 4).reshape(36, -1))
        u.append(x[-1] @ rows_of(layer)[0].T)
    x, u = np.concatenate(x), np.concatenate(u)
    np.testing.assert_allclose(found.reference_mean[0], u.mean(0), atol=1e-5)
    wanted = (u - u.mean(0)).T @ (x - x.mean(0)) / len(x)
    np.testing.assert_allclose(found.cross_covariance[0], wanted, atol=1e-4)
