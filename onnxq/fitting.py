"""Encodings of a file, fitted to the model that they are for."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.encoding import Encoding, Encodings
from onnxq.encodings_v1 import Channels
from onnxq.errors import RecipeError, did_you_mean
from onnxq.model import Model, is_standard, producer
from onnxq.placement import Ends, data_inputs, integer_nodes, written_activations
from onnxq.targets import Target

__all__ = ["channels", "constants", "fit", "lacking", "share_moves", "unused", "without_moves"]

# So many names are listed where they do not match.
NAMED = 3


def channels(model: Model) -> dict[str, Channels]:
    """Which way the channels of each weight run, for files that do not say so."""
    return {
        layer.weight_tensor.name: Channels(layer.channel_axis, layer.output_channels)
        for layer in model.layers()
    }


def constants(model: Model) -> set[str]:
    """Names of the model's constants."""
    return {n for n, t in model.tensors().items() if isinstance(t, gs.Constant)}


def fit(
    model: Model, given: Encodings, target: Target, where: object, *, strict: bool = True
) -> tuple[Encodings, list[str]]:
    """The encodings of a file as the model can have them; the model's own are left alone.

    Constants that calibration copied for a node get their copies again.  Encodings of int32 biases
    are left out, since scales of inputs and weights determine them, and moved data (Reshape,
    MaxPool) that have none get those of their source.

    Args:
        model: The float model.
        given: The encodings.
        target: What the model is to run on.
        where: The file, for errors.
        strict: Whether names that the model does not have are an error; else they are left out.

    Returns:
        The encodings, and what was left out or added, one sentence each.

    Raises:
        RecipeError: Tensors or nodes that the model does not have, or encodings that do not fit a
            tensor, or the target.
    """
    _copy_shared(model, given)
    notes = []
    found = given.copy()
    tensors, names = model.tensors(), [n.name for n in model.graph.nodes]
    unknown = [n for n in given if n not in tensors]
    if unknown and strict:
        raise _strangers(unknown, len(given), [*tensors], "tensor", where)
    strangers = [n for n in given.float_nodes if n not in set(names)]
    if strangers and strict:
        raise _strangers(strangers, len(given.float_nodes), names, "node", where)
    if unknown:
        notes.append(f"{len(unknown)} encodings of tensors that the model does not have")
    for name in unknown:
        del found[name]
    for name in strangers:
        del found.float_nodes[name]
    biases = [n for n, e in found.items() if e.dtype == "int32"]
    for name in biases:
        del found[name]
    if biases:
        notes.append(f"{len(biases)} encodings of int32, which inputs and weights determine")
    if given.float_tensors:
        notes.append(f"{len(given.float_tensors)} tensors that the file has in floating point")
    for name, encoding in found.items():
        if (why := _misfit(tensors[name], encoding, target)) is not None:
            fix = "use the encodings of this model"
            raise RecipeError(f"{name}: {why}", where=where, fix=fix)
    if moved := share_moves(model, found, target):
        notes.append(f"{moved} tensors of moved data share the encoding of their source or result")
    return found, notes


def lacking(model: Model, target: Target) -> Iterator[tuple[str, str]]:
    """The nodes that could run in integers but for a missing encoding, and why not."""
    known, runs = model.encodings, integer_nodes(model, target)
    ends = Ends(model, known.float_nodes)
    for node in model.graph.nodes:
        kernel = target.kernels.get(node.op)
        if kernel is None or node.name in runs or node.name in known.float_nodes:
            continue
        if not is_standard(node):
            continue
        read = [t.name for t in data_inputs(node, kernel) if t.name]
        made = [ends.of(t, kernel).name for t in node.outputs if t.name]
        none = [n for n in (*read, *made) if n not in known]
        arrives = all(n in known for n in read) and kernel.role != "move"
        if none and (arrives or kernel.role == "layer"):
            yield node.name, f"{none[0]} has no encoding"


def unused(model: Model, target: Target) -> list[str]:
    """The tensors whose encodings mean nothing, as nothing in integers reads or writes them."""
    runs = integer_nodes(model, target)
    kernels = {id(n): runs[n.name] for n in model.graph.nodes if n.name in runs}
    used = {*written_activations(model, kernels)}
    for node in model.graph.nodes:
        if id(node) in kernels:
            used |= {t.name for t in (*data_inputs(node, kernels[id(node)]), *node.outputs)}
    used |= {x.weight_tensor.name for x in model.layers() if x.x.name not in model.encodings}
    return [name for name in model.encodings if name not in used]


def _strangers(
    unknown: list[str], count: int, known: list[str], kind: str, where: object
) -> RecipeError:
    more = f", nor {len(unknown) - 1} more of {count} that are named" if len(unknown) > 1 else ""
    hints = [h for n in unknown[:NAMED] if (h := did_you_mean(n, known, None)) is not None]
    return RecipeError(
        f"the model has no {kind} {unknown[0]!r}{more}",
        where=where,
        fix=" ".join(hints) or "use the encodings of this model",
    )


def share_moves(model: Model, encodings: Encodings, target: Target) -> int:
    """Give moved data the encoding of their source, or the other way; returns how many got one.

    Args:
        model: The model.
        encodings: The encodings, which get more.
        target: Says what moves data in integers.
    """
    moves = [
        (node.inputs[0].name, tensor.name)
        for node in model.graph.nodes
        if node.name not in encodings.float_nodes and _moves(node, target)
        for tensor in node.outputs
        if tensor.name
    ]
    before = len(encodings)
    for known, other in (*moves, *((b, a) for a, b in reversed(moves))):
        if known in encodings and encodings[known].axis is None and other not in encodings:
            encodings[other] = encodings[known]
    return len(encodings) - before


def without_moves(model: Model, encodings: Encodings, target: Target) -> Encodings:
    """The encodings without those of moved data that `share_moves` would bring back.

    AIMET, whose versions before 2 have none either, takes them for mistakes.
    """
    lean = encodings.copy()
    for node in model.graph.nodes:
        if node.name in encodings.float_nodes or not _moves(node, target):
            continue
        source = encodings.get(node.inputs[0].name)
        for tensor in node.outputs:
            known = encodings.get(tensor.name)
            if known is not None and known == source and source.axis is None:
                lean.pop(tensor.name, None)
    return lean


def _moves(node: gs.Node, target: Target) -> bool:
    """Whether a node only moves data, and may do so in integers."""
    kernel = target.kernels.get(node.op)
    if kernel is None or kernel.role != "move" or not is_standard(node):
        return False
    moves = ops.is_movement(node.op, node.attrs)
    return moves and not isinstance(node.inputs[0], gs.Constant)


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
