import os
import sys

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq import model_io
from onnxq.encoding import Encoding, limits
from onnxq.errors import ModelError, UnsupportedError
from onnxq.model import BatchNormStatistics, Model, load, rewire
from tests import models
from tests.checks import assert_same_function, ops, run

DENSE = "g (float[N,4] x) => (float[N,6] y) <float[4,6] w, float[6] b> { y = Gemm (x, w, b) }"
CONVS = """g (float[N,3,8,8] x) => (float[N,4,8,8] y)
<float[4,3,1,1] w, float[4,4,3,3] v, float[4] b> {
    [first] h = Conv (x, w, b)
    [act] r = Relu (h)
    [second] s = Conv <pads=[1,1,1,1]> (r, v, b)
    [sum] y = Add (s, h)
}"""
BRANCHES = """g (float[N,4] x, bool c) => (float[N,4] y) <float[4] w, float[4] v> {
    h = Mul (x, w)
    k = Neg (h)
    y = If (c) <
        then_branch = t () => (float[N,4] a) { a = Add (k, w) },
        else_branch = e () => (float[N,4] b) { i = Sub (h, v) j = Abs (i) b = Neg (i) }
    >
}"""


def save(proto, path):
    path.write_bytes(proto.SerializeToString())
    return path


def info(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def build(nodes, inputs, outputs, constants=(), *, opset=17, ir=8, **graph):
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, constants, **graph),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir,
    )


# ---------------------------------------------------------------------- what graphsurgeon drops


def test_round_trip_keeps_what_describes_the_model(tmp_path):
    proto = models.parse(CONVS)
    proto.doc_string, proto.domain, proto.model_version = "A model.", "org.example", 7
    proto.producer_name, proto.producer_version = "tests", "3"
    helper.set_model_props(proto, {"key": "value"})
    proto.graph.doc_string = "A graph."
    proto.graph.metadata_props.add(key="graph", value="too")
    proto.graph.node[1].doc_string = "A node."
    proto.graph.node[1].metadata_props.add(key="node", value="too")
    note = proto.graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    path = tmp_path / "out.onnx"
    load(save(proto, tmp_path / "in.onnx")).clone().save(path)
    after = onnx.load(path)
    for field in (
        *("doc_string", "domain", "model_version", "producer_name", "producer_version"),
        *("metadata_props", "ir_version", "opset_import"),
    ):
        assert getattr(after, field) == getattr(proto, field), field
    for field in ("doc_string", "metadata_props", "quantization_annotation", "name", "input"):
        assert getattr(after.graph, field) == getattr(proto.graph, field), field
    assert list(after.graph.node) == list(proto.graph.node)
    assert_same_function(proto, after)


def test_annotations_of_vanished_tensors_vanish():
    proto = models.parse(CONVS)
    proto.graph.quantization_annotation.add(tensor_name="r")
    model = load(proto)
    model.bypass(model.graph.nodes[1])
    assert not model.to_proto().graph.quantization_annotation


def test_metadata_is_set():
    model = load(models.parse(DENSE))
    model.set_metadata("onnxq.version", "1")
    assert model.metadata == {"onnxq.version": "1"}
    assert model.to_proto().metadata_props[0].key == "onnxq.version"


def test_initializers_that_are_inputs_stay_inputs():
    proto = models.parse(DENSE)
    proto.graph.input.append(info("w", [4, 6]))
    proto.graph.input.append(info("b", [6]))
    model = load(proto)
    assert model.inputs == ["x"]
    assert model.notes == ["taken as constants, because they have default values: w, b"]
    assert [i.name for i in model.to_proto().graph.input] == ["x", "w", "b"]
    [layer] = model.layers()
    layer.set_weight(layer.weight[:, :3])
    layer.set_bias(layer.bias[:3])
    assert [i.name for i in model.to_proto().graph.input] == ["x"]  # their shapes would be wrong


def test_inputs_that_only_old_files_need_are_dropped():
    proto = models.parse(DENSE, opset=8)
    proto.graph.input.append(info("w", [4, 6]))
    proto.graph.input.append(info("b", [6]))
    proto.ir_version = 3
    model = load(proto)
    assert not model.notes
    after = model.to_proto()
    assert after.ir_version >= 4
    assert [i.name for i in after.graph.input] == ["x"]
    assert_same_function(proto, after, feed={"x": np.ones((2, 4), np.float32)})


