"""Make encodings real: QuantizeLinear and DequantizeLinear where the runtime fuses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.errors import ModelError
from onnxq.model import Layer, Model, consumers, producer, rewire
from onnxq.ops import FUNCTIONS, OPERANDS, bias_input
from onnxq.pass_manager import Changes, Context
from onnxq.placement import (
    Ends,
    activation_bounds,
    data_inputs,
    gate_scales,
    integer_nodes,
    written_activations,
)
from onnxq.row_blocks import split_rows
from onnxq.targets import Kernel, Storage, Target
from onnxq.weight_only import weight_only, write
from onnxq.widths import saturate

__all__ = ["InsertQDQ"]

# What may stand, in float, between integers.
ISLAND = FUNCTIONS | OPERANDS


@dataclass(frozen=True, kw_only=True)
class InsertQDQ:
    r"""Write the model's encodings as QuantizeLinear (Q) and DequantizeLinear (DQ).

    Before and after, for a convolution whose Relu the integer kernel takes over::

        x -> Conv -> Relu -> y          x -> Q -> DQ -> Conv -> Relu -> Q -> DQ -> y
             /  \                                       /  \
            W    b                       DQ(W: int8) --'    '-- DQ(b: int32, scale s_x * s_w)

    1. A node runs in integers if the target has a kernel for it, everything that it reads has an
       encoding, and so has its result (Gemm and MatMul may also give float).
    2. The pair stands after the tensor.  Behind an integer node every reader gets the DQ; behind
       a float node only the integer readers do, the others keep the exact float.
    3. A bias becomes int32 with scale s_x * s_w and zero point 0, one copy per layer; for targets
       that take no such thing it stays float.  Nor stands a Relu or Clip before Q where a target
       finds no pattern across it.
    4. Pad has no fusion in onnxruntime, so it is written on the integers, padding with the zero
       point.
    5. An encoding per channel of a Conv's result is multiplied into the scales of its weight; Q
       then has scale 1, and DQ the scales of the channels.
    6. An output of the model keeps its name.
    7. A bound per channel after a Relu (Min with a constant) becomes the saturation of integers:
       the bias shifts each channel up until its bound is the end of the grid, and an Add of the
       negative shifts, which saturates at zero, brings it back.  That is within half a step::

           Conv(b) -> Relu -> Min(m)     =>     Conv(b + d) -> Q -> DQ -> Add(-d) -> Q -> DQ
                                                d = end of the grid - m, in whole steps

    8. Powers of two per channel that even out a gate become the scales of Q::

           y -> Mul(t) -> Q(s) -> DQ(s)     =>     y -> Q(s / t per channel) -> DQ(s)

    9. Where floats become integers again, Q and DQ per channel stand between reshapes to [N, C, L].
       onnxruntime would turn [N, C, H, W] channels-last, where they take ten times as long; and
       it gives each reader a DQ of its own, which would part the factors of a gate, or fuses it
       where its kernel wants a single scale::

           Q -> DQ(per channel)     =>     Q -> Reshape -> DQ(per channel) -> Reshape

    10. A float Concat of what is on its grid already and of the rest is joined in integers, and a
        power of two by which a part is magnified becomes the scale of its Q.

    11. Weights of 4 bits and fewer are packed, half a byte each.  Where they meet integers they are
        unpacked to int8, which the runtime does once, as it loads the model::

            W: int4 -> Cast(int8) -> DQ -> Conv

    12. Activations of other widths than 8 and 16 bits, for which no runtime has kernels, lie in the
        next wider type, with a Clip that keeps them within their own limits.

    13. A weight that has an encoding, while its layer's input has none, is all that is written: the
        runtime multiplies it by floats.  A Gemm's weight is turned to K x N for that::

            W: int4 -> DQ(block_size) -> MatMul, Gemm

        A Relu after it becomes a LeakyRelu of slope 0, a Clip becomes Max and Min: onnxruntime
        fuses no weight before a Relu or Clip.

    14. Where a convolution steps along one row, as of sound, and reads parts of it that are joined,
        as those of residual-input, neighbours become channels.  These are the same sums in the
        order that integer kernels want, channels last, so nothing is transposed.  It takes b >= 8
        that divides L and the stride, no padding, and a kernel of about whole blocks::

            x [N, 1, L] -> parts -> Concat [N, p, L] -> Conv, stride s
            x -> Reshape [N, L / b, b] -> parts -> Concat -> Transpose -> Conv, stride s / b

    Nothing is written around nodes that stay in float.

    Args:
        stored: How weights of 4 bits and fewer lie in the file: "packed", which takes operator set
            21, or "int8", a byte each, for runtimes that know no 4-bit types.  None: as the target
            says, but in bytes where the model cannot be converted to operator set 21.

    Source: ONNX operator specification; onnxruntime's qdq_selectors.cc.
    """

    name: ClassVar[str] = "insert-qdq"

    stored: Storage | None = None

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Rewrite the graph."""
        changes = Changes()
        packed = self._raise_opset(model, ctx, changes)
        ctx.target.check_opset(model.opset)
        if ctx.target.fixed_sizes and (why := _open_sizes(model)):
            changes.skip("model", f"{why}: {ctx.target.name} wants them fixed")
        nodes = integer_nodes(model, ctx.target)
        ends = Ends(model, model.encodings.float_nodes)
        lowered = [
            _lower_ceiling(model, n, ends.of(n.outputs[0], nodes[n.name]), changes)
            for n in [*model.graph.nodes]
            if n.name in nodes
        ]
        if not ctx.target.keeps_activation:
            _drop_activations(model, nodes, changes)
        layers = [layer for layer in model.layers() if layer.name in nodes and ctx.target.cpu]
        split = [split_rows(model, layer) for layer in layers]
        for what in filter(None, split):
            changes.add(what)
        if any(lowered) or any(split):
            nodes = integer_nodes(model, ctx.target)
        alone = weight_only(model, nodes)
        if not nodes and not alone:
            changes.skip("model", "no operator that the target runs in integers has encodings")
            return changes
        writer = _Writer(model, nodes, ctx.target, packed=packed)
        writer.constants()
        writer.activations()
        for layer in alone:
            writer.added += write(layer, packed=packed)
        model.insert(writer.added)
        model.cleanup()
        if nodes:
            changes.add(f"{len(nodes)} nodes in integers, {writer.pairs} Q/DQ pairs")
        if alone:
            changes.add(f"{len(alone)} layers with nothing but the weight in integers")
        return changes

    def _raise_opset(self, model: Model, ctx: Context, changes: Changes) -> bool:
        """Bring the model to the operator set that its encodings need; whether it knows int4."""
        model.raise_opset(model.encodings.opset)
        found = [layer.weight_encoding for layer in model.layers()]
        known = [encoding for encoding in found if encoding is not None]
        stored = self.stored or ctx.target.stored
        if stored == "int8" or all(encoding.bits > 4 for encoding in known):
            return False
        try:
            model.raise_opset(21)
        except ModelError as error:
            if self.stored is not None:
                raise
            changes.skip("model", f"its weights take a byte each: {error.what}")
            return False
        return True


