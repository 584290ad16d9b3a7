"""Which nodes run in integers, and which tensors therefore get an encoding.

A node is worth running in integers if the target has a kernel for it and the integers come from
somewhere and go somewhere.  Layers (Conv, Gemm, MatMul) always are; what lies between them joins in
if its inputs arrive as integers and something reads its result as integers.  So the first and last
operators of a model, the float islands in its middle and their borders come out by themselves, and
no Q/DQ is written where nothing would run in integers.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.errors import RecipeError
from onnxq.model import Layer, Model, consumers, has_subgraph, is_standard, producer
from onnxq.targets import Kernel, Target

__all__ = [
    "Ends",
    "Placement",
    "data_inputs",
    "fits",
    "gate_factor",
    "gate_scales",
    "integer_nodes",
    "match_nodes",
    "place",
    "written_activations",
]

INF = float("inf")
# Largest over smallest magnitude of a constant that one scale may cover.
WIDEST = 16.0
# Functions f of the gates x * f(x).
GATES = frozenset({"Sigmoid", "HardSigmoid", "Tanh", "Softplus"})


@dataclass
class Placement:
    """Where integers flow.

    Attributes:
        nodes: Name of each node that runs in integers -> its kernel.
        float_nodes: Name of each node that stays in float -> the reason.
        tensors: Names of the activations that get an encoding, in graph order.
        bounds: Tensor -> the bounds of the Relu or Clip that its encoding takes over.
        moves: (input, output) names that must have the same encoding.
        joins: (inputs, output) names of each Concat in integers, constants included.
        exits: Result of a Conv that only float nodes read -> name of the Conv.
    """

    nodes: dict[str, Kernel] = field(default_factory=dict)
    float_nodes: dict[str, str] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    moves: list[tuple[str, str]] = field(default_factory=list)
    joins: list[tuple[list[str], str]] = field(default_factory=list)
    exits: dict[str, str] = field(default_factory=dict)


def match_nodes(model: Model, globs: Sequence[str], words: Iterable[str] = ()) -> set[str]:
    """Names of the nodes whose name or operator type matches one of the globs.

    Args:
        model: The model.
        globs: The globs.
        words: What else may stand where they do, for near misses.

    Raises:
        RecipeError: A glob matches nothing; near misses are named.
    """
    names = {n.name: n.op for n in model.graph.nodes}
    found: set[str] = set()
    for glob in globs:
        hits = {n for n, op in names.items() if fits(n, glob) or fits(op, glob)}
        if not hits:
            near = difflib.get_close_matches(glob, [*names, *set(names.values()), *words], 3, 0.5)
            hint = f"near: {', '.join(near)}" if near else "onnxq inspect lists the names"
            raise RecipeError(f"{glob!r} matches no node and no operator type", fix=hint)
        found |= hits
    return found


def fits(name: str, glob: str) -> bool:
    """Whether a name is, or matches, a glob."""
    return name == glob or fnmatch.fnmatchcase(name, glob)


def data_inputs(node: gs.Node, kernel: Kernel) -> list[gs.Tensor]:
    """The inputs that carry the values computed on; shapes, axes and biases left out."""
    if kernel.role == "layer":
        return list(node.inputs[:2])
    if kernel.role == "move":
        return list(node.inputs[:1])
    if kernel.role == "join" or node.op in ops.OPERANDS:
        return list(node.inputs)
    return list(node.inputs[:1])


def activation_bounds(model: Model, node: gs.Node) -> tuple[float, float] | None:
    """The bounds that a Relu or Clip imposes; None if they are computed or leave zero out."""
    if node.op not in ops.ACTIVATIONS:
        return None
    if node.op == "Relu":
        return 0.0, INF
    low, high = float(node.attrs.get("min", -INF)), float(node.attrs.get("max", INF))
    for index in (1, 2):
        if len(node.inputs) > index and node.inputs[index].name:
            if not isinstance(node.inputs[index], gs.Constant):
                return None
            value = float(model.array(node.inputs[index]).reshape(-1)[0])
            low, high = (value, high) if index == 1 else (low, value)
    return (low, high) if low <= 0.0 <= high and low < high else None


def gate_factor(node: gs.Node) -> int | None:
    """Input index of x in a product x * f(x); None if the node is no gate."""
    if node.op != "Mul" or len(node.inputs) != 2:
        return None
    for index in (0, 1):
        x, gate = node.inputs[index], producer(node.inputs[1 - index])
        if gate is not None and gate.op in GATES and gate.inputs[0] is x:
            before = producer(x)
            return index if before is not None and before.op == "Conv" else None
    return None


def gate_scales(model: Model, node: gs.Node | None) -> np.ndarray | None:
    """The powers of two by which a node scales the channels of a gate x * f(x), [C].

    None if it does something else.
    """
    if node is None or node.op != "Mul" or len(node.inputs) != 2:
        return None
    y, constant = node.inputs
    gate = producer(y)
    if not isinstance(constant, gs.Constant) or gate is None or gate_factor(gate) is None:
        return None
    shape = tuple(constant.shape)
    if y.shape is None or len(shape) != len(y.shape) - 1 or shape[1:] != (1,) * (len(shape) - 1):
        return None
    scales: np.ndarray = model.array(constant).reshape(-1)
    if shape[0] != y.shape[1] or scales.dtype != np.float32 or (scales <= 0).any():
        return None
    return scales if (np.frexp(scales)[0] == 0.5).all() else None


class Ends:
    """Where the encoding of a result stands: behind the activation that quantizing takes over.

    Args:
        model: The model.
        left: Names of the nodes that are to stay in float.
        lifts: Whether bounds per channel may be lifted to the end of the grid, see `InsertQDQ`.
    """

    def __init__(self, model: Model, left: Collection[str], *, lifts: bool = True) -> None:
        self._model = model
        self._left = left
        self._lifts = lifts

    def absorbed(self, tensor: gs.Tensor, kernel: Kernel) -> gs.Node | None:
        """The Relu or Clip after the tensor that quantizing its result makes redundant."""
        if kernel.role == "move" or self._model.is_output(tensor) or len(tensor.outputs) != 1:
            return None
        node = tensor.outputs[0]
        if self._model.is_nested(node) or node.name in self._left:
            return None
        return node if activation_bounds(self._model, node) is not None else None

    def of(self, tensor: gs.Tensor, kernel: Kernel) -> gs.Tensor:
        """The tensor that gets the encoding: the result, or that of what is taken over after it."""
        activation = self.absorbed(tensor, kernel)
        if activation is None:
            return tensor
        result, before = activation.outputs[0], producer(tensor)
        minimum = self._ceiling(result) if before is not None and before.op == "Conv" else None
        return result if minimum is None else minimum.outputs[0]

    def _ceiling(self, tensor: gs.Tensor) -> gs.Node | None:
        """The Min with one bound per channel that alone reads the result of a Relu.

        Behind a convolution in integers it costs one integer Add: the convolution saturates where
        the bounds are, once each channel is shifted up to the end of the grid.
        """
        before, readers = producer(tensor), consumers(tensor)
        if not self._lifts or tensor.name in self._model.encodings:
            return None
        if before is None or before.op != "Relu" or len(readers) != 1:
            return None
        node = readers[0]
        if node.op != "Min" or len(node.inputs) != 2 or node.inputs[0] is not tensor:
            return None
        if self._model.is_output(tensor) or self._model.is_nested(node) or node.name in self._left:
            return None
        bounds = node.inputs[1]
        if not isinstance(bounds, gs.Constant) or tensor.shape is None:
            return None
        shape = tuple(bounds.shape)
        per_channel = len(shape) == len(tensor.shape) - 1 and shape[1:] == (1,) * (len(shape) - 1)
        return node if per_channel and (self._model.array(bounds) > 0).all() else None


def integer_nodes(model: Model, target: Target) -> dict[str, Kernel]:
    """The nodes that the encodings of the model let run in integers."""
    found = {}
    encodings = model.encodings
    ends = Ends(model, encodings.float_nodes)
    for node in model.graph.nodes:
        kernel = target.kernels.get(node.op)
        if kernel is None or node.name in encodings.float_nodes or not is_standard(node):
            continue
        if any(t.name not in encodings for t in data_inputs(node, kernel) if t.name):
            continue
        results = [ends.of(t, kernel) for t in node.outputs if t.name]
        if not kernel.float_output and any(t.name not in encodings for t in results):
            continue
        found[node.name] = kernel
    return found


def written_activations(
    model: Model, kernels: Mapping[int, Kernel]
) -> dict[str, tuple[gs.Tensor, bool]]:
    """The activations behind which a QuantizeLinear stands, by name, and for whom.

    True where all readers see what it makes, as behind an integer node; False where only the
    integer ones do.  What an operator makes that is given integers is on their grid already.

    Args:
        model: A model with encodings.
        kernels: id of each node that runs in integers -> its kernel.
    """
    ends = Ends(model, model.encodings.float_nodes)
    reads: dict[str, tuple[gs.Tensor, bool]] = {}
    results: dict[str, tuple[gs.Tensor, bool]] = {}
    for node in model.graph.nodes:
        kernel = kernels.get(id(node))
        if kernel is None:
            continue
        for tensor in data_inputs(node, kernel):
            if tensor.name in model.encodings and not isinstance(tensor, gs.Constant):
                reads[tensor.name] = tensor, False
        for tensor in node.outputs:
            end = ends.of(tensor, kernel) if tensor.name else tensor
            if tensor.name and end.name in model.encodings:
                results[end.name] = end, True
    found = {}
    for name, (tensor, everyone) in {**reads, **results}.items():
        source = producer(tensor)
        if source is None or id(source) not in kernels or not kernels[id(source)].bare:
            found[name] = tensor, everyone
    return found


def place(
    model: Model, target: Target, exclude: Sequence[str] = (), activations: str | None = None
) -> Placement:
    """Decide what runs in integers.

    Args:
        model: A model whose BatchNormalizations are folded as far as they can be.
        target: The runtime's contract.
        exclude: Globs on node names and operator types that are to stay in float.
        activations: Their element type; None: the target's first.

    Raises:
        RecipeError: A glob matches nothing.
    """
    model.infer()
    dtype = target.activations[0] if activations is None else activations
    return _Placer(model, target, match_nodes(model, exclude), dtype).run()


class _Placer:
    """The greatest set of nodes in which every one has reason to be (a fixed point)."""

    def __init__(self, model: Model, target: Target, excluded: set[str], dtype: str) -> None:
        self.model = model
        self.target = target
        self.dtype = dtype
        self.ends = Ends(model, excluded, lifts=not target.symmetric)
        self.reasons: dict[str, str] = {}
        self.nodes: dict[int, gs.Node] = {}
        for node in model.graph.nodes:
            why = "excluded" if node.name in excluded else self._unfit(node)
            if why is None:
                self.nodes[id(node)] = node
            else:
                self.reasons[node.name] = why
        for node in [*self.nodes.values()]:
            for tensor in node.outputs if id(node) in self.nodes else ():
                taken = self.ends.absorbed(tensor, self.kernel(node))
                if taken is not None and self.nodes.pop(id(taken), None) is not None:
                    self.reasons[taken.name] = f"{node.name} takes it over"
        # tensor that gets the encoding -> the node that it is the result of
        self.origins = {
            id(self.ends.of(t, self.kernel(n))): n
            for n in self.nodes.values()
            for t in n.outputs
            if t.name
        }

    def kernel(self, node: gs.Node) -> Kernel:
        return self.target.kernels[node.op]

    def run(self) -> Placement:
        changed = True
        while changed:
            changed = False
            for node in [*reversed(self.nodes.values())]:
                why = self._pointless(node)
                if why is not None:
                    del self.nodes[id(node)]
                    self.reasons[node.name] = why
                    changed = True
        return self._result()

    # -------------------------------------------------------------- may it?

    def _unfit(self, node: gs.Node) -> str | None:
        """Why a node cannot run in integers, whatever surrounds it."""
        kernel = self.target.kernels.get(node.op)
        if has_subgraph(node):
            return "holds a subgraph"
        if kernel is None or not is_standard(node):
            return f"{self.target.name} has no integer {node.op}"
        data = data_inputs(node, kernel)
        for tensor in (*data, *node.outputs):
            if tensor.name and tensor.dtype is not None and tensor.dtype != np.float32:
                return "does not compute in float32"
        if not any(_varies(t) for t in data):
            return "its data are constants"
        if kernel.role == "move":
            return self._unfit_move(node)
        if kernel.role == "layer":
            return self._unfit_layer(node)
        if kernel.role == "elementwise" and any(t.name and not _varies(t) for t in data):
            if gate_scales(self.model, node) is not None:
                return "with one scale for all it could not even out the channels of its gate"
            if self.target.whole:
                return None
            if any(self._wide(t) for t in data if not _varies(t)):
                return "one scale for its constant would round the small values away"
            source = next(t for t in data if _varies(t))
            before = producer(source)
            if before is not None and self._float_output(before):
                return "the layer before it gives float at no cost"
        return None

    def _wide(self, tensor: gs.Tensor) -> bool:
        """Whether 8 bits with one scale lose the small values of a constant."""
        values = np.abs(self.model.array(tensor))
        return bool(values.any()) and values[values > 0].min() < values.max() / WIDEST

    def _unfit_layer(self, node: gs.Node) -> str | None:
        layer = Layer.of(self.model, node)
        if layer is None and node.op == "MatMul":
            if (self.dtype, self.dtype) in self.target.pairs:
                return None
            return f"{self.target.name} multiplies no {self.dtype} by {self.dtype}"
        if layer is None:
            return "its weight is computed, not constant"
        if node.op == "ConvTranspose" and layer.group > 1:
            return "its groups share scales"
        if node.op == "Gemm" and layer.side != 1:
            return "its weight is on the left side"
        if node.op == "Gemm" and float(node.attrs.get("beta", 1.0)) != 1.0:
            return "its beta is not 1"
        if layer.bias_tensor is not None and layer.bias is None:
            return "its bias is computed, not constant"
        if layer.bias is not None and not _one_row(layer.bias.shape, layer.output_channels):
            return "its bias is not one value per output channel"
        return None

    def _unfit_move(self, node: gs.Node) -> str | None:
        if not ops.is_movement(node.op, node.attrs):
            return f"{self.target.name} has no integer {node.op} in this mode"
        if sum(bool(t.name) for t in node.outputs) > 1 and node.op != "Split":
            return "gives a second output"
        if node.op == "Pad" and len(node.inputs) > 2 and node.inputs[2].name:
            value = node.inputs[2]
            if not isinstance(value, gs.Constant) or np.any(self.model.array(value)):
                return "pads with something else than zero"
        return None

    def _float_output(self, node: gs.Node) -> bool:
        kernel = self.target.kernels.get(node.op)
        return kernel is not None and kernel.float_output

    # -------------------------------------------------------------- is it worth it?

    def _pointless(self, node: gs.Node) -> str | None:
        """Why a node that could run in integers should not, given the others."""
        kernel = self.kernel(node)
        if kernel.role == "layer" or self.target.whole:
            return None
        ends = [self.ends.of(t, kernel) for t in node.outputs if t.name]
        if not any(self._read(t) for t in ends):
            return "nothing reads its result as integers"
        if kernel.role == "move":
            return None
        arrive = [self._arrives(t) for t in data_inputs(node, kernel) if _varies(t)]
        if not (any(arrive) if kernel.role == "join" else all(arrive)):
            return "an input of it is computed in float"
        return None

    def _read(self, tensor: gs.Tensor) -> bool:
        """Whether something reads the tensor as integers."""
        for node in consumers(tensor):
            if id(node) in self.nodes:
                data = data_inputs(node, self.kernel(node))
                if any(t is tensor for t in data):
                    return True
        return False

    def _arrives(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is there as integers anyhow, or costs little to be (inputs)."""
        while producer(tensor) is not None:
            node = self.origins.get(id(tensor))
            if node is None or id(node) not in self.nodes:
                return False
            if self.kernel(node).role != "move":
                return True
            tensor = node.inputs[0]
        return True

    # -------------------------------------------------------------- what follows

    def _result(self) -> Placement:
        result = Placement(float_nodes=self.reasons)
        wanted: dict[str, None] = {}
        for node in self.model.graph.nodes:
            if id(node) not in self.nodes:
                continue
            kernel = self.kernel(node)
            result.nodes[node.name] = kernel
            data = [t for t in data_inputs(node, kernel) if _varies(t)]
            wanted.update((t.name, None) for t in data)
            for tensor in node.outputs:
                self._finish_output(result, wanted, node, tensor)
            if kernel.role == "move":
                result.moves += [(data[0].name, t.name) for t in node.outputs if t.name in wanted]
            if kernel.role == "join":
                end = self.ends.of(node.outputs[0], kernel)
                result.joins.append(([t.name for t in node.inputs], end.name))
        result.tensors = list(wanted)
        return result

    def _finish_output(
        self, result: Placement, wanted: dict[str, None], node: gs.Node, tensor: gs.Tensor
    ) -> None:
        if not tensor.name:
            return
        kernel = self.kernel(node)
        end = self.ends.of(tensor, kernel)
        if kernel.float_output and not self._read(end):
            return
        wanted[end.name] = None
        before = producer(end)
        lowered = before is not None and before.op == "Min"
        if node.op == "Conv" and not lowered and not self._read(end):
            result.exits[end.name] = node.name
        if end is not tensor:
            activation = tensor.outputs[0]
            bounds = activation_bounds(self.model, activation)
            if bounds is not None:
                result.bounds[end.name] = bounds
            self.reasons.pop(activation.name, None)
            if before is not None:
                self.reasons.pop(before.name, None)


def _one_row(shape: Sequence[int], channels: int) -> bool:
    """Whether a bias of this shape is the same for every row: [], [1], [C], [1, C]."""
    return all(n == 1 for n in shape[:-1]) and all(n in (1, channels) for n in shape[-1:])


def _varies(tensor: gs.Tensor) -> bool:
    return bool(tensor.name) and not isinstance(tensor, gs.Constant)