def test_packed_int4_survives(tmp_path):
    weight = helper.make_tensor("w", TensorProto.INT4, [4, 3], np.arange(-8, 4))
    scale = numpy_helper.from_array(np.float32(0.5), "s")
    proto = build(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        [info("x", ["N", 4])],
        [info("y", ["N", 3])],
        [weight, scale],
        opset=21,
        ir=10,
    )
    model = load(save(proto, tmp_path / "in.onnx"))
    np.testing.assert_array_equal(
        model.array(model.graph.nodes[0].inputs[0]).astype(int),
        np.arange(-8, 4).reshape(4, 3),
    )
    assert model.nbytes == 6 + 4
    model.clone().save(tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    assert after.graph.initializer[0] == weight
    assert_same_function(proto, after, levels=("disabled",))  # above, onnxruntime uses 8-bit sums


@pytest.mark.parametrize(
    ("dtype", "packed", "kind", "size"),
    [
        ("int2", True, TensorProto.INT4, 8),
        ("uint4", True, TensorProto.UINT4, 8),
        ("int4", False, TensorProto.INT8, 15),
        ("uint3", False, TensorProto.UINT8, 15),
        ("int8", True, TensorProto.INT8, 15),
    ],
)
def test_integer_constants(dtype, packed, kind, size):
    model = load(models.parse(DENSE))
    low, high = limits(dtype)
    values = np.resize(np.arange(low, high + 1), (3, 5))
    tensor = model.integers("w", values, dtype, packed=packed)
    assert tensor.name == "w_1"  # the model has a w
    np.testing.assert_array_equal(model.array(tensor).astype(int), values)
    model.graph.nodes[0].inputs[1] = tensor
    written = next(t for t in model.to_proto().graph.initializer if t.name == "w_1")
    assert (written.data_type, len(written.raw_data)) == (kind, size)
    np.testing.assert_array_equal(numpy_helper.to_array(written).astype(int), values)


def test_group_normalization_is_not_converted_wrongly():
    text = (
        "g (float[N,4,8] x) => (float[] y) <float[2] s, float[2] b>"
        "{ [norm] y = GroupNormalization<num_groups=2>(x, s, b) }"
    )
    model = load(models.parse(text, opset=18))
    with pytest.raises(ModelError, match="18 to 21: norm would need its scales per channel"):
        model.raise_opset(21)
    assert model.opset == 18
    model.raise_opset(20)
    assert model.opset == 20


def test_constant_nodes_become_constants():
    proto = build(
        [
            helper.make_node("Constant", [], ["two"], value_float=2.0),
            helper.make_node("Mul", ["x", "two"], ["h"]),
            helper.make_node("Constant", [], ["shape"], value_ints=[0, -1]),
            helper.make_node("Reshape", ["h", "shape"], ["r"]),
            helper.make_node(
                "Constant", [], ["w"], value=numpy_helper.from_array(np.eye(4, dtype=np.float32))
            ),
            helper.make_node("MatMul", ["r", "w"], ["y"]),
            helper.make_node("Constant", [], ["z"], value_floats=[1.0, 2.0]),
        ],
        [info("x", ["N", 4])],
        [info("y", ["N", 4]), info("z", [2])],
    )
    model = load(proto)
    assert ops(model) == ["Mul", "Reshape", "MatMul", "Constant"]  # an output needs its node
    assert [layer.op for layer in model.layers()] == ["MatMul"]
    assert_same_function(proto, model)


def test_sparse_weights_are_written_in_full():
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    proto = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [info("x", ["N", 4])],
        [info("y", ["N", 3])],
        sparse_initializer=[
            helper.make_sparse_tensor(
                values, numpy_helper.from_array(np.array([1, 5], np.int64), "i"), [4, 3]
            )
        ],
    )
    model = load(proto)
    np.testing.assert_array_equal(np.flatnonzero(model.layers()[0].weight), [1, 5])
    assert model.notes == ["sparse weight w is written in full"]
    assert_same_function(proto, model)