def _open_sizes(model: Model) -> str:
    """What sizes of the inputs are open; empty where all are fixed."""
    found = [t for t in model.graph.inputs if not all(isinstance(n, int) for n in t.shape or [""])]
    return ", ".join(f"sizes of {t.name} are open" for t in found)


def _drop_activations(model: Model, nodes: dict[str, Kernel], changes: Changes) -> None:
    """Leave out each Relu and Clip that quantizing takes over, where the grid is within bounds."""
    ends, dropped = Ends(model, model.encodings.float_nodes), 0
    for node in [*model.graph.nodes]:
        kernel = nodes.get(node.name)
        for index, tensor in enumerate(node.outputs if kernel is not None else ()):
            assert kernel is not None
            activation = ends.absorbed(tensor, kernel)
            if activation is None or activation.name in nodes:
                continue
            result, bounds = activation.outputs[0], activation_bounds(model, activation)
            encoding = model.encodings.get(result.name)
            if encoding is None or bounds is None:
                continue
            slack = 1e-6 * max(encoding.high, -encoding.low)  # the grid is that of a float32 scale
            if encoding.low < bounds[0] - slack or encoding.high > bounds[1] + slack:
                changes.skip(activation.name, "the grid of its result leaves its bounds")
                continue
            activation.inputs.clear()
            activation.outputs.clear()
            node.outputs[index] = result
            dropped += 1
    if dropped:
        model.cleanup()
        changes.add(f"{dropped} Relu and Clip are left to the saturation of Q")


