import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from onnxq import runtime
from onnxq.errors import CalibrationError, ModelError
from onnxq.runtime import Session, cores, versions
from onnxq.signature import TensorSpec

CHAIN = """
chain (float[N,4] x) => (float[N,4] y) <float[1] half = {0.5}> {
    double = Add(x, x)
    clipped = Relu(double)
    y = Mul(clipped, half)
}
"""


def parsed(text):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')


def model(text=CHAIN):
    return parsed(text).SerializeToString()


X = np.float32([[1, -2, 3, -4]])


def test_run():
    session = Session(model(), threads=1)
    assert session.inputs == [TensorSpec("x", np.dtype("float32"), ("N", 4))]
    assert session.outputs == [TensorSpec("y", np.dtype("float32"), ("N", 4))]
    out = session.run({"x": X})
    assert list(out) == ["y"]
    np.testing.assert_array_equal(out["y"], np.maximum(X, 0))
    assert out["y"].flags.owndata
    assert out["y"].flags.writeable


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_any_tensor_can_be_fetched(level):
    session = Session(model(), outputs=["double", "y", "clipped"], threads=1, level=level)
    assert [spec.name for spec in session.outputs] == ["double", "y", "clipped"]
    assert session.outputs[0].dtype == np.float32
    out = session.run({"x": X})
    np.testing.assert_array_equal(out["double"], 2 * X)
    np.testing.assert_array_equal(out["clipped"], np.maximum(2 * X, 0))
    np.testing.assert_array_equal(out["y"], np.maximum(X, 0))


def test_outputs_can_be_fewer():
    two = model("g (float[4] x) => (float[4] y, float[4] z) { y = Neg(x) z = Abs(x) }")
    session = Session(two, outputs=["z", "z"], threads=1)
    assert list(session.run({"x": X[0]})) == ["z"]


def test_shared_arrays_outlive_their_session():
    session = Session(model(), outputs=["double", "y"], threads=1)
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    out = session.run_shared({"x": x})
    for _ in range(5):  # may reuse memory, but not that of living arrays
        session.run_shared({"x": x + 1})
    del session
    gc.collect()
    np.testing.assert_array_equal(out["double"], 2 * x)


def test_runs_may_overlap():
    session = Session(model(), threads=1)

    def run(i):
        return session.run({"x": np.full((100, 4), i, np.float32)})["y"].max()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(50))) == list(range(50))


def test_path_and_optimized_model(tmp_path):
    source, optimized = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(model())
    session = Session(
        source, optimized_path=optimized, config={"session.load_model_format": "ONNX"}
    )
    np.testing.assert_array_equal(session.run({"x": X})["y"], np.maximum(X, 0))
    assert onnx.load(optimized).graph.node
    assert Session(str(source), outputs=["double"]).run({"x": X})["double"][0, 0] == 2


def test_tensors_beside_external_data(tmp_path):
    proto = parsed(CHAIN)
    proto.graph.initializer[0].raw_data = np.float32([0.5]).tobytes()
    proto.graph.initializer[0].ClearField("float_data")
    external_data_helper.convert_model_to_external_data(proto, location="w.bin", size_threshold=0)
    onnx.save(proto, tmp_path / "in.onnx")
    assert (tmp_path / "w.bin").exists()
    session = Session(tmp_path / "in.onnx", outputs=["y", "double"])
    np.testing.assert_array_equal(session.run({"x": X})["y"], np.maximum(X, 0))


@pytest.mark.parametrize("limit", [0, 1 << 31])
def test_models_that_are_not_serialized(monkeypatch, limit):
    monkeypatch.setattr(runtime, "TWO_GB", limit)  # above it, by way of a file
    proto = parsed(CHAIN)
    weight = np.arange(4, dtype=np.float32).repeat(500).reshape(4, 500)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.node.add(op_type="MatMul", input=["y", "w"], output=["z"])
    session = Session(proto, outputs=["double", "z"], threads=1)
    np.testing.assert_array_equal(session.run({"x": X})["z"], np.maximum(X, 0) @ weight)
    np.testing.assert_array_equal(numpy_helper.to_array(proto.graph.initializer[1]), weight)