def test_attributes_that_would_be_lost_are_refused():
    values = numpy_helper.from_array(np.array([1, 2], np.float32))
    indices = numpy_helper.from_array(np.array([1, 5], np.int64))
    sparse = helper.make_sparse_tensor(values, indices, [6])
    proto = build(
        [
            helper.make_node("Constant", [], ["c"], value=None, sparse_value=sparse),
            helper.make_node("Add", ["x", "c"], ["y"]),
        ],
        [info("x", [6])],
        [info("y", [6])],
    )
    with pytest.raises(UnsupportedError, match="sparse_value of Constant"):
        load(proto)


def test_sequences_and_optionals_keep_their_type():
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["N", 4])
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [4]))
    optional = helper.make_value_info("o", kind)
    proto = build(
        [
            helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
            helper.make_node("Optional", ["x"], ["o"]),
            helper.make_node("Identity", ["s"], ["t"]),
            helper.make_node("ConcatFromSequence", ["t"], ["y"], axis=0),
        ],
        [info("x", [4])],
        [info("y", [8]), sequence, optional],
    )
    proto = onnx.shape_inference.infer_shapes(proto)
    after = load(proto).clone().to_proto()
    onnx.checker.check_model(after)
    assert list(after.graph.output) == list(proto.graph.output)


@pytest.mark.parametrize("node", ["", "ai.onnx"])
@pytest.mark.parametrize("model", ["", "ai.onnx"])
def test_both_names_of_the_standard_domain(node, model):
    proto = models.parse(CONVS)
    proto.opset_import[0].domain = model
    for n in proto.graph.node:
        n.domain = node
    loaded = load(proto)
    assert loaded.opset == 17
    assert len(loaded.layers()) == 2
    after = loaded.to_proto()
    assert [(o.domain, o.version) for o in after.opset_import] == [("", 17)]
    onnx.checker.check_model(after)
    assert_same_function(models.parse(CONVS), after)


def test_nodes_get_names_of_their_own():
    names = ["", "Relu_0", "", "Relu_0", "Relu_0_1"]
    nodes = [
        helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=n) for i, n in enumerate(names)
    ]
    model = load(build(nodes, [info("t0", [4])], [info("t5", [4])]))
    got = [n.name for n in model.graph.nodes]
    assert len(set(got)) == 5
    assert got[1] == "Relu_0"  # what the file calls so keeps the name
    assert got[4] == "Relu_0_1"
    assert model.notes == ["1 nodes shared their name with another and got a number"]


def test_files_without_operators_are_refused():
    with pytest.raises(ModelError, match="no operators"):
        load(onnx.ModelProto())