def _lower_ceiling(model: Model, node: gs.Node, result: gs.Tensor, changes: Changes) -> bool:
    """Turn the bounds per channel behind a convolution into saturation; False if it has none."""
    minimum, layer = producer(result), Layer.of(model, node)
    if layer is None or layer.op != "Conv" or minimum is None or minimum.op != "Min":
        return False
    relu = minimum.inputs[0].inputs[0]
    encoding = model.encodings[result.name]
    bounds = model.array(minimum.inputs[1]).reshape(-1).astype(np.float64)
    scale = float(encoding.scale)
    steps = np.clip(np.rint((encoding.high - bounds) / scale), 0, encoding.qmax - encoding.qmin)
    rank = len(result.shape)
    minimum.inputs.clear()
    minimum.outputs.clear()
    if not steps.any():  # the end of the grid is below all bounds
        relu.outputs[0] = result
        changes.add(f"{minimum.name}: the grid ends below its bounds")
        return True
    bias = np.zeros(len(bounds)) if layer.bias is None else layer.bias.astype(np.float64)
    layer.set_bias((bias + steps * scale).astype(np.float32))
    relu.inputs.clear()
    relu.outputs.clear()
    back = model.constant(
        f"{minimum.name}.shift", (-steps * scale).astype(np.float32).reshape(-1, *[1] * (rank - 2))
    )
    zero = np.array(encoding.qmax, np.int32)
    model.encodings.derive(back.name, Encoding(encoding.dtype, encoding.scale, zero))
    model.encodings.derive(layer.y.name, encoding)
    model.insert([gs.Node("Add", f"{minimum.name}.add", {}, [layer.y, back], [result])])
    changes.add(f"{minimum.name}: bounds of {int((steps > 0).sum())} channels by saturation")
    return True


