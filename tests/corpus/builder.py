"""Builds models node by node for any operator set from 7 on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Builder"]

Shape = tuple[int, ...]


class Builder:
    """A graph in the making: the tensor that it has come to, of a known shape [N, C, H, W].

    Args:
        rng: Draws weights and choices.
        opset: Version of the standard operator set.
        dtype: Element type of activations and weights.
    """

    def __init__(self, rng: np.random.Generator, opset: int, dtype: type = np.float32) -> None:
        self.rng = rng
        self.opset = opset
        self.dtype = np.dtype(dtype)
        self.ir_version = max(8, helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))
        self.domains: dict[str, int] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self.name = ""
        self.shape: Shape = ()
        self._count = 0

    # ------------------------------------------------------------------ parts

    @property
    def kind(self) -> int:
        """Element type of activations, as ONNX numbers it."""
        return int(helper.np_dtype_to_tensor_dtype(self.dtype))

    def free(self, base: str) -> str:
        """A name that is not taken."""
        self._count += 1
        return f"{base}_{self._count}"

    def constant(self, array: Any, dtype: Any = None, name: str | None = None) -> str:
        """Add an initializer."""
        values = np.asarray(array, self.dtype if dtype is None else dtype)
        name = name or self.free("w")
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def ints(self, values: Sequence[int]) -> str:
        """Add an initializer of int64."""
        return self.constant(values, np.int64)

    def node(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any) -> str:
        """Add a node; returns the name of its first output."""
        names = [self.free("t") for _ in range(outputs)]
        name = self.free(op)
        self.nodes.append(helper.make_node(op, inputs, names, name=name, domain=domain, **attrs))
        return names[0]

    def apply(self, op: str, *others: str, **attrs: Any) -> str:
        """Add a node that reads the tensor that the graph has come to, and go on from there."""
        self.name = self.node(op, self.name, *others, **attrs)
        return self.name

    def input(self, name: str, shape: Sequence[int | str | None] | None, kind: int) -> str:
        """Add an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(
        self, name: str, shape: Sequence[int | str | None] | None, kind: int | None = None
    ) -> None:
        """Add an output."""
        kind = self.kind if kind is None else kind
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    # ------------------------------------------------------------------ operators by version

    def weight(self, shape: Sequence[int]) -> np.ndarray:
        """Numbers that keep the size of what they are multiplied with."""
        fan_in = max(1, int(np.prod(shape[1:])))
        return self.rng.normal(0, 1.4 / fan_in**0.5, shape)

    def conv(self, outputs: int, kernel: int = 3, *, bias: bool = True, **attrs: Any) -> None:
        """A convolution that keeps the size unless strides say otherwise."""
        group = attrs.get("group", 1)
        shape = (outputs, self.shape[1] // group, kernel, kernel)
        names = [self.constant(self.weight(shape))]
        if bias:
            names.append(self.constant(self.rng.normal(0, 0.3, outputs)))
        pads = [kernel // 2] * 4
        self.apply("Conv", *names, kernel_shape=[kernel] * 2, pads=pads, **attrs)
        stride = attrs.get("strides", [1, 1])[0]
        size = (-(-n // stride) for n in self.shape[2:])
        self.shape = (self.shape[0], outputs, *size)

    def norm(self) -> None:
        """BatchNormalization."""
        c = self.shape[1]
        gamma, beta, mean = self.rng.normal(0, 0.3, (3, c))
        values = (1 + gamma, beta, mean, self.rng.uniform(0.5, 1.5, c))
        self.apply("BatchNormalization", *map(self.constant, values), epsilon=1e-3)

    def clip(self, low: float, high: float) -> None:
        """Clip, whose limits were attributes once."""
        if self.opset < 11:
            self.apply("Clip", min=float(low), max=float(high))
        else:
            self.apply("Clip", self.constant(low), self.constant(high))

    def squeeze(self, name: str, axes: Sequence[int]) -> str:
        if self.opset < 13:
            return self.node("Squeeze", name, axes=axes)
        return self.node("Squeeze", name, self.ints(axes))

    def unsqueeze(self, name: str, axes: Sequence[int]) -> str:
        if self.opset < 13:
            return self.node("Unsqueeze", name, axes=axes)
        return self.node("Unsqueeze", name, self.ints(axes))

    def reduce_mean(self, name: str, axes: Sequence[int], keepdims: int = 1) -> str:
        if self.opset < 18:
            return self.node("ReduceMean", name, axes=axes, keepdims=keepdims)
        return self.node("ReduceMean", name, self.ints(axes), keepdims=keepdims)

    def pad(self, pads: Sequence[int], mode: str = "constant") -> None:
        if self.opset < 11:
            self.apply("Pad", pads=pads, mode=mode)
        else:
            self.apply("Pad", self.ints(pads), mode=mode)

    def slice(self, name: str, start: int, end: int, axis: int) -> str:
        if self.opset < 10:
            return self.node("Slice", name, starts=[start], ends=[end], axes=[axis])
        return self.node("Slice", name, *(self.ints([n]) for n in (start, end, axis)))

    def split(self, name: str, sizes: Sequence[int], axis: int) -> list[str]:
        if self.opset < 13:
            first = self.node("Split", name, outputs=len(sizes), axis=axis, split=sizes)
        else:
            first = self.node("Split", name, self.ints(sizes), outputs=len(sizes), axis=axis)
        names = list(self.nodes[-1].output)
        assert names[0] == first
        return names

    def scalar(self, name: str) -> str:
        """The mean of a tensor, of shape []."""
        return self.reduce_mean(name, range(len(self.shape)), keepdims=0)

    # ------------------------------------------------------------------ the whole

    def build(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "g", self.inputs, self.outputs, self.constants, value_info=self.infos
        )
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(d, v) for d, v in self.domains.items()]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            functions=self.functions,
            ir_version=self.ir_version,
            producer_name="corpus",
        )
        inferred = onnx.shape_inference.infer_shapes(model)
        for info, known in zip(model.graph.output, inferred.graph.output, strict=True):
            info.CopyFrom(known)
        return model


def tensor_type(kind: int, shape: Sequence[int | str | None] | None) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(kind, shape)


BOOL, INT64, STRING = TensorProto.BOOL, TensorProto.INT64, TensorProto.STRING