# ---------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.onnx", b"", "holds no ONNX graph"),
        ("a.onnx", b"this is not a model, it is text", "is not an ONNX model"),
        ("a.json", b"{", "is not an ONNX model"),
        ("a.textproto", b"ir_version", "is not an ONNX model"),
        ("a.onnx", models.parse(CONVS).SerializeToString()[:-30], "is not an ONNX model"),
    ],
)
def test_broken_files(tmp_path, name, content, why):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=why) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ModelError, match=r"no such file .*nowhere\.onnx"):
        load(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


def test_values_that_do_not_fit_their_shape():
    proto = models.parse(DENSE)
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    weight.raw_data = weight.raw_data[:-4]
    with pytest.raises(ModelError, match=r"do not fit its shape and type \(tensor w\)"):
        _ = load(proto).layers()[0].weight


# ---------------------------------------------------------------------- external data


def external(tmp_path, location="weights.bin", **keys):
    """A model whose weight lies in another file; `keys` overwrite what it says about it."""
    folder = tmp_path / "model"
    folder.mkdir()
    proto = models.parse(DENSE)
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    content = weight.raw_data
    onnx.external_data_helper.set_external_data(weight, location, 0, len(content))
    weight.ClearField("raw_data")
    for entry in weight.external_data:
        entry.value = str(keys.get(entry.key, entry.value))
    kept = [e for e in weight.external_data if keys.get(e.key, "") is not None]
    del weight.external_data[:]
    weight.external_data.extend(kept)
    return save(proto, folder / "a.onnx"), content


def test_external_data_beside_the_model(tmp_path):
    path, content = external(tmp_path)
    (path.parent / "weights.bin").write_bytes(content)
    model = load(path)
    assert_same_function(models.parse(DENSE), model)
    model.save(path)  # over itself: the weights move inside, their old file stays
    assert (path.parent / "weights.bin").read_bytes() == content
    assert_same_function(models.parse(DENSE), load(path))


def test_external_data_in_a_folder_below(tmp_path):
    path, content = external(tmp_path, "data/weights.bin")
    (path.parent / "data").mkdir()
    (path.parent / "data" / "weights.bin").write_bytes(content)
    assert_same_function(models.parse(DENSE), load(path))


@pytest.mark.parametrize("location", ["../secret.bin", "data/../../secret.bin", "ABSOLUTE", ""])
def test_external_data_outside_the_folder(tmp_path, location):
    secret = tmp_path / "secret.bin"
    location = str(secret) if location == "ABSOLUTE" else location
    path, content = external(tmp_path, location)
    secret.write_bytes(content)
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        load(path)


def test_external_data_behind_a_link(tmp_path):
    path, content = external(tmp_path)
    (tmp_path / "secret.bin").write_bytes(content)
    try:
        (path.parent / "weights.bin").symlink_to(tmp_path / "secret.bin")
    except OSError:
        pytest.skip("this system lets no one make links")
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        load(path)


def test_external_data_missing(tmp_path):
    path, _ = external(tmp_path)
    with pytest.raises(ModelError, match=r"weights\.bin is missing \(tensor w of"):
        load(path)


@pytest.mark.parametrize(
    "keys", [{}, {"length": None}, {"length": None, "offset": 90}, {"offset": "-4"}]
)
def test_external_data_cut_off(tmp_path, keys):
    path, content = external(tmp_path, **keys)
    (path.parent / "weights.bin").write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"weights\.bin is cut off"):
        load(path)


def test_external_data_without_sense(tmp_path):
    path, content = external(tmp_path, offset="here")
    (path.parent / "weights.bin").write_bytes(content)
    with pytest.raises(ModelError, match="no valid offset"):
        load(path)


def test_external_data_of_a_proto(tmp_path):
    path, content = external(tmp_path)
    (path.parent / "weights.bin").write_bytes(content)
    with pytest.raises(ModelError, match="must be inside it"):
        load(onnx.load(path, load_external_data=False))


def test_large_models_get_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(model_io, "TWO_GB", 100)
    proto = models.parse("g (float[N,40] x) => (float[N,40] y) <float[40,40] w> {y=MatMul(x,w)}")
    first = tmp_path / "a.onnx"
    load(proto).save(first)
    assert first.stat().st_size < 1000
    content = (tmp_path / "a.onnx.data").read_bytes()
    assert_same_function(proto, load(first))
    model = load(first)
    [layer] = model.layers()
    layer.set_weight(2 * layer.weight)
    model.save(first)  # over the input: its data must survive until nothing refers to it
    assert (tmp_path / "a.onnx.data").read_bytes() == content
    assert (tmp_path / "a.onnx.1.data").exists()
    np.testing.assert_array_equal(load(first).layers()[0].weight, layer.weight)


def test_large_weights_of_subgraphs_count(monkeypatch):
    proto = models.parse(BRANCHES)
    assert model_io.serialized_size(proto) == 2 * 16
    inner = numpy_helper.from_array(np.zeros(5, np.float32), "z")
    proto.graph.node[2].attribute[0].g.initializer.append(inner)
    assert model_io.serialized_size(proto) == 2 * 16 + 20


# ---------------------------------------------------------------------- saving


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ModelError, match="No space left on device"):
        load(models.parse(DENSE)).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no such permissions")
def test_a_folder_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(ModelError, match="cannot be written"):
        load(models.parse(DENSE)).save(tmp_path / "a.onnx")


