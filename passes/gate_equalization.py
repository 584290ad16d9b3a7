"""Even out the channels behind a gate such as SiLU, where one scale would crush small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Layer, Model, consumers, rewire
from onnxq.pass_manager import Changes, Context
from onnxq.placement import gate_factor, gate_scales

__all__ = ["GateEqualization"]


@dataclass(frozen=True, kw_only=True)
class GateEqualization:
    r"""Scale channels behind a gate and take the scale back in the weights that follow.

    A gate y = x * f(x), such as SiLU, is not homogeneous, so weights before it cannot be scaled as
    cross-layer equalization does.  But its result can::

        Conv -> x --> Sigmoid --> Mul -> y -> Conv(W)
                 \______________/

        Conv -> x --> Sigmoid --> Mul -> y -> Mul(t per channel) -> y' -> Conv(W / t)
                 \______________/

    with t a power of two per channel, so that the float function stays the same to the bit, and
    quantizing y' takes the product over.  The gate then runs in float, which lets x have a scale
    per channel, too.  That costs time, so it is done only where at least a tenth of the channels
    would otherwise get `levels` steps or fewer.

    Refused: gates whose result something else than convolutions reads, shared weights, targets
    where activations have one scale.

    Args:
        levels: Steps that the range of a channel must keep, of 255 for the whole tensor.
        negative: Weight of the negative side of a range against the positive one; the gate leaves
            little there.
        largest: Greatest scale.

    Source: the equalization of Nagel et al. 2019 (arXiv 1906.04721), moved behind the gate.
    """

    name: ClassVar[str] = "gate-equalization"

    levels: float = 4.0
    negative: float = 4.0
    largest: float = 1024.0

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Insert the scales and divide the weights by them."""
        changes = Changes()
        gates = {
            n.outputs[0].name: n
            for n in model.graph.nodes
            if gate_factor(n) is not None
            and all(gate_scales(model, r) is None for r in consumers(n.outputs[0]))
        }
        if gates and not ctx.target.cpu:
            changes.skip("model", f"{ctx.target.name} has one scale for all channels of a gate")
        if not gates or not ctx.target.cpu:
            return changes
        model.infer()
        added = []
        for name, (low, high) in ctx.channel_ranges(model, [*gates]).items():
            bound = np.maximum(high, -self.negative * low)
            if not bound.any() or np.quantile(bound, 0.1) > bound.max() * self.levels / 255:
                continue
            node = gates[name]
            readers = self._readers(model, node, len(bound))
            if isinstance(readers, str):
                changes.skip(node.name, readers)
                continue
            depthwise = all(r.group == len(bound) for r in readers)
            scale = self._scale(bound, depthwise=depthwise).astype(readers[0].weight.dtype)
            added.append(_scaled(model, node, scale))
            for layer in readers:
                layer.scale_inputs(1 / scale)
            changes.add(f"{node.name}: channels scaled by 1 to {scale.max():g}")
        model.insert(added)
        return changes

    def _readers(self, model: Model, node: gs.Node, channels: int) -> list[Layer] | str:
        """The convolutions that read the result; why not, if something stands against it."""
        result = node.outputs[0]
        if model.is_output(result):
            return "its channels differ widely, but it is an output"
        found = []
        for reader in consumers(result):
            layer = Layer.of(model, reader)
            if layer is None or layer.op != "Conv" or layer.x is not result:
                return f"its channels differ widely, but {reader.name} ({reader.op}) reads it, too"
            if len(layer.weight_tensor.outputs) > 1 or layer.group not in (1, channels):
                return f"its channels differ widely, but the weight of {reader.name} is shared"
            if layer.unscalable:
                return f"its channels differ widely, but {layer.unscalable}"
            found.append(layer)
        return found

    def _scale(self, bound: np.ndarray, *, depthwise: bool) -> np.ndarray:
        """Powers of two that even the channels out: wholly where each has a weight of its own."""
        ratio = bound.max() / np.maximum(bound, bound.max() / self.largest)
        scale: np.ndarray = np.exp2(np.round(np.log2(ratio) * (1.0 if depthwise else 0.5)))
        return scale.astype(np.float32)


def _scaled(model: Model, node: gs.Node, scale: np.ndarray) -> gs.Node:
    """A Mul by the scales between a gate and its readers."""
    y = node.outputs[0]
    constant = model.constant(f"{node.name}_scale", scale.reshape(-1, *[1] * (len(y.shape) - 2)))
    result = model.variable(f"{y.name}_scaled", y.dtype, y.shape)
    for reader in consumers(y):
        rewire(reader, y, result)
    return gs.Node("Mul", f"{node.name}_equalize", {}, [y, constant], [result])
