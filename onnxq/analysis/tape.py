"""The graph of a model that grows by the nodes of its adjoint, and what its tensors look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxq.runtime import Session

__all__ = ["Rule", "Tape", "seed_name"]

_FLOATS = (np.float16, np.float32, np.float64)


def seed_name(output: str) -> str:
    """The input by which the direction at an output is fed."""
    return f"adjoint/seed/{output}"


class Tape:
    """The graph of a model, to which the nodes of its adjoint are added one by one.

    Args:
        proto: The model; added to.
        feed: A sample, whose shapes are taken for those of all.
    """

    def __init__(self, proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> None:
        self._proto = proto
        self._constants = {t.name: t for t in proto.graph.initializer}
        self._count = 0
        made = [n for node in proto.graph.node for n in node.output if n]
        session = Session(proto, outputs=made, threads=1, level="disabled")
        values = {**feed, **session.run_shared(feed)}
        self._shapes = {n: tuple(a.shape) for n, a in values.items()}
        self._floats = {n: a.dtype == np.float32 for n, a in values.items() if a.dtype in _FLOATS}
        # what says how values move: shapes, axes, indices
        self._small = {n: a.copy() for n, a in values.items() if a.dtype.kind in "iub"}
        self._gradients: dict[str, list[str]] = {}

    def model(self) -> onnx.ModelProto:
        """The model with everything that was added."""
        return self._proto

    def is_float(self, name: str) -> bool:
        """Whether a tensor that is no constant holds floats."""
        return name in self._floats

    def is_single(self, name: str) -> bool:
        """Whether these are float32, as gradients are."""
        return self._floats.get(name, False)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor or constant."""
        if name in self._constants:
            return tuple(self._constants[name].dims)
        return self._shapes[name]

    def value(self, name: str) -> np.ndarray | None:
        """The value of a constant, or of integers that were computed; None of what varies."""
        if name in self._constants:
            return np.asarray(numpy_helper.to_array(self._constants[name]))
        return self._small.get(name)

    # ---------------------------------------------------------------------- gradients

    def add_seed(self, output: str) -> None:
        """Begin at an output."""
        name = seed_name(output)
        kind = onnx.TensorProto.FLOAT
        self._proto.graph.input.append(
            helper.make_tensor_value_info(name, kind, self.shape(output))
        )
        self.add_gradient(output, self("Identity", name))  # an input cannot be fetched

    def gradient(self, name: str) -> str | None:
        """The gradient with respect to a tensor whose readers are all reversed; None if 0."""
        parts = self._gradients.get(name)
        if not parts:
            return None
        if len(parts) > 1:
            self._gradients[name] = parts = [self("Sum", *parts)]
        return parts[0]

    def add_gradient(self, name: str, part: str) -> None:
        """Add to the gradient with respect to a tensor."""
        self._gradients.setdefault(name, []).append(part)

    # ---------------------------------------------------------------------- adding nodes

    def __call__(self, op: str, *inputs: str, **attrs: Any) -> str:
        """Add a node; the name of its result."""
        name = self._fresh(op)
        self._proto.graph.node.append(helper.make_node(op, [*inputs], [name], **attrs))
        return name

    def constant(self, values: np.ndarray | float | Sequence[int]) -> str:
        """Add a constant: floats as float32, integers as int64."""
        array = np.asarray(values)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = self._fresh("constant")
        self._constants[name] = tensor = numpy_helper.from_array(array, name)
        self._proto.graph.initializer.append(tensor)
        return name

    def expose_second(self, node: onnx.NodeProto) -> str:
        """The second output of a node, which it may not have had a name for."""
        if len(node.output) < 2:
            node.output.append(self._fresh("second"))
        elif not node.output[1]:
            node.output[1] = self._fresh("second")
        return str(node.output[1])

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str], output: int = 0) -> str:
        """The node once more, on other inputs; the name of one of its results."""
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = self._fresh(node.op_type)
        del twin.input[:], twin.output[:]
        twin.input.extend(inputs)
        twin.output.extend(self._fresh(node.op_type) if n else "" for n in node.output)
        self._proto.graph.node.append(twin)
        return str(twin.output[output])

    def reshaped(self, name: str, shape: Sequence[int]) -> str:
        """The same values in another shape."""
        return self("Reshape", name, self.constant(np.array(shape, np.int64)), allowzero=1)

    def summed(self, name: str, axes: Sequence[int]) -> str:
        """The sum over axes, which stay with size 1."""
        return self("ReduceSum", name, self.constant(np.array(axes, np.int64)), keepdims=1)

    def reduced(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        """What broadcasting from one shape to another has spread, summed up again.

        Args:
            name: A tensor.
            shape: Its shape.
            wanted: The shape that was broadcast.
        """
        if shape == wanted:
            return name
        aligned = (*[1] * (len(shape) - len(wanted)), *wanted)
        axes = [i for i, (n, w) in enumerate(zip(shape, aligned, strict=True)) if n != w]
        found = self.summed(name, axes) if axes else name
        return found if aligned == wanted else self.reshaped(found, wanted)

    def _fresh(self, what: str) -> str:
        self._count += 1
        return f"adjoint/{what}/{self._count}"


Rule = Callable[
    [Tape, onnx.NodeProto, dict[str, Any], list[str | None]], "Sequence[str | None] | str"
]