def test_invalid_results_leave_the_old_file(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    model = load(models.parse(DENSE))
    model.graph.nodes[0].attrs["nonsense"] = 1
    with pytest.raises(ModelError, match="not valid ONNX: Unrecognized attribute"):
        model.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_bytes() == b"old"


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load(models.parse(DENSE)).save(tmp_path / "nowhere" / "a.onnx")


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "a.onnx").mkdir()
    with pytest.raises(ModelError, match="cannot be written"):
        load(models.parse(DENSE)).save(tmp_path / "a.onnx")


def test_saving_where_the_input_was(tmp_path):
    path = save(models.parse(DENSE), tmp_path / "a.onnx")
    model = load(path)
    path.write_text("something else has taken its place")
    model.save(path)
    assert_same_function(models.parse(DENSE), load(path))


def test_outputs_without_shape_are_inferred(tmp_path):
    proto = models.parse(DENSE)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    load(proto).save(tmp_path / "a.onnx")
    assert_same_function(proto, onnx.load(tmp_path / "a.onnx"))


# ---------------------------------------------------------------------- editing


def test_array_wants_a_constant():
    model = load(models.parse(DENSE))
    with pytest.raises(ModelError, match=r"expected a constant \(tensor x\)"):
        model.array(model.graph.inputs[0])


def test_bypass_of_the_last_operator_keeps_the_name_of_the_output():
    model = load(models.parse("g (float[4] x) => (float[4] y) { h = Abs (x) y = Identity (h) }"))
    model.batch_norms["h"] = BatchNormStatistics(np.ones(4), np.ones(4))
    node = model.graph.nodes[1]
    assert model.can_bypass(node)
    model.bypass(node)
    model.check()
    assert ops(model) == ["Abs"]
    assert model.outputs == ["y"]
    assert list(model.batch_norms) == ["y"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4] x) => (float[4] y) { y = Identity (x) }",
        "g (float[4] x) => (float[4] y, float[4] h) { h = Abs (x) y = Identity (h) }",
    ],
)
def test_bypass_that_would_rename_an_output(text):
    model = load(models.parse(text))
    assert not model.can_bypass(model.graph.nodes[-1])


def test_free_names():
    model = load(models.parse(BRANCHES))
    assert [model.free_name(n) for n in ("new", "new", "x", "i")] == ["new", "new_1", "x_1", "i_1"]


def test_insert_sorts():
    model = load(models.parse(CONVS))
    h = model.tensors()["h"]
    new = model.variable("h.scaled", shape=h.shape)
    relu = model.graph.nodes[1]
    relu.inputs[0] = new
    model.insert([gs.Node("Abs", "abs", inputs=[h], outputs=[new])])
    model.check()
    assert ops(model) == ["Conv", "Abs", "Relu", "Conv", "Add"]


def test_sort_is_stable():
    model = load(models.parse(CONVS))
    before = [n.name for n in model.graph.nodes]
    model.sort()
    assert [n.name for n in model.graph.nodes] == before
    model.graph.nodes.reverse()
    model.sort()
    model.check()


def test_sort_of_long_chains():
    count = 3000  # deeper than Python's stack
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    model = load(build(nodes, [info("t0", [4])], [info(f"t{count}", [4])]))
    before = [n.name for n in model.graph.nodes]
    model.graph.nodes.reverse()
    model.sort()
    assert [n.name for n in model.graph.nodes] == before


def test_sort_sees_what_subgraphs_read():
    model = load(models.parse(BRANCHES))
    model.graph.nodes.reverse()
    model.sort()
    assert ops(model) == ["Mul", "Neg", "If"]


def test_cycles():
    model = load(models.parse(CONVS))
    model.graph.nodes[0].inputs[0] = model.tensors()["y"]
    with pytest.raises(ModelError, match="cycle"):
        model.sort()
    with pytest.raises(ModelError, match="tensor y is read before anything produces it"):
        model.check()


def test_branches_that_look_the_same_are_told_apart():
    text = BRANCHES.replace("i = Sub (h, v) j = Abs (i) b = Neg (i)", "a = Add (k, w)")
    model = load(models.parse(text.replace("float[N,4] b", "float[N,4] a")))
    first, second = (b.nodes[0] for b in model.graph.nodes[2].attrs.values())
    k, h = model.tensors()["k"], model.tensors()["h"]
    rewire(second, k, h)
    assert [n is first for n in k.outputs] == [True]
    assert any(n is second for n in h.outputs)


