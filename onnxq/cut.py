"""Take channels out of a model: every weight, constant, size and shape that holds them shrinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.channels import Flow
from onnxq.dependency import Dependencies, is_depthwise
from onnxq.model import BatchNormStatistics, Layer, Model, producer

__all__ = ["cut", "kept_part"]


def cut(model: Model, found: Dependencies, keep: np.ndarray) -> None:
    """Take out every channel whose class does not stay, in place.

    Layers that read them lose the columns, whatever stands in these; what the others compute does
    not change where it was zero.

    Args:
        model: The model in which the classes were found, its graph not changed since.
        found: The classes.
        keep: Whether each class stays, bool [classes]; those of no group have to.
    """
    _Cut(model, found, keep).run()


def kept_part(
    layer: Layer, weight: np.ndarray, outputs: np.ndarray | None, inputs: np.ndarray | None
) -> np.ndarray:
    """The part of an array like a layer's weight that stays.

    Args:
        layer: The layer, before anything is cut.
        weight: The array.
        outputs: Whether each output channel stays, bool [O]; None for all.
        inputs: Whether each input channel stays, bool [I]; None for all.
    """
    group, transposed = layer.group, layer.op == "ConvTranspose"
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    if "Conv" not in layer.op:
        out_axis, in_axis = layer.channel_axis, 1 - layer.channel_axis
    elif is_depthwise(layer):  # [O, 1, ...], or [I, O/I, ...] transposed
        whole = inputs if transposed else outputs
        return weight if whole is None else np.compress(whole, weight, 0)
    elif group > 1:  # as many of each group stay, and the same ones
        if transposed and outputs is not None:
            outputs = outputs.reshape(group, -1)[0]
        if not transposed and inputs is not None:
            inputs = inputs.reshape(group, -1)[0]
    if outputs is not None:
        weight = np.compress(outputs, weight, out_axis)
    return weight if inputs is None else np.compress(inputs, weight, in_axis)


@dataclass(eq=False)
class _Cut:
    model: Model
    found: Dependencies
    keep: np.ndarray

    def run(self) -> None:
        rules: dict[str, Callable[[gs.Node, Flow], None]] = {
            "BatchNormalization": self._parameters,
            "InstanceNormalization": self._parameters,
            "Pad": self._pad,
            "Reshape": self._reshape,
            "Resize": self._resize,
            "Slice": self._slice,
            "Split": self._split,
        }
        for node in self.model.graph.nodes:
            layer = Layer.of(self.model, node)
            if layer is not None:
                self._layer(layer)
                continue
            flow = self._widest(node)
            if flow is not None and self._shrinks(flow):
                rules.get(node.op, self._operands)(node, flow)
        self._shapes()

    # -------------------------------------------------------------- what is known of tensors

    def _flow(self, tensor: gs.Tensor) -> Flow | None:
        return self.found.flows.get(tensor.name)

    def _widest(self, node: gs.Node) -> Flow | None:
        """The channels of the result; None where they are not followed."""
        return self._flow(node.outputs[0]) if node.outputs else None

    def _mask(self, flow: Flow) -> np.ndarray:
        return np.asarray(self.keep[flow.ids])

    def _shrinks(self, flow: Flow) -> bool:
        return not self._mask(flow).all()

    def _shapes(self) -> None:
        for name, tensor in self.model.tensors().items():
            flow = self.found.flows.get(name)
            if flow is None or not self._shrinks(flow):
                continue
            mask = self._mask(flow)
            if tensor.shape is not None and isinstance(tensor.shape[flow.axis], int):
                shape = [*tensor.shape]
                shape[flow.axis] = int(mask.sum())
                tensor.shape = shape
            known = self.model.batch_norms.get(name)
            if known is not None and known.gamma.size == mask.size:
                self.model.batch_norms[name] = BatchNormStatistics(
                    known.gamma[mask], known.beta[mask]
                )

    def _replace(self, node: gs.Node, index: int, values: np.ndarray) -> None:
        """Give a node other values of a constant; other readers of the old one keep it."""
        old = node.inputs[index]
        values = values.astype(self.model.array(old).dtype)
        if len(old.outputs) > 1 or self.model.is_output(old):
            node.inputs[index] = self.model.constant(f"{old.name}.{node.name}", values)
        else:
            node.inputs[index] = gs.Constant(old.name, np.asarray(values, order="C"))

    # -------------------------------------------------------------- layers

    def _layer(self, layer: Layer) -> None:
        sides = (self.found.outputs.get(layer.name), self.found.inputs.get(layer.name))
        outputs, inputs = (None if s is None else self.keep[s.classes] for s in sides)
        if all(mask is None or mask.all() for mask in (outputs, inputs)):
            return
        weight, bias = kept_part(layer, layer.weight, outputs, inputs), layer.bias
        if outputs is not None and bias is not None and bias.size == outputs.size > 1:
            layer.set_bias(np.compress(outputs, bias, bias.ndim - 1))
        if is_depthwise(layer):
            assert inputs is not None
            layer.node.attrs["group"] = int(inputs.sum())
        layer.set_weight(weight)

    # -------------------------------------------------------------- what lies between

    def _operands(self, node: gs.Node, flow: Flow) -> None:
        """Constants with one value per channel, as they broadcast over the result."""
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant) or not tensor.name:
                continue
            values = self.model.array(tensor)
            axis = values.ndim - flow.from_end
            if axis >= 0 and values.shape[axis] == flow.ids.size > 1:
                self._replace(node, index, np.compress(self._mask(flow), values, axis))

    def _parameters(self, node: gs.Node, flow: Flow) -> None:
        for index in range(1, len(node.inputs)):
            values = self.model.array(node.inputs[index])
            self._replace(node, index, values[self._mask(flow)])

    def _split(self, node: gs.Node, flow: Flow) -> None:
        if int(node.attrs.get("axis", 0)) % flow.rank != flow.axis:
            return
        parts = [self._flow(t) for t in node.outputs]
        sizes = [int(self._mask(part).sum()) for part in parts if part is not None]
        if self.model.opset < 13:
            node.attrs["split"] = sizes
            return
        node.attrs.pop("num_outputs", None)
        if len(node.inputs) > 1:
            self._replace(node, 1, np.array(sizes))
        else:
            node.inputs.append(self.model.constant(f"{node.name}.sizes", np.array(sizes)))

    def _slice(self, node: gs.Node, flow: Flow) -> None:
        source = self._flow(node.inputs[0])
        assert source is not None
        in_attrs = len(node.inputs) == 1
        given = [node.attrs.get(n) for n in ("starts", "ends", "axes")]
        for index, tensor in enumerate(node.inputs[1:4]):
            given[index] = self.model.array(tensor).tolist() if tensor.name else None
        starts, ends, axes = given
        axes = range(len(starts)) if axes is None else [a % flow.rank for a in axes]
        mask, size = self._mask(source), source.ids.size
        for place, axis in enumerate(axes):
            if axis == flow.axis:
                first, last, _ = slice(starts[place], ends[place]).indices(size)
                starts[place], ends[place] = int(mask[:first].sum()), int(mask[:last].sum())
        if in_attrs:
            node.attrs.update(starts=starts, ends=ends)
        else:
            self._replace(node, 1, np.array(starts))
            self._replace(node, 2, np.array(ends))

    def _pad(self, node: gs.Node, flow: Flow) -> None:
        source = self._flow(node.inputs[0])
        assert source is not None
        pads = node.attrs["pads"] if len(node.inputs) < 2 else node.inputs[1]
        pads = np.array(pads) if isinstance(pads, list) else self.model.array(pads).copy()
        mask, before = self._mask(flow), int(pads[flow.axis])
        pads[flow.axis] = mask[:before].sum()
        pads[flow.rank + flow.axis] = mask[before + source.ids.size :].sum()
        if len(node.inputs) < 2:
            node.attrs["pads"] = pads.tolist()
        else:
            self._replace(node, 1, pads)

    def _resize(self, node: gs.Node, flow: Flow) -> None:
        if len(node.inputs) < 4 or not node.inputs[3].name:
            return  # scales, which stay
        sizes = self.model.array(node.inputs[3]).copy()
        axes = [a % flow.rank for a in node.attrs.get("axes", range(flow.rank))]
        if flow.axis in axes:
            sizes[axes.index(flow.axis)] = self._mask(flow).sum()
            self._replace(node, 3, sizes)

    def _reshape(self, node: gs.Node, flow: Flow) -> None:
        if producer(node.inputs[1]) is not None:
            return  # computed, -1 for the channels
        shape = self.model.array(node.inputs[1]).copy()
        if shape[flow.axis] > 0:
            shape[flow.axis] = self._mask(flow).sum()
            self._replace(node, 1, shape)
