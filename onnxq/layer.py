"""Layer: one operator with a constant weight, and what its channels are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.errors import ModelError

if TYPE_CHECKING:
    from onnxq.model import Model

__all__ = ["Layer"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One operator with a constant weight: Conv, ConvTranspose, Gemm or MatMul.

    Args:
        model: The model that holds it.
        node: Its node.
        side: Input index of the weight.
    """

    model: Model
    node: gs.Node
    side: int

    @classmethod
    def of(cls, model: Model, node: gs.Node) -> Layer | None:
        """The layer that a node is; None if it is none."""
        spec = ops.LAYERS.get(node.op)
        if spec is None or node.domain not in (None, "", "ai.onnx") or len(node.inputs) < 2:
            return None
        side = spec.weight
        if node.op in ("MatMul", "Gemm"):
            left, right = (isinstance(t, gs.Constant) for t in node.inputs[:2])
            side = ops.matmul_weight((left, right))
            if side < 0 or (left and right):
                return None
        elif not isinstance(node.inputs[side], gs.Constant):
            return None
        return cls(model, node, side)

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.node.name)

    @property
    def op(self) -> str:
        """The operator type."""
        return str(self.node.op)

    @property
    def x(self) -> gs.Tensor:
        """The activation that it reads."""
        return self.node.inputs[1 - self.side]

    @property
    def y(self) -> gs.Tensor:
        """Its output."""
        return self.node.outputs[0]

    @property
    def result(self) -> gs.Tensor:
        """Its output, or that of the only Relu or Clip after it."""
        readers = self.y.outputs
        if len(readers) == 1 and readers[0].op in ops.ACTIVATIONS:
            return self.y if self.model.is_output(self.y) else readers[0].outputs[0]
        return self.y

    @property
    def weight(self) -> np.ndarray:
        """The weight as it is stored."""
        return self.model.array(self.node.inputs[self.side])

    @property
    def weight_tensor(self) -> gs.Constant:
        """The constant that holds the weight."""
        return self.node.inputs[self.side]

    @property
    def group(self) -> int:
        """Groups of a convolution; 1 elsewhere."""
        return int(self.node.attrs.get("group", 1)) if "Conv" in self.op else 1

    @property
    def channel_axis(self) -> int:
        """The axis of the weight along which one scale per output channel runs."""
        shape = tuple(self.weight_tensor.shape)
        return ops.channel_axis(self.op, self.node.attrs, shape, self.side)

    @property
    def bias_tensor(self) -> gs.Tensor | None:
        """The bias input; None where there is none."""
        index = ops.bias_input(self.op)
        if index is None or len(self.node.inputs) <= index or not self.node.inputs[index].name:
            return None
        return self.node.inputs[index]

    @property
    def bias(self) -> np.ndarray | None:
        """The constant bias; None where there is none or it is computed."""
        tensor = self.bias_tensor
        return self.model.array(tensor) if isinstance(tensor, gs.Constant) else None

    @property
    def owns_params(self) -> bool:
        """Whether no other node reads the weight or the bias."""
        tensors = [self.weight_tensor, self.bias_tensor]
        return all(len(t.outputs) == 1 for t in tensors if isinstance(t, gs.Constant))

    def set_weight(self, values: np.ndarray) -> None:
        """Give this layer a new weight; other readers of the old one keep it."""
        self.node.inputs[self.side] = self._replacement(self.weight_tensor, values)

    def set_bias(self, values: np.ndarray) -> None:
        """Give this layer a new constant bias; other readers of the old one keep it.

        Raises:
            ModelError: The operator takes no bias.
        """
        index = ops.bias_input(self.op)
        if index is None:
            raise ModelError(f"{self.op} takes no bias", where=f"node {self.name}")
        old = self.bias_tensor
        if isinstance(old, gs.Constant):
            self.node.inputs[index] = self._replacement(old, values)
            return
        while len(self.node.inputs) < index:
            self.node.inputs.append(gs.Variable.empty())
        new = self.model.constant(f"{self.name}.bias", values)
        if len(self.node.inputs) == index:
            self.node.inputs.append(new)
        else:
            self.node.inputs[index] = new

    def _replacement(self, old: gs.Tensor, values: np.ndarray) -> gs.Constant:
        if len(old.outputs) > 1 or self.model.is_output(old):
            return self.model.constant(f"{old.name}.{self.name}", values)
        return gs.Constant(old.name, np.asarray(values, order="C"))