# ---------------------------------------------------------------------- check


def test_check_finds_missing_tensors():
    model = load(models.parse(CONVS))
    model.graph.nodes[1].inputs[0] = gs.Variable("lost")
    with pytest.raises(ModelError, match="tensor lost is read before"):
        model.check()


def test_check_finds_missing_outputs():
    model = load(models.parse(CONVS))
    del model.graph.nodes[-1]
    with pytest.raises(ModelError, match=r"nothing produces the output \(y\)"):
        model.check()


@pytest.mark.parametrize("new", [gs.Variable("h"), gs.Constant("h", np.ones(4, np.float32))])
def test_check_finds_names_used_twice(new):
    model = load(models.parse(CONVS))
    if isinstance(new, gs.Variable):
        model.graph.nodes[1].outputs[0] = new
    else:
        model.graph.nodes[2].inputs[2] = new
    with pytest.raises(ModelError, match="two tensors are called h"):
        model.check()


def test_check_finds_nodes_of_one_name():
    model = load(models.parse(CONVS))
    model.graph.nodes[0].name = "second"
    with pytest.raises(ModelError, match="two nodes are called second"):
        model.check()


# ---------------------------------------------------------------------- clone, infer, opset


def test_clones_are_independent():
    proto = models.parse(CONVS)
    model = load(proto)
    before = model.to_proto().SerializeToString(deterministic=True)
    twin = model.clone()
    assert twin.to_proto().SerializeToString(deterministic=True) == before
    first, second = twin.layers()
    first.set_weight(2 * first.weight)
    second.set_bias(second.bias + 1)
    second.node.attrs["group"] = 1
    twin.bypass(twin.graph.nodes[1])
    twin.encodings["x"] = Encoding.of_range(-1, 1, "uint8")
    twin.encodings.float_nodes["first"] = "excluded"
    twin.batch_norms["h"] = BatchNormStatistics(np.ones(4), np.ones(4))
    twin.set_metadata("key", "value")
    twin.notes.append("note")
    twin.free_name("unused")
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert not model.encodings
    assert not model.encodings.float_nodes
    assert not model.batch_norms
    assert not model.notes
    assert model.free_name("unused") == "unused"


def test_load_copies():
    proto = models.parse(CONVS)
    before = proto.SerializeToString(deterministic=True)
    model = load(proto)
    assert load(model) is not model
    [first, _] = model.layers()
    first.set_weight(2 * first.weight)
    model.graph.nodes[0].name = "renamed"
    model.to_proto()
    assert proto.SerializeToString(deterministic=True) == before


def test_extra_outputs():
    model = load(models.parse(CONVS))
    outputs = run(model.to_proto(["h", "y"]), models.feeds(models.parse(CONVS)))
    assert list(outputs) == ["y", "h"]
    assert model.outputs == ["y"]


def test_infer():
    text = CONVS.replace("float[4,4,3,3] v", "float[4,4,3,3] v, int64[4] k")
    text = text.replace("(s, h)", "(s, u)").replace("[sum]", "u = Reshape (h, k) [sum]")
    model = load(models.parse(text, k=[-1, 4, 8, 8]))
    assert model.tensors()["r"].shape is None
    model.infer()
    assert model.tensors()["r"].shape == ["N", 4, 8, 8]
    assert model.tensors()["r"].dtype == np.float32
    assert model.tensors()["u"].shape[1:] == [4, 8, 8]
    assert len(model.layers()) == 2
    assert_same_function(models.parse(text, k=[-1, 4, 8, 8]), model)


