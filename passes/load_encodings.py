"""Take encodings from a file instead of calibrating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxq import encodings_json, ops
from onnxq.encoding import Encoding, Encodings
from onnxq.errors import RecipeError, did_you_mean
from onnxq.model import Model, producer
from onnxq.pass_manager import Changes, Context
from onnxq.targets import Target

__all__ = ["LoadEncodings"]


@dataclass(frozen=True, kw_only=True)
class LoadEncodings:
    """Replace the model's encodings by those of a JSON file.

    Before and after::

        encodings: anything          encodings: those of the file

    Refused: a file that names tensors or nodes which the model does not have, types, zero points
    and scales per channel that the target does not take, and scales that do not fit the tensor.

    Args:
        path: An encodings file, as `onnxq quantize --save-encodings` writes it.
    """

    name: ClassVar[str] = "load-encodings"

    path: str

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Read the file into `model.encodings`."""
        changes = Changes()
        model.raise_opset(13)
        encodings = encodings_json.load(self.path)
        _copy_shared(model, encodings)
        known = [*model.tensors()]
        nodes = [n.name for n in model.graph.nodes]
        for name, names, kind in (
            *((n, known, "tensor") for n in encodings),
            *((n, nodes, "node") for n in encodings.float_nodes),
        ):
            if name not in set(names):
                raise RecipeError(
                    f"the model has no {kind} {name!r}",
                    where=self.path,
                    fix=did_you_mean(name, names, "use the encodings of this model"),
                )
        tensors = model.tensors()
        for name, encoding in encodings.items():
            if (why := _misfit(tensors[name], encoding, ctx.target)) is not None:
                raise RecipeError(
                    f"{name}: {why}", where=self.path, fix="use the encodings of this model"
                )
        model.encodings = encodings
        changes.add(f"{len(encodings)} encodings from {self.path}")
        return changes


def _misfit(tensor: gs.Tensor, encoding: Encoding, target: Target) -> str | None:
    """What keeps a tensor from being written so; None if nothing does."""
    types = set(target.activations)
    if isinstance(tensor, gs.Constant):
        types.update(*map(target.weight_types, ("float", *target.activations)))
    if encoding.dtype not in types:
        return f"{target.name} has no integer kernels for {encoding.dtype}"
    if target.symmetric and encoding.zero_point.any():
        return f"{target.name} wants zero points of 0"
    axis, shape = encoding.axis, tensor.shape
    if axis is None:
        return None
    if not isinstance(tensor, gs.Constant):
        if not target.cpu:
            return f"{target.name} has one scale per activation tensor"
        before = producer(tensor)
        if before is not None and before.op in ops.ACTIVATIONS:
            before = producer(before.inputs[0])
        if before is None or before.op != "Conv":
            return "only the result of a Conv can have scales per channel"
    if shape is None:
        return None
    if not -len(shape) <= axis < len(shape):
        return f"it has no axis {axis}"
    size = shape[axis]
    if encoding.block:
        blocks = [*shape]
        blocks[axis] //= encoding.block
        if not isinstance(tensor, gs.Constant) or len(shape) != 2:
            return "only a constant matrix can have scales per block"
        if size % encoding.block or tuple(blocks) != encoding.scale.shape:
            of = "x".join(map(str, encoding.scale.shape))
            return f"{of} scales for blocks of {encoding.block} along axis {axis} of {shape}"
        return None
    if isinstance(size, int) and size != encoding.scale.size:
        return f"{encoding.scale.size} scales for {size} channels along axis {axis}"
    return None


def _copy_shared(model: Model, encodings: Encodings) -> None:
    """Give nodes the copies of shared constants that calibrate made, by the names it gave them."""
    known = model.tensors()
    for node in model.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            name = f"{tensor.name}.{node.name}"
            if isinstance(tensor, gs.Constant) and name in encodings and name not in known:
                node.inputs[index] = model.constant(name, model.array(tensor))
