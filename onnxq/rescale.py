"""Scale classes of channels: everything that they touch, without changing the function."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.coupling import Ceiling, Coupling
from onnxq.model import BatchNormStatistics, Model
from onnxq.pass_manager import Changes

__all__ = ["rescale"]


def rescale(
    model: Model,
    coupling: Coupling,
    scale: np.ndarray,
    ranges: Mapping[str, tuple[np.ndarray, np.ndarray]],
    changes: Changes,
) -> None:
    """Divide channels by the scale of their class where they are put out, multiply where read.

    Weights, biases, constants, bounds, and what is known of batch normalization go along.

    Args:
        model: The model, changed.
        coupling: Its classes of channels.
        scale: float64 [classes], 1 for what stays as it is.
        ranges: Least and greatest value of each channel of the tensors before a Clip, where known.
        changes: Takes what became of each Clip.
    """
    rewrite = _Rewrite(model, coupling, scale, changes)
    rewrite.layers()
    rewrite.constants()
    rewrite.ceilings(ranges)
    rewrite.batch_norms()


class _Rewrite:
    """Scales everything that a class of channels touches."""

    def __init__(
        self, model: Model, coupling: Coupling, scale: np.ndarray, changes: Changes
    ) -> None:
        self.model = model
        self.coupling = coupling
        self.scale = scale
        self.changes = changes

    def _moves(self, classes: np.ndarray) -> bool:
        return bool((self.scale[classes] != 1.0).any())

    def layers(self) -> None:
        for side in self.coupling.outputs:
            if self._moves(side.classes):
                side.layer.scale_outputs(1.0 / self.scale[side.classes])
        for side in self.coupling.inputs:
            if self._moves(side.classes):
                side.layer.scale_inputs(self.scale[side.classes])

    def constants(self) -> None:
        for constant in self.coupling.constants:
            if self._moves(constant.classes):
                old = self.model.array(constant.node.inputs[constant.index])
                by = self.scale[constant.classes].reshape(constant.shape)
                values = (old.astype(np.float64) / by).astype(old.dtype)
                name = f"{constant.node.name}.constant"
                constant.node.inputs[constant.index] = self.model.constant(name, values)

    def ceilings(self, ranges: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Relu with a bound per channel for each Clip; `ranges`: how far its channels went."""
        added = []
        for ceiling in self.coupling.ceilings:
            if not self._moves(ceiling.classes):
                continue
            node = ceiling.node
            _, top = ranges.get(node.inputs[0].name, (None, None))
            while len(node.inputs) > 1:
                node.inputs.pop()
            node.op, node.attrs = "Relu", {}
            if top is not None and (top < ceiling.bound).all():
                self.changes.add(f"{node.name}: Relu, no channel reaches {ceiling.bound:g}")
                continue
            added.append(self._minimum(ceiling, ceiling.bound / self.scale[ceiling.classes]))
            self.changes.add(f"{node.name}: {ceiling.bound:g} became a bound per channel")
        self.model.insert(added)

    def _minimum(self, ceiling: Ceiling, bounds: np.ndarray) -> gs.Node:
        node, result = ceiling.node, ceiling.node.outputs[0]
        before = self.model.variable(f"{result.name}.relu", result.dtype, result.shape)
        node.outputs[0] = before
        shape = (-1, *[1] * (ceiling.rank - 2))
        dtype = np.float32 if result.dtype is None else result.dtype
        constant = self.model.constant(f"{node.name}.bounds", bounds.astype(dtype).reshape(shape))
        return gs.Node("Min", f"{node.name}.min", {}, [before, constant], [result])

    def batch_norms(self) -> None:
        for name, known in self.model.batch_norms.items():
            classes = self.coupling.tensors.get(name)
            if classes is not None and classes.size == known.gamma.size:
                by = self.scale[classes]
                self.model.batch_norms[name] = BatchNormStatistics(
                    (known.gamma / by).astype(np.float32), (known.beta / by).astype(np.float32)
                )