def test_raise_opset():
    text = """g (float[N,4] x) => (float[N,4,1] y) <float[4] w> {
        [add] h = Add (x, w)
        [wide] y = Unsqueeze <axes=[2]> (h)
    }"""
    proto = models.parse(text, opset=11)
    proto.graph.node[0].doc_string = "An Add."
    model = load(proto)
    model.set_metadata("key", "value")
    model.encodings["h"] = Encoding.of_range(-1, 1, "uint8")
    taken = model.free_name("taken")
    model.raise_opset(13)
    assert model.opset == 13
    assert [n.name for n in model.graph.nodes] == ["add", "wide"]
    assert model.notes == ["operator set raised from 11 to 13"]
    assert "h" in model.encodings
    assert model.metadata == {"key": "value"}
    assert model.to_proto().graph.node[0].doc_string == "An Add."
    names = set(model.tensors())
    assert model.free_name(min(names - {"x", "w", "h", "y"})) not in names
    assert taken == "taken"
    assert_same_function(proto, model)
    model.raise_opset(12)
    assert model.opset == 13


def test_raise_opset_that_onnx_cannot():
    proto = models.parse("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }", opset=17)
    with pytest.raises(ModelError, match="cannot convert operator set 17 to 999"):
        load(proto).raise_opset(999)


def test_raise_opset_keeps_functions_and_other_domains():
    function = helper.make_function(
        "my",
        "F",
        ["a"],
        ["b"],
        [helper.make_node("Relu", ["a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    proto = build(
        [
            helper.make_node("F", ["x"], ["h"], domain="my"),
            helper.make_node("Gelu", ["h"], ["y"], domain="com.microsoft"),
        ],
        [info("x", ["N", 4])],
        [info("y", ["N", 4])],
    )
    proto.functions.append(function)
    proto.opset_import.extend(
        [helper.make_opsetid("my", 1), helper.make_opsetid("com.microsoft", 1)]
    )
    model = load(proto)
    model.raise_opset(21)
    assert_same_function(proto, model.clone())


# ---------------------------------------------------------------------- subgraphs


@pytest.mark.parametrize("condition", [False, True])
def test_branches(condition):
    proto = models.parse(BRANCHES)
    feed = {"x": models.feeds(proto)["x"], "c": np.array(condition)}
    model = load(proto)
    assert model.notes == ["left alone: the subgraphs of If_2"]
    for twin in (model, model.clone(), model.clone().clone()):
        assert twin.cleanup() == 0
        twin.check()
        after = twin.to_proto()
        onnx.checker.check_model(after, full_check=True)
        assert_same_function(proto, after, feed=feed)
        # each constant is written once, although both graphs read it
        assert {t.name for t in after.graph.initializer} == {"w", "v"}
        branches = [a.g for a in after.graph.node[2].attribute]
        assert not any(b.initializer for b in branches)
        assert [len(b.node) for b in branches] == [1, 3]  # dead ends too: they are left alone
    model.raise_opset(18)
    assert_same_function(proto, model, feed=feed)


def test_constants_of_subgraphs_are_not_edited_from_outside():
    proto = models.parse(
        """g (float[N,4] x, bool c) => (float[N,4] y) <float[4,4] w> {
            h = MatMul (x, w)
            y = If (c) <
                then_branch = t () => (float[N,4] a) { a = MatMul (h, w) },
                else_branch = e () => (float[N,4] b) { b = Neg (h) }
            >
        }"""
    )
    feed = {"x": models.feeds(proto)["x"], "c": np.array(True)}
    wanted = 2 * run(proto, feed)["y"]
    for model in (load(proto), load(proto).clone()):
        [layer] = model.layers()
        layer.set_weight(2 * layer.weight)
        after = model.to_proto()
        onnx.checker.check_model(after, full_check=True)
        np.testing.assert_allclose(run(after, feed)["y"], wanted, rtol=1e-5)


def test_loops():
    proto = models.parse(
        """g (float[N,4] x, int64 n) => (float[N,4] y) <float[4] w, bool t> {
            h = Neg (x)
            y = Loop (n, t, x) <
                body = b (int64 i, bool c, float[N,4] a) => (bool d, float[N,4] e) {
                    d = Identity (c)
                    k = Add (a, w)
                    e = Add (k, h)
                }
            >
        }""",
        t=True,
    )
    feed = {"x": models.feeds(proto)["x"], "n": np.array(3)}
    model = load(proto).clone()
    assert model.cleanup() == 0
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert_same_function(proto, model, feed=feed)


def test_model_of_a_proto_has_no_path():
    assert Model(models.parse(DENSE)).path is None