def test_types():
    text = """
    types (float[N] x, int64[1] k) => (bool[N] b, float16[N] h, int64[1] s, bfloat16[N] f) {
        b = IsNaN(x)
        h = Cast<to=10>(x)
        s = Shape(x)
        f = Cast<to=16>(x)
    }
    """
    session = Session(model(text), outputs=["b", "h", "s"])
    assert [spec.dtype for spec in session.outputs] == [np.bool_, np.float16, np.int64]
    assert [spec.dtype for spec in session.inputs] == [np.float32, np.int64]
    assert Session(model(text)).outputs[3].dtype is None


def test_sequences_are_left_out():
    text = """
    sequences (float[a] x) => (float[a] y, seq(float[a]) z) {
        y = Neg(x)
        z = SequenceConstruct(x, y)
    }
    """
    session = Session(model(text))
    assert str(session.outputs[1]) == "z: ?, any shape"
    assert list(session.run({"x": X[0]})) == ["y"]


def test_unknown_axes():
    proto = parsed(CHAIN)
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    assert Session(proto.SerializeToString()).inputs[0].shape == (None, 4)


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("data", [b"", b"abc", model()[:-30]])
def test_broken_models(data, tmp_path):
    with pytest.raises(ModelError, match="cannot load the model"):
        Session(data)
    file = tmp_path / "broken.onnx"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"cannot load the model.*broken\.onnx.*onnx\.checker"):
        Session(file, outputs=["y"])


def test_missing_model(tmp_path):
    with pytest.raises(ModelError, match=r"no such model.*none\.onnx"):
        Session(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="no such model"):
        Session(tmp_path, outputs=["y"])


def test_unknown_operator():
    with pytest.raises(ModelError, match="No Op registered for Foo") as error:
        Session(model("g (float[4] x) => (float[4] y) { y = Foo(x) }"))
    assert "\n" not in str(error.value)
    assert "ONNXRuntimeError" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "fix"), [("clippd", "did you mean 'clipped'"), ("qqq", "a node's output")]
)
def test_unknown_output(name, fix):
    with pytest.raises(ModelError, match=f"no node puts out a tensor '{name}'; .*{fix}"):
        Session(model(), outputs=[name])


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, r"no array for input 'x' \(nothing\); feed x: float32 \[N x 4\]"),
        ({"y": X}, r"no array for input 'x' \('y'\)"),
        ({"x": X, "z": X}, r"no input 'z'; feed x"),
        ({"x": X.astype(np.float64)}, r"does not fit the input \(x: float64 \[1 x 4\]\); feed"),
        ({"x": X[0]}, r"does not fit the input \(x: float32 \[4\]\)"),
        ({"x": X[:, :3]}, r"does not fit the input \(x: float32 \[1 x 3\]\)"),
    ],
)
def test_feeds_that_do_not_fit(feed, message):
    session = Session(model())
    for run in (session.run, session.run_shared):
        with pytest.raises(CalibrationError, match=message):
            run(feed)


def test_models_that_fail():
    reshape = model("g (float[N] x, int64[1] s) => (float[M] y) { y = Reshape(x, s) }")
    session = Session(reshape)
    with pytest.raises(ModelError, match=r"the model failed: .*Reshape") as error:
        session.run({"x": X[0], "s": np.array([3])})
    assert "/" not in str(error.value).split("Reshape")[0]


# ------------------------------------------------------------------ the machine


def test_cores_and_versions(monkeypatch):
    assert cores() >= 1
    assert set(versions()) == {
        *("python", "numpy", "numba", "onnx", "onnx-graphsurgeon", "onnxruntime")
    }
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert cores() >= 1


def test_helper_models_are_valid():
    onnx.checker.check_model(parsed(CHAIN), full_check=True)
    assert helper.np_dtype_to_tensor_dtype(np.dtype("float32")) == TensorProto.FLOAT
