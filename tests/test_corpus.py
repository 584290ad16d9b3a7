"""A sample of the corpus; `python benchmarks/corpus.py` takes all of it."""

import tempfile
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus import graphs
from tests.corpus.cases import Case, corpus, named
from tests.corpus.verdict import FAILURES, VERBS, Verdict, judge

NAMES = [oddity.__name__ for oddity in graphs.ODDITIES]
FINISHES = [finish.__name__ for finish in graphs.FINISHES]
# Files and operators of the onnx package: old operator sets, sequences, text, nothing to feed.
SHIPPED = (
    *("onnx/pytorch-converted/test_Conv2d_depthwise", "onnx/pytorch-converted/test_Linear"),
    *("onnx/pytorch-operator/test_operator_addmm", "onnx/simple/test_sequence_model1"),
    "onnx/simple/test_strnorm_model_monday_casesensintive_lower",
)


def sound(case, verb):
    with tempfile.TemporaryDirectory() as folder:
        verdict = judge(case, verb, Path(folder))
    assert not verdict.failed, f"{verdict.outcome}: {verdict.why}\n{verdict.detail}"
    return verdict


def case_of(proto):
    return Case("graph", lambda: proto, bound_db=graphs.BOUND_DB)


@pytest.mark.parametrize("name", NAMES + FINISHES)
def test_each_oddity(name):
    seed = zlib.crc32(name.encode()) % 1000
    verdict = sound(
        case_of(graphs.graph(seed, opset=17, dtype=np.float32, odd=(name,), free=False)), "quantize"
    )
    assert verdict.outcome in ("quantized", "nothing to quantize", "refused")


@pytest.mark.parametrize("opset", graphs.OPSETS)
def test_each_operator_set(opset):
    verb = (*VERBS,)[opset % len(VERBS)]
    odd = ("movement", "upsampling")
    proto = graphs.graph(opset, opset=opset, dtype=np.float32, odd=odd, free=False)
    verdict = sound(case_of(proto), verb)
    assert verdict.outcome in ("quantized", "compressed", "told")


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("verb", VERBS)
def test_shipped_models(name, verb):
    sound(named(name), verb)


@settings(max_examples=8)
@given(
    st.integers(0, 2**20),
    st.sampled_from(graphs.OPSETS),
    st.lists(st.sampled_from(NAMES + FINISHES), max_size=4, unique=True),
    st.sampled_from([*VERBS]),
)
def test_any_graph(seed, opset, odd, verb):
    sound(case_of(graphs.graph(seed, opset=opset, odd=tuple(odd), free=False)), verb)


# ---------------------------------------------------------------------- the judge


def test_every_case_can_be_made_again_by_its_name():
    cases = [c for c in corpus(count=2) if c.name.startswith(("graph/", "onnx/"))]
    assert len(cases) > 100
    for case in (cases[0], cases[1], cases[-1]):
        assert named(case.name).make() == case.make()


def test_graphs_depend_on_the_seed_alone():
    assert graphs.graph(3) == graphs.graph(3)
    assert graphs.graph(3) != graphs.graph(4)


def test_most_graphs_are_valid_and_most_have_layers():
    valid = layers = 0
    for seed in range(30):
        proto = graphs.graph(seed)
        layers += any(n.op_type in ("Conv", "MatMul", "Gemm") for n in proto.graph.node)
        try:
            onnx.checker.check_model(proto)
        except onnx.checker.ValidationError:
            continue
        valid += 1
    assert valid >= 15
    assert layers == 30


def broken(monkeypatch, change):
    """The verdict on a verb that writes what `change` makes of the model, or does otherwise."""

    def verb(source, destination, reference):
        def written(given, where, **_):
            proto = onnx.load(given)
            change(proto, Path(given))
            onnx.save(proto, where)

        from tests.corpus import verdict

        return verdict._written(written, source, destination, reference, "quantized")

    monkeypatch.setitem(VERBS, "broken", verb)
    with tempfile.TemporaryDirectory() as folder:
        return judge(
            case_of(graphs.graph(5, opset=17, dtype=np.float32, odd=())), "broken", Path(folder)
        )


def test_the_judge_sees_what_is_wrong(monkeypatch):
    def weights(proto, _):
        for tensor in proto.graph.initializer:
            if len(tensor.dims) == 4:
                array = onnx.numpy_helper.to_array(tensor) * 1.5
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    def inputs(proto, given):
        given.write_bytes(given.read_bytes() + b"\n")

    def names(proto, _):
        proto.graph.node[0].input[0] = "nothing"

    def raises(proto, _):
        raise IndexError("out of reach")

    assert broken(monkeypatch, lambda *_: None) == Verdict("nothing to quantize")
    assert broken(monkeypatch, weights).outcome == "diverging"
    assert broken(monkeypatch, inputs).outcome == "changed"
    assert broken(monkeypatch, names).outcome == "invalid"
    assert broken(monkeypatch, raises).outcome == "traceback"
    assert {"diverging", "changed", "invalid", "traceback"} <= set(FAILURES)
