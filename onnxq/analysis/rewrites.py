"""What onnxruntime does to a Q/DQ model before it fuses, done to a copy of the model.

The steps and their order are those of onnxruntime 1.32: duplicate Qs become one, a pair between two
pairs goes, MatMul and Add become Gemm, pairs spread through data movement, float constants of
layers are quantized, Relu and Clip go where the Q after them does their work, and on x86-64 int8
becomes uint8 in pairs that one node reads.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.qdq import (
    Grid,
    dequantize_before,
    is_dequantize,
    is_qdq,
    is_quantize,
    limits,
    quantized_by,
)
from onnxq.analysis.qdq_graph import QdqGraph
from onnxq.model import Model, consumers, has_subgraph, is_standard, producer, rewire
from onnxq.placement import activation_bounds

__all__ = ["Rewritten"]

# Data movement through which pairs spread.
SPREADS = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
# Layers whose float weights and biases are quantized.
_FILLED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_ACTIVATIONS = ("Relu", "Clip")


class Rewritten(QdqGraph):
    """A model as onnxruntime sees it when it looks for Q/DQ patterns.

    Args:
        source: The model, with the types of its tensors; left as it is.
        arm: Whether int8 activations stay int8, as on ARM.

    Attributes:
        model: The rewritten copy.
        arm: Whether int8 activations stay int8.
        nodes: Name of each node of the source that is left -> the node in the copy.
        gone: Names of nodes that do nothing.
        taken: Name of each node that another does the work of -> that node's name.
        filled: (name of a layer, input index) of float constants that onnxruntime quantizes.
        unloadable: Names of nodes behind which onnxruntime writes a pair that it then breaks, so
            that it does not load the model.
    """

    def __init__(self, source: Model, *, arm: bool) -> None:
        super().__init__(source, arm=arm)
        self.gone: set[str] = set()
        self.taken: dict[str, str] = {}
        self.filled: set[tuple[str, int]] = set()
        self.unloadable: list[str] = []
        self._drop_identities()
        self._merge_equal()
        self._merge_quantizes()
        self._merge_pairs()
        self._transpose_weights()
        self._pads()
        self._gemms()
        self._spread_forward()
        self._spread_backward()
        self._fill()
        self._absorb()
        if not arm:
            self._make_unsigned()
        self.nodes = {n.name: n for n in self.model.graph.nodes}

    # ------------------------------------------------------------------ clearing up

    def _drop(self, node: gs.Node, *, name: bool = True) -> None:
        """Take a node out whose output is its input."""
        self.model.bypass(node)
        if name:
            self.gone.add(node.name)

    def _drop_identities(self) -> None:
        for node in [*self.model.graph.nodes]:
            if is_standard(node) and _does_nothing(node) and self.model.can_bypass(node):
                self._drop(node)

    def _merge_equal(self) -> None:
        """One node for all that do the same to the same tensors."""
        known: dict[tuple[object, ...], gs.Node] = {}
        for node in [*self.model.graph.nodes]:
            own = any(isinstance(value, gs.Tensor) for value in node.attrs.values())
            if is_qdq(node) or has_subgraph(node) or own or node.op.startswith("Random"):
                continue
            key = (
                node.op,
                node.domain,
                repr(sorted(node.attrs.items())),
                *(_value(self.model, t) for t in node.inputs),
            )
            first = known.setdefault(key, node)
            if first is node or any(map(self.is_output, node.outputs)):
                continue
            for new, old in zip(first.outputs, node.outputs, strict=False):
                for reader in [*old.outputs]:
                    rewire(reader, old, new)
            self.taken[node.name] = first.name
            self._remove(node)

    def _merge_quantizes(self) -> None:
        """One Q for all that are equal."""
        for node in [*self.model.graph.nodes]:
            if not is_quantize(node) or not node.outputs:
                continue
            for other in quantized_by(node.inputs[0]):
                if other is node or self.is_output(other.outputs[0]):
                    continue
                if self.grid(other).equals(self.grid(node)):
                    for reader in [*other.outputs[0].outputs]:
                        rewire(reader, other.outputs[0], node.outputs[0])
                    self._remove(other)

    def _merge_pairs(self) -> None:
        """Q DQ Q DQ becomes Q DQ, with what both grids hold."""
        for first in [*self.model.graph.nodes]:
            while is_quantize(first) and first.outputs:
                chain = [first]
                while len(chain) < 4 and (after := self._only_reader(chain[-1])) is not None:
                    chain.append(after)
                kinds = [n.op == "QuantizeLinear" for n in chain if is_qdq(n)]
                if kinds != [True, False, True, False]:
                    break
                grids = [self.grid(n) for n in chain]
                merged = _merged(grids)
                if merged is None:
                    break
                for node in (chain[0], chain[3]):
                    self._grids[id(node)] = merged
                rewire(chain[3], chain[2].outputs[0], first.outputs[0])
                self._remove(chain[1])
                self._remove(chain[2])

    # ------------------------------------------------------------------ layers

    def _transpose_weights(self) -> None:
        """A Transpose of a dequantized constant is done to the integers, if it says its order."""
        for node in [*self.model.graph.nodes]:
            before = dequantize_before(node.inputs[0]) if node.op == "Transpose" else None
            if before is None or not isinstance(before.inputs[0], gs.Constant):
                continue
            if self.is_output(node.outputs[0]) or len(before.outputs[0].outputs) != 1:
                continue
            grid, order = self.grid(before), list(node.attrs.get("perm", ()))
            if not order:  # it is not seen through
                continue
            if not grid.single and grid.axis % len(order) in order:
                self._grids[id(before)] = replace(grid, axis=order.index(grid.axis % len(order)))
            self._drop(node)

    def _pads(self) -> None:
        """Zeros around the input of a Conv become its padding."""
        for node in [*self.model.graph.nodes]:
            after = self._only_reader(node) if node.op == "Pad" else None
            if after is None or after.op != "Conv" or after.inputs[0] is not node.outputs[0]:
                continue
            if _pads_zeros(self.model, node) and after.attrs.get("auto_pad", "NOTSET") == "NOTSET":
                self.taken[node.name] = after.name
                self._drop(node, name=False)

    def _gemms(self) -> None:
        """MatMul and Add become a Gemm."""
        for node in [*self.model.graph.nodes]:
            if node.op != "MatMul" or not is_standard(node) or self.is_output(node.outputs[0]):
                continue
            readers = self.readers(node.outputs[0])
            if len(readers) != 1 or readers[0].op != "Add" or id(readers[0]) not in self._main:
                continue
            add = readers[0]
            bias = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
            if bias is node.outputs[0] or not _is_gemm(node, bias):
                continue
            result = add.outputs[0]
            add.inputs.clear()
            add.outputs.clear()
            node.inputs.append(bias)
            node.outputs[0] = result
            node.op = "Gemm"
            self.taken[add.name] = node.name
            self.model.graph.nodes[:] = [n for n in self.model.graph.nodes if n is not add]

    def _fill(self) -> None:
        """Float weights and biases of layers between DQ and Q are quantized."""
        for node in self.model.graph.nodes:
            if node.op not in _FILLED or not is_standard(node):
                continue
            weight = node.inputs[1]
            bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
            first, second = dequantize_before(node.inputs[0]), dequantize_before(weight)
            if first is None or first.inputs[1].shape not in ((), (1,), [], [1]):
                continue
            if not self._leads_to_quantize(node):
                continue
            if second is None and not _is_float(weight):
                continue
            if bias is not None and not (_is_float(bias) and len(bias.shape) == 1):
                continue
            if second is not None and (bias is None or not self._fits(node, second, bias)):
                continue
            if second is None:
                self.filled.add((node.name, 1))
            if bias is not None:
                self.filled.add((node.name, 2))

    def _leads_to_quantize(self, node: gs.Node) -> bool:
        after = self._only_reader(node)
        while after is not None and after.op in _ACTIVATIONS:
            after = self._only_reader(after)
        return is_quantize(after)

    def _fits(self, node: gs.Node, weight: gs.Node, bias: gs.Constant) -> bool:
        """Whether the scales of a weight are those of its bias."""
        grid = self.grid(weight)
        if grid.scale is None or grid.scale.size == 1:
            return grid.scale is not None
        if grid.block or grid.scale.shape != tuple(bias.shape):
            return False
        rank = 2 if weight.inputs[0].shape is None else len(weight.inputs[0].shape)
        wanted = 0 if node.op != "Gemm" or node.attrs.get("transB", 0) else 1
        return grid.axis % rank == wanted

    # ------------------------------------------------------------------ pairs through movement

    def _spread_forward(self) -> None:
        waiting = [n for n in self.model.graph.nodes if is_dequantize(n)]
        while waiting:
            node = waiting.pop(0)
            grid = self.grid(node)
            if not grid.known or not grid.single:
                continue
            for reader in consumers(node.outputs[0]):
                if not self._moves(reader) or reader.inputs[0] is not node.outputs[0]:
                    continue
                result = reader.outputs[0]
                floats = [n for n in result.outputs if not is_quantize(n)]
                alone = self.is_output(result) and not result.outputs
                if floats and not self.is_output(result):
                    waiting.append(self._insert(result, floats, grid))
                elif alone:
                    waiting.append(self._insert(result, [], grid))

    def _spread_backward(self) -> None:
        for node in [n for n in self.model.graph.nodes if is_quantize(n)]:
            grid = self.grid(node)
            if not grid.known or not grid.single:
                continue
            tensor = node.inputs[0]
            while self._one_edge(tensor):
                source = producer(tensor)
                if source is None or not self._moves(source):
                    break
                tensor = source.inputs[0]
                before = producer(tensor)
                if not self._one_edge(tensor) or before is None or is_dequantize(before):
                    break
                self._insert(tensor, [source], grid)

    def _moves(self, node: gs.Node) -> bool:
        return node.op in SPREADS and is_standard(node) and id(node) in self._main

    # ------------------------------------------------------------------ activations, signs

    def _absorb(self) -> None:
        """Relu and Clip go where the Q after them does their work."""
        for node in [*self.model.graph.nodes]:
            if node.op not in _ACTIVATIONS or not is_standard(node):
                continue
            after = self._only_reader(node)
            if after is None or not is_quantize(after) or not self._cut(node, after):
                continue
            self.taken[node.name] = after.name
            self._drop(node, name=False)

    def _cut(self, node: gs.Node, quantize: gs.Node) -> bool:
        """Whether a Q alone does the work of the Relu or Clip before it."""
        grid = self.grid(quantize)
        if not grid.has_zero or not grid.single or grid.dtype not in ("uint8", "int8"):
            return False
        if node.op == "Relu":
            return grid.point is not None and grid.point[1] == limits(grid.dtype)[0]
        span, bounds = grid.bounds, activation_bounds(self.model, node)
        if span is None or bounds is None or grid.scale is None or grid.scale.shape != ():
            return False
        epsilon = float(np.finfo(np.float32).eps)
        return bounds[0] - span[0] <= epsilon and span[1] - bounds[1] <= epsilon

    def _make_unsigned(self) -> None:
        """On x86-64 int8 becomes uint8 in pairs whose Q has one reader."""
        for node in self.model.graph.nodes:
            before = producer(node.inputs[0]) if is_dequantize(node) else None
            if before is not None and is_quantize(before) and self._is_pair(before, node):
                self._unsigned.add(id(node.inputs[0]))
                self._note_broken(before)

    def _note_broken(self, quantize: gs.Node) -> None:
        """A Q that onnxruntime wrote says that it gives int8, since operator set 21.

        Only the last one of a chain keeps that, and none with a Q of the model beside it or behind
        it.
        """
        written = id(quantize) in self._inserted and self.grid(quantize).dtype == "int8"
        readers = [r for n in consumers(quantize.outputs[0]) for r in consumers(n.outputs[0])]
        source = producer(quantize.inputs[0])
        if not written or source is None or self.model.opset < 21:
            return
        alone = len(quantized_by(quantize.inputs[0])) == 1
        if alone and not any(self._moves(r) for r in readers):
            self.unloadable.append(source.name)

    def _is_pair(self, quantize: gs.Node, dequantize: gs.Node) -> bool:
        grids = self.grid(quantize), self.grid(dequantize)
        if self.is_output(quantize.outputs[0]) or self.pair_readers(quantize) != 1:
            return False
        if not all(g.has_zero and g.zero is not None and g.zero.size == 1 for g in grids):
            return False
        zeros = [None if g.zero is None else int(g.zero.reshape(-1)[0]) for g in grids]
        return grids[0].dtype == grids[1].dtype and zeros[0] == zeros[1]


def _value(model: Model, tensor: gs.Tensor) -> object:
    """What tells tensors apart: a single value itself, others by identity."""
    if isinstance(tensor, gs.Constant) and tuple(tensor.shape) in ((), (1,)):
        array = model.array(tensor)
        return array.dtype.name, array.shape, array.tobytes()
    return id(tensor) if tensor.name else None


def _does_nothing(node: gs.Node) -> bool:
    if node.op in ("Identity", "Dropout"):
        return not has_subgraph(node)
    if node.op == "Cast":
        kind = node.inputs[0].dtype
        return kind is not None and kind == node.outputs[0].dtype
    return False


def _pads_zeros(model: Model, node: gs.Node) -> bool:
    """Whether a Pad puts zeros around height, width and the like, and around nothing else."""
    if node.attrs.get("mode", "constant") != "constant" or len(node.inputs) > 3:
        return False
    if not all(isinstance(t, gs.Constant) for t in node.inputs[1:]):
        return False
    pads = model.array(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attrs["pads"])
    around = pads.reshape(2, -1)[:, :2]
    filled = len(node.inputs) > 2 and node.inputs[2].name and model.array(node.inputs[2]).any()
    return not around.any() and bool((pads >= 0).all()) and not filled


def _is_float(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32


def _is_gemm(node: gs.Node, bias: gs.Tensor) -> bool:
    """Whether onnxruntime makes a Gemm of a MatMul and the Add of this bias."""
    left, right = (t.shape for t in node.inputs)
    if left is None or right is None or bias.shape is None or len(right) != 2:
        return False
    if len(left) > 2 and not all(isinstance(n, int) for n in left):
        return False
    columns = right[1]
    return len(left) >= 2 and tuple(bias.shape) in ((columns,), (1, columns))


def _merged(grids: list[Grid]) -> Grid | None:
    """The grid of Q DQ Q DQ once the middle is gone; None where it stays."""
    if not all(g.known and g.single and g.has_zero for g in grids):
        return None
    first, second = grids[0], grids[2]
    if not first.equals(grids[1]) or not second.equals(grids[3]):
        return None
    if first.dtype != second.dtype or first.dtype not in ("uint8", "int8"):
        return None
    if first.equals(second):
        return first
    if first.point is None or second.point is None:
        return None
    # in float32, as onnxruntime does: the last bit decides about data movement around it
    low, high = (np.float32(n) for n in limits(first.dtype))
    points = [(np.float32(scale), np.float32(zero)) for scale, zero in (first.point, second.point)]
    least = max((low - zero) * scale for scale, zero in points)
    most = min((high - zero) * scale for scale, zero in points)
    scale = (most - least) / (high - low)
    zero = np.round(low - least / scale)
    return replace(
        first,
        scale=np.array(scale, np.float32),
        zero=np.array(zero).astype(first.dtype),
    )
