"""Layer: one operator with a constant weight, and what its channels are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.errors import ModelError, UnsupportedError
from onnxq.graph import is_standard

if TYPE_CHECKING:
    from onnxq.encoding import Encoding
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
        if spec is None or not is_standard(node) or len(node.inputs) < 2:
            return None
        side = spec.weight
        if node.op in ("MatMul", "Gemm"):
            left, right = (isinstance(t, gs.Constant) for t in node.inputs[:2])
            side = ops.matmul_weight((left, right))
            if side < 0 or (left and right):
                return None
        elif not isinstance(node.inputs[side], gs.Constant):
            return None
        layer = cls(model, node, side)
        shape = layer.weight_tensor.shape
        if "Conv" in node.op and (not shape or layer.group < 1 or shape[0] % layer.group):
            return None  # channels that groups cannot share; onnxruntime says so when it runs
        return layer

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
    def weight(self) -> np.ndarray:
        """The weight as it is stored."""
        return self.model.array(self.node.inputs[self.side])

    @property
    def weight_tensor(self) -> gs.Constant:
        """The constant that holds the weight."""
        return self.node.inputs[self.side]

    @property
    def weight_encoding(self) -> Encoding | None:
        """How its weight is to be written in integers; None where it stays float."""
        encodings = self.model.encodings
        if self.name in encodings.float_nodes:
            return None
        return encodings.get(self.weight_tensor.name)

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
    def output_channels(self) -> int:
        """Number of output channels."""
        shape = self.weight_tensor.shape
        if self.op == "ConvTranspose":
            return int(shape[1]) * self.group
        return int(shape[self.channel_axis])

    @property
    def input_channels(self) -> int:
        """Number of input channels."""
        shape = self.weight_tensor.shape
        if self.op == "Conv":
            return int(shape[1]) * self.group
        return int(shape[0] if self.op == "ConvTranspose" else shape[1 - self.channel_axis])

    @property
    def is_padded(self) -> bool:
        """Whether it is a Conv that reads zeros beyond the border of its input."""
        attrs = self.node.attrs
        if self.op != "Conv":
            return False
        if attrs.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
            return any(size > 1 for size in self.weight_tensor.shape[2:])
        return attrs.get("auto_pad", "NOTSET") == "NOTSET" and any(attrs.get("pads", ()))

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
    def addend(self) -> tuple[gs.Node, int] | None:
        """The Add of a constant per channel that alone reads a MatMul's result, and its index."""
        readers = self.y.outputs
        if self.op != "MatMul" or len(readers) != 1 or self.model.is_output(self.y):
            return None
        node = readers[0]
        if node.op != "Add" or not any(n is node for n in self.model.graph.nodes):
            return None  # another operator, or one of a subgraph
        index = 1 - next(i for i, t in enumerate(node.inputs) if t is self.y)
        constant = node.inputs[index]
        if not isinstance(constant, gs.Constant):
            return None
        fits = [*constant.shape[-1:]] == [self.output_channels] == [math.prod(constant.shape)]
        return (node, index) if fits else None

    @property
    def owns_params(self) -> bool:
        """Whether no other node reads the weight or the bias."""
        tensors = [self.weight_tensor, self.bias_tensor]
        return all(len(t.outputs) == 1 for t in tensors if isinstance(t, gs.Constant))

    def set_weight(self, values: np.ndarray) -> None:
        """Give this layer a new weight; other readers of the old one keep it."""
        self.node.inputs[self.side] = self._replacement(self.weight_tensor, values)

    def set_bias(self, values: np.ndarray) -> None:
        """Give this layer a new constant bias, of the type of its weight.

        Other readers of the old one keep it.

        Raises:
            ModelError: The operator takes no bias.
        """
        values = values.astype(self.weight.dtype, copy=False)
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

    def take_bias(self) -> np.ndarray:
        """The bias as it is added, float64; zeros of shape [1] where there is none.

        Takes a Gemm's beta into it **and off the node**: give the layer the result, or what was
        made of it, by `set_bias`.
        """
        beta = float(self.node.attrs.pop("beta", 1.0))
        return np.zeros(1) if self.bias is None else self.bias.astype(np.float64) * beta

    # ------------------------------------------------------------------ channels of the weight

    @property
    def unscalable(self) -> str | None:
        """Why the channels of the weight cannot be scaled; None where they can."""
        if self.side != 1:
            return f"the weight of {self.name} is on the left"
        if self.weight.dtype.kind != "f":
            return f"the weight of {self.name} is not in floating point"
        if self.op == "MatMul" and self.weight.ndim != 2:
            return f"the weight of {self.name} is not a matrix"
        if self.bias_tensor is not None and self.bias is None:
            return f"the bias of {self.name} is computed"
        return None

    def along_outputs(self, values: np.ndarray) -> np.ndarray:
        """One value per output channel, in a shape that broadcasts over the weight."""
        if self.op == "ConvTranspose":  # [I, O/g, ...]: the rows of a group belong to its outputs
            return self._per_group(values)
        axis, rank = self.channel_axis, len(self.weight_tensor.shape)
        return values.reshape([-1 if i == axis else 1 for i in range(rank)])

    def along_inputs(self, values: np.ndarray) -> np.ndarray:
        """One value per input channel, in a shape that broadcasts over the weight.

        Args:
            values: As many as there are input channels; of a matrix fewer, too, where a Flatten
                before it made several neighbouring inputs of each channel.
        """
        if self.op == "Conv":  # [O, I/g, ...]: the rows of a group read its inputs
            return self._per_group(values)
        if self.op == "ConvTranspose":
            return values.reshape(-1, *[1] * (len(self.weight_tensor.shape) - 1))
        rows = np.repeat(values, self.input_channels // values.size)
        return rows[None, :] if self.channel_axis == 0 else rows[:, None]

    def _per_group(self, values: np.ndarray) -> np.ndarray:
        """Values of the second axis, which differ from group to group of the first."""
        shape, group = self.weight_tensor.shape, self.group
        rows = np.repeat(values.reshape(group, -1), shape[0] // group, axis=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))

    def sum_over_inputs(self, products: np.ndarray) -> np.ndarray:
        """The sum of an array like the weight over all but the output channels, [O]."""
        if self.op == "ConvTranspose":
            groups = products.reshape(self.group, -1, *products.shape[1:])
            axes = (1, *range(3, groups.ndim))
            return np.asarray(groups.sum(axis=axes)).reshape(-1)
        axes = tuple(i for i in range(products.ndim) if i != self.channel_axis)
        return np.asarray(products.sum(axis=axes))

    @property
    def magnitudes(self) -> np.ndarray:
        """Largest magnitude of the weight per output and input channel, float64 [O, I / group]."""
        weight = np.abs(self.weight.astype(np.float64))
        if "Conv" not in self.op:
            return np.asarray(weight if self.channel_axis == 0 else weight.T)
        weight = weight.max(axis=tuple(range(2, weight.ndim)), initial=0.0)
        if self.op == "Conv":
            return np.asarray(weight)
        grouped = weight.reshape(self.group, -1, weight.shape[1]).transpose(0, 2, 1)
        return np.asarray(grouped.reshape(self.output_channels, -1))

    def scale_outputs(self, scale: np.ndarray) -> None:
        """Multiply each output channel by a factor: weight and bias, in float64.

        Args:
            scale: One factor per output channel.

        Raises:
            UnsupportedError: `unscalable` says why.
        """
        weight = self._scalable_weight()
        self.set_weight((weight * self.along_outputs(scale)).astype(self.weight.dtype))
        if self.bias is not None:
            self.set_bias((self.take_bias() * scale).astype(self.weight.dtype))

    def scale_inputs(self, scale: np.ndarray) -> None:
        """Multiply what the weight takes of each input channel by a factor, in float64.

        Args:
            scale: One factor per input channel, or as `along_inputs` allows.

        Raises:
            UnsupportedError: `unscalable` says why.
        """
        weight = self._scalable_weight()
        self.set_weight((weight * self.along_inputs(scale)).astype(self.weight.dtype))

    def _scalable_weight(self) -> np.ndarray:
        if why := self.unscalable:
            raise UnsupportedError(why)
        return self.weight.astype(np.float64)

    def _replacement(self, old: gs.Tensor, values: np.ndarray) -> gs.Constant:
        if len(old.outputs) > 1 or self.model.is_output(old):
            return self.model.constant(f"{old.name}.{self.name}", values)
        return gs.Constant(old.name, np.asarray(values, order="C"))