class _Writer:
    def __init__(
        self, model: Model, nodes: dict[str, Kernel], target: Target, *, packed: bool
    ) -> None:
        self.model = model
        self.target = target
        self.packed = packed
        self.kernels = {id(n): nodes[n.name] for n in model.graph.nodes if n.name in nodes}
        self.nodes = [n for n in model.graph.nodes if id(n) in self.kernels]
        self.ends = Ends(model, model.encodings.float_nodes)
        self.added: list[gs.Node] = []
        self.pairs = 0
        self._integers: dict[str, gs.Variable] = {}
        self._flat = {
            t.name
            for n in self.nodes
            for t in n.outputs
            if n.op == "Conv" and self._exit(Layer.of(model, n)) and self._is_island(t)
        }
        self._weights: dict[str, gs.Variable] = {}

    # -------------------------------------------------------------- weights and biases

    def constants(self) -> None:
        """Constants of integer nodes to integers, and biases to int32."""
        for node in self.nodes:
            layer = Layer.of(self.model, node)
            for index, tensor in enumerate(node.inputs):
                data = data_inputs(node, self.kernels[id(node)])
                if isinstance(tensor, gs.Constant) and any(t is tensor for t in data):
                    encoding = self.model.encodings[tensor.name]
                    leaving = self._exit(layer)
                    if layer is not None and leaving is not None:
                        node.inputs[index] = self._scaled(layer, tensor, encoding, leaving)
                        continue
                    if layer is not None and layer.bias is not None and self._integer_bias:
                        self._bias(layer, encoding)
                    node.inputs[index] = self._dequantized(tensor, encoding)

    @property
    def _integer_bias(self) -> bool:
        return self.target.bias == "int32"

    def _exit(self, layer: Layer | None) -> Encoding | None:
        """The encoding per channel of a convolution's result; None if it has one scale."""
        if layer is None or layer.op != "Conv":
            return None
        end = self.ends.of(layer.y, self.kernels[id(layer.node)])
        encoding = self.model.encodings.get(end.name)
        return encoding if encoding is not None and encoding.axis is not None else None

    def _scaled(
        self, layer: Layer, tensor: gs.Constant, weight: Encoding, leaving: Encoding
    ) -> gs.Variable:
        """The weight and bias of a convolution that gives integers of each channel's own scale.

        With y = s_c (q - z_c) wanted, the convolution gives y / s_c + z_c: its weight scales are
        divided by s_c, and the zero point goes into the bias.
        """
        integers = weight.quantize(self.model.array(tensor))
        channels = leaving.scale.shape[0]
        scale = (np.broadcast_to(weight.scale, channels) / leaving.scale).astype(np.float32)
        zero = np.broadcast_to(weight.zero_point, channels).astype(np.int32)
        bias = np.zeros(channels) if layer.bias is None else layer.bias.astype(np.float64)
        encoding = Encoding(weight.dtype, scale, zero, 0)
        self._bias(layer, encoding, bias / leaving.scale + leaving.zero_point)
        name = f"{tensor.name}_{layer.name}"
        return self._dequantize(name, self._weight(name, integers, encoding), encoding)

    def _dequantized(self, tensor: gs.Constant, encoding: Encoding) -> gs.Variable:
        if tensor.name not in self._weights:
            values = encoding.quantize(self.model.array(tensor))
            integers = self._weight(tensor.name, values, encoding)
            self._weights[tensor.name] = self._dequantize(tensor.name, integers, encoding)
        return self._weights[tensor.name]

    def _weight(self, name: str, integers: np.ndarray, encoding: Encoding) -> gs.Tensor:
        """Integers as int8 or uint8; packed in the file where they fit into 4 bits."""
        stored = self.model.integers(
            f"{name}_quantized", integers, encoding.dtype, packed=self.packed
        )
        if stored.dtype == encoding.storage:
            return stored
        # onnxruntime multiplies no 4-bit integers, but folds this Cast as it loads the model
        kind = onnx.helper.np_dtype_to_tensor_dtype(encoding.storage)
        result = self.model.variable(f"{name}_unpacked", encoding.storage, integers.shape)
        self._add("Cast", name, [stored], result, {"to": kind})
        return result

    def _bias(self, layer: Layer, weight: Encoding, bias: np.ndarray | None = None) -> None:
        """int32, scale s_x * s_w computed in float32 as the runtime computes it."""
        x = self.model.encodings[layer.x.name]
        scale: np.ndarray = x.scale.astype(np.float32) * weight.scale.astype(np.float32)
        values = np.asarray(layer.bias if bias is None else bias, np.float64).reshape(-1)
        axis = None if weight.axis is None else 0
        scale = scale.reshape(() if axis is None else -1)
        steps = np.rint(values / scale.astype(np.float64))
        integers = np.clip(steps, -(2**31), 2**31 - 1).astype(np.int32)
        encoding = Encoding("int32", scale, np.zeros(scale.shape, np.int32), axis)
        name = f"{layer.name}.bias"
        constant = self.model.constant(f"{name}_quantized", integers)
        index = bias_input(layer.op)
        assert index is not None
        result = self._dequantize(name, constant, encoding)
        if len(layer.node.inputs) <= index:
            layer.node.inputs.append(result)
        else:
            layer.node.inputs[index] = result

    # -------------------------------------------------------------- activations

    def activations(self) -> None:
        """Q/DQ pairs at every activation that an integer node reads or writes."""
        for tensor, everyone in written_activations(self.model, self.kernels).values():
            self._pair(tensor, everyone=everyone)
        for node in self.nodes:
            if self.kernels[id(node)].bare and self.model.encodings[node.outputs[0].name].bits <= 8:
                self._pad(node)  # onnxruntime pads no integers of 16 bits

    def _pair(self, tensor: gs.Tensor, *, everyone: bool) -> None:
        """Q after the tensor, DQ for its readers: all of them, or the integer ones."""
        encoding = self.model.encodings[tensor.name]
        readers = [n for n in consumers(tensor) if everyone or self._reads_integers(n, tensor)]
        output = everyone and self.model.is_output(tensor)
        raw = self._renamed(tensor) if output else tensor
        grid = self._grid(tensor.name, encoding)
        q_grid, q_axis = grid, None
        scales = gate_scales(self.model, producer(tensor))
        if encoding.axis is not None:  # the layer gives integers already, see _scaled
            unit = np.ones((), np.float32), np.zeros((), np.int32)
            q_grid = self._grid(f"{tensor.name}_unit", Encoding(encoding.dtype, *unit))
        elif (
            scales is not None
            and encoding.fills_storage
            and not everyone
            and len(readers) == len(consumers(tensor))
        ):
            raw, q_axis = tensor.inputs[0].inputs[0], 1
            self._flat.add(tensor.name)
            zero = np.broadcast_to(encoding.zero_point, scales.shape)
            finer = Encoding(encoding.dtype, encoding.scale / scales, zero, 1)
            q_grid = self._grid(f"{tensor.name}_evened", finer)
        integers = self.model.variable(
            f"{tensor.name}_QuantizeLinear_Output", encoding.storage, tensor.shape
        )
        parts = [] if everyone else self._parts(tensor, encoding)
        if parts:
            attrs = tensor.inputs[0].attrs
            self._add("Concat", f"{tensor.name}_quantized", parts, integers, dict(attrs))
        else:
            raw, made, clip = saturate(self.model, tensor.name, raw, integers, encoding)
            self.added += clip
            self._convert("QuantizeLinear", tensor.name, [raw, *q_grid], made, q_axis)
        self._integers[tensor.name] = integers
        self._give(tensor, integers, grid, readers, encoding.axis, output=output)

    def _give(
        self,
        tensor: gs.Tensor,
        integers: gs.Variable,
        grid: tuple[gs.Constant, gs.Constant],
        readers: list[gs.Node],
        axis: int | None,
        *,
        output: bool,
    ) -> None:
        """DQ for readers, and one more under the tensor's own name if it is an output."""
        self.pairs += 1
        if readers:
            result = self.model.variable(f"{tensor.name}_DequantizeLinear_Output", np.float32)
            result.shape = tensor.shape
            for reader in readers:
                rewire(reader, tensor, result)
            self._convert("DequantizeLinear", tensor.name, [integers, *grid], result, axis)
        if output:
            name = f"{tensor.name}_output"
            self._convert("DequantizeLinear", name, [integers, *grid], tensor, axis)

    def _parts(self, tensor: gs.Tensor, encoding: Encoding) -> list[gs.Tensor]:
        """The integers of each part of a float Concat; none if no part is on the grid already."""
        node = producer(tensor)
        if node is None or node.op != "Concat" or not encoding.fills_storage:
            return []
        known = [self._on_grid(producer(t), encoding) for t in node.inputs]
        if all(k is None for k in known):
            return []
        pairs = zip(node.inputs, known, strict=True)
        return [self._part(t, encoding) if k is None else k for t, k in pairs]

    def _on_grid(self, node: gs.Node | None, encoding: Encoding) -> gs.Tensor | None:
        """The integers that a node dequantizes by this encoding; None if it does something else."""
        if node is None or node.op != "DequantizeLinear" or len(node.inputs) < 3:
            return None
        integers, scale, zero = node.inputs
        if not isinstance(scale, gs.Constant) or not isinstance(zero, gs.Constant):
            return None
        grid = self.model.array(scale), self.model.array(zero)
        wanted = encoding.scale, encoding.zero_point
        same = zero.dtype == encoding.dtype and all(map(np.array_equal, grid, wanted))
        return integers if same else None

    def _part(self, tensor: gs.Tensor, encoding: Encoding) -> gs.Tensor:
        """Q of a part; a power of two that it is multiplied by goes into the scale."""
        source, factor = _unmagnified(self.model, tensor)
        finer = Encoding(encoding.dtype, encoding.scale / factor, encoding.zero_point)
        name, dtype = f"{tensor.name}_part", encoding.storage
        integers = self.model.variable(f"{name}_QuantizeLinear_Output", dtype, tensor.shape)
        self._add("QuantizeLinear", name, [source, *self._grid(name, finer)], integers)
        return integers

    def _renamed(self, tensor: gs.Tensor) -> gs.Variable:
        """Move the producer to another name, so that the output's name is free for the DQ."""
        raw = self.model.variable(f"{tensor.name}_float", tensor.dtype, tensor.shape)
        source = tensor.inputs[0]
        for index, out in enumerate(source.outputs):
            if out is tensor:
                source.outputs[index] = raw
        return raw

    def _pad(self, node: gs.Node) -> None:
        source, result = node.inputs[0], node.outputs[0]
        integers = self._integers_of(source)
        encoding = self.model.encodings[result.name]
        scale, zero = self._grid(result.name, encoding)
        node.inputs[0] = integers
        while len(node.inputs) < 3:
            node.inputs.append(gs.Variable.empty())
        node.inputs[2] = zero
        readers = consumers(result)
        padded = self.model.variable(f"{result.name}_quantized", encoding.storage)
        padded.shape = result.shape
        node.outputs[0] = padded
        self._integers[result.name] = padded
        output = self.model.is_output(result)
        self._give(result, padded, (scale, zero), readers, None, output=output)

    def _integers_of(self, tensor: gs.Tensor) -> gs.Variable:
        """The integers behind a DQ that was put before a node, or those of the tensor itself."""
        source = producer(tensor)
        if source is not None and source.op == "DequantizeLinear":
            return source.inputs[0]
        return self._integers[tensor.name]

    # -------------------------------------------------------------- small parts

    def _is_island(self, tensor: gs.Tensor) -> bool:
        """Whether only float functions of the tensor alone lie between it and integers again."""
        inside, reached = {id(tensor)}, False
        for node in self.model.graph.nodes:
            varying = [t for t in node.inputs if t.name and not isinstance(t, gs.Constant)]
            known = [id(t) in inside for t in varying]
            if not any(known):
                continue
            if id(node) in self.kernels:
                reached = True
            elif node.op in ISLAND and all(known):
                inside |= {id(t) for t in node.outputs}
            else:
                return False
        whole = tensor.shape is not None and len(tensor.shape) > 2 and 0 not in tensor.shape
        return reached and whole

    def _reads_integers(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        kernel = self.kernels.get(id(node))
        return kernel is not None and any(t is tensor for t in data_inputs(node, kernel))

    def _grid(self, name: str, encoding: Encoding) -> tuple[gs.Constant, gs.Constant]:
        zero = encoding.zero_point.astype(encoding.storage)
        return (
            self.model.constant(f"{name}_scale", encoding.scale.astype(np.float32)),
            self.model.constant(f"{name}_zero_point", zero),
        )

    def _dequantize(self, name: str, integers: gs.Tensor, encoding: Encoding) -> gs.Variable:
        result = self.model.variable(f"{name}_DequantizeLinear_Output", np.float32)
        attrs = {} if encoding.axis is None else {"axis": encoding.axis}
        self._add("DequantizeLinear", name, [integers, *self._grid(name, encoding)], result, attrs)
        return result

    def _convert(
        self,
        op: str,
        name: str,
        inputs: list[gs.Tensor],
        output: gs.Tensor,
        axis: int | None,
    ) -> None:
        """Q or DQ of an activation; per channel in an island, between reshapes to [N, C, L]."""
        if axis is None or name not in self._flat:
            self._add(op, name, inputs, output, {} if axis is None else {"axis": axis})
            return
        x, shape = inputs[0], output.shape
        dtype = np.dtype(np.float32) if op == "QuantizeLinear" else x.dtype
        flat, converted = (
            self.model.variable(f"{name}_{op}_{part}", kind, [*shape[:2], None])
            for part, kind in (("Flat", dtype), ("Flat_Output", output.dtype))
        )
        folded = self.model.constant(f"{name}_{op}_flat", np.array([0, 0, -1]))
        self._add("Reshape", f"{name}_{op}_Flatten", [x, folded], flat)
        self._add(op, name, [flat, *inputs[1:]], converted, {"axis": axis})
        back: gs.Tensor
        if sum(not isinstance(n, int) for n in shape[2:]) < 2:
            sizes = [0, 0, *(n if isinstance(n, int) else -1 for n in shape[2:])]
            back = self.model.constant(f"{name}_{op}_shape", np.array(sizes))
        else:
            back = self.model.variable(f"{name}_{op}_shape", np.int64, [len(shape)])
            self._add("Shape", f"{name}_{op}", [x], back)
        self._add("Reshape", f"{name}_{op}_Unflatten", [converted, back], output)

    def _add(
        self,
        op: str,
        name: str,
        inputs: list[gs.Tensor],
        output: gs.Tensor,
        attrs: dict[str, int] | None = None,
    ) -> None:
        node = gs.Node(op, f"{name}_{op}", attrs or {}, inputs, [output])
        self.added.append(node)


def _unmagnified(model: Model, tensor: gs.Tensor) -> tuple[gs.Tensor, np.float32]:
    """What a tensor is a power of two times of, and that power."""
    node = producer(tensor)
    if node is not None and node.op == "Mul" and isinstance(node.inputs[1], gs.Constant):
        factor = model.array(node.inputs[1])
        if factor.shape == () and factor > 0 and np.frexp(factor)[0] == 0.5:
            return node.inputs[0], np.float32(factor)
    return tensor, np.float32(1)
