"""Weight SVD on matrices: the best of its rank in output error, at every rank."""

import numpy as np
import pytest

from onnxq.model import load
from onnxq.pass_manager import PassManager
from onnxq.passes import WeightSVD
from onnxq.runtime import Session
from tests.models import parse


def data(rng, count=30):
    """Rows that lie mostly along a few directions, about a mean."""
    spread = rng.normal(size=(12, 12)) * np.exp(-np.arange(12) / 3)
    rows = rng.normal(size=(count, 40, 12)) @ spread.T + rng.normal(size=12)
    return [{"x": r.astype(np.float32)} for r in rows]


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("node", ["Gemm(x, w, b)", "MatMul(x, w)"])
def test_one_layer_is_as_near_as_a_rank_can_be(node, rank):
    proto = parse(f"g (float[M,12] x) => (float[] y) <float[12,9] w, float[9] b> {{ y = {node} }}")
    feeds = data(np.random.default_rng(0))
    model = load(proto)
    ratio = rank * 21 / 108
    small, _ = PassManager(WeightSVD(ratio=ratio, multiple=1))(model, feeds)
    assert [layer.weight.shape for layer in small.layers()] == [(12, rank), (rank, 9)]
    wanted, got = (
        np.concatenate([Session(m.to_proto()).run(f)["y"] for f in feeds]) for m in (model, small)
    )
    centre = wanted.mean(0) if node.startswith("Gemm") else 0.0  # a bias takes the mean
    powers = np.linalg.svd(wanted.astype(np.float64) - centre, compute_uv=False) ** 2
    assert np.sum((wanted - got) ** 2) == pytest.approx(powers[rank:].sum(), rel=0.01)


def test_convolutions_of_one_axis():
    text = (
        "g (float[N,6,40] x) => (float[] y) <float[10,6,5] w, float[10] b>"
        "{ y = Conv <strides = [2], pads = [2, 2]> (x, w, b) }"
    )
    rng = np.random.default_rng(1)
    waves = np.cumsum(rng.normal(size=(30, 1, 6, 40)), 3).astype(np.float32)
    feeds = [{"x": w} for w in waves]
    model = load(parse(text))
    found = {}
    for reconstruct in ("none", "all"):
        step = WeightSVD(ratio=0.4, multiple=1, reconstruct=reconstruct)
        small, _ = PassManager(step)(model, feeds)
        assert [layer.weight.shape for layer in small.layers()] == [(3, 6, 5), (10, 3, 1)]
        pair = [Session(m.to_proto()) for m in (model, small)]
        runs = [[s.run(f)["y"] for s in pair] for f in feeds]
        found[reconstruct] = sum(float(np.square(a - b).sum()) for a, b in runs)
    assert found["all"] < 0.5 * found["none"]
