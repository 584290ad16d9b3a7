"""Batch normalization folded into the weights of the layer before or after it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import BatchNormStatistics, Layer, Model, consumers, is_standard, producer, rewire
from onnxq.report import Changes

if TYPE_CHECKING:
    from onnxq.pass_manager import Context

__all__ = ["FoldBatchNorm"]


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm:
    r"""Fold each BatchNormalization into the layer before it, else into the layers after it.

    In inference, BatchNormalization is one multiplication and one addition per channel:

        s = gamma / sqrt(variance + epsilon)        t = beta - mean * s
        after a layer:     s (W x + b) + t  =  (s W) x + (s b + t)
        before a layer:    W (s x + t) + b  =  (W s) x + (b + W t)

    s scales the output channels of W in the first case and its input channels in the second.  The
    arithmetic is done in float64 and stored in the type of the weight.

        x                       x                   a        b                  a         b
        |                       |                   |        |                  |         |
       Conv  W, b              Conv  sW, sb+t      Conv    Conv               Conv'     Conv'
        |               =>      |                    \      /         =>        \       /
    BatchNormalization          y                     Concat                      Concat
        |                                               |                           |
        y                                       BatchNormalization                  y
                                                        |
                                                        y

    It rewrites

    1. Conv (any rank, groups, depthwise), ConvTranspose, Gemm, MatMul -> BatchNormalization.  A
       MatMul keeps t in an Add after it.
    2. the same with an Add of one constant per channel between: t goes there.
    3. Concat along the channels -> BatchNormalization, if rule 1 or 2 holds for every branch.
    4. BatchNormalization -> Conv without padding, Gemm, MatMul (several too, and through a
       Flatten); with padding, and -> ConvTranspose, only where t is zero, because the border does
       not receive t times the whole kernel.
    5. With ``standalone="conv"`` every other one becomes a depthwise 1x1 Conv.

    The result of rules 1 to 3 bears the name of the normalization's output, and
    `Model.batch_norms` keeps gamma and beta under that name.  Shared weights are copied per layer.

    It refuses, and the report says why, a BatchNormalization

    1. with parameters that are computed, not finite, or have variance + epsilon <= 0,
    2. in training mode, or with statistics among its outputs,
    3. whose layer's output is read by something else too, or is an output of the model,
    4. whose layer has a computed bias or no constant weight in floating point,
    5. next to no layer, or next to a MatMul whose last axis is not the channel axis.

    Source: B. Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 3.2; M. Nagel et al. 2019,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721.

    Args:
        standalone: What becomes of one that nothing can take up: "keep", or "conv" to write it as a
            depthwise 1x1 convolution, which integer runtimes have.
    """

    name: ClassVar[str] = "fold-batch-norm"

    standalone: Literal["keep", "conv"] = "keep"

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Fold what can be folded."""
        changes = Changes()
        norms = [n for n in model.graph.nodes if n.op == "BatchNormalization" and is_standard(n)]
        if any(_needs_rank(n, self.standalone) for n in norms):
            model.infer()
        folder = _Folder(model, changes)
        left: dict[_Norm, str] = {}
        for node in norms:
            norm = _Norm.of(model, node)
            if isinstance(norm, str):
                changes.skip(node.name, norm)
            elif why := folder.into_layers_before(norm):
                left[norm] = why
        # From the end, so that of two in a row the second makes way for the first.
        for norm in reversed([*left]):
            if why := folder.into_layers_after(norm):
                left[norm] += f"; {why}"
            else:
                del left[norm]
        for norm, why in left.items():
            why = why if self.standalone == "keep" else folder.into_convolution(norm)
            if why:
                changes.skip(norm.node.name, why)
        folder.finish()
        return changes


@dataclass(frozen=True, eq=False)
class _Norm:
    """A BatchNormalization as y = scale * x + shift per channel, in float64."""

    node: gs.Node
    scale: np.ndarray
    shift: np.ndarray
    statistics: BatchNormStatistics

    @classmethod
    def of(cls, model: Model, node: gs.Node) -> _Norm | str:
        """The normalization, or why it has no such form."""
        attrs = node.attrs
        if attrs.get("training_mode", 0) or (model.opset < 7 and not attrs.get("is_test", 0)):
            return "it is in training mode"
        if any(t.name for t in node.outputs[1:]):
            return "it puts out statistics, as in training"
        if not attrs.get("spatial", 1):
            return "it has a scale per position, not per channel"
        if not all(isinstance(t, gs.Constant) for t in node.inputs[1:5]):
            return "its parameters are computed, not constant"
        arrays = [model.array(t).astype(np.float64).reshape(-1) for t in node.inputs[1:5]]
        if not all(np.isfinite(a).all() for a in arrays):
            return "its parameters are not finite"
        gamma, beta, mean, variance = arrays
        total = variance + float(attrs.get("epsilon", 1e-5))
        if (total <= 0).any():
            return "a variance plus epsilon is not above zero"
        scale = gamma / np.sqrt(total)
        statistics = BatchNormStatistics(gamma.astype(np.float32), beta.astype(np.float32))
        return cls(node, scale, beta - mean * scale, statistics)

    @property
    def x(self) -> gs.Tensor:
        """Its input."""
        return self.node.inputs[0]

    @property
    def y(self) -> gs.Tensor:
        """Its output."""
        return self.node.outputs[0]


@dataclass(frozen=True, eq=False)
class _Branch:
    """A layer whose output channels can be scaled, perhaps with an Add of constants after it."""

    layer: Layer
    tensor: gs.Tensor
    add: gs.Node | None = None
    constant: np.ndarray | None = None  # what the Add adds, shape [1] or [channels]

    @classmethod
    def of(cls, model: Model, tensor: gs.Tensor, rank: int | None) -> _Branch | str:
        """What puts out the tensor, or why it cannot take up a scale."""
        node, add, before = producer(tensor), None, tensor
        if node is not None and node.op == "Add" and is_standard(node):
            fixed = [isinstance(t, gs.Constant) for t in node.inputs]
            if sum(fixed) == 1:
                add, before = node, node.inputs[fixed.index(False)]
                node = producer(before)
        layer = None if node is None else Layer.of(model, node)
        if layer is None:
            return f"before it is {_described(node)}"
        if why := _read_twice(model, tensor) or _read_twice(model, before):
            return why
        if why := layer.unscalable:
            return why
        if layer.op == "MatMul" and rank != 2:
            return f"the last axis of {layer.name} is not known to be the channel axis"
        if add is None:
            return cls(layer, tensor)
        constant, axes = model.array(add.inputs[_constant_input(add)]), layer.weight.ndim
        shape, channels = (1,) * (axes - constant.ndim) + constant.shape, layer.output_channels
        if len(shape) > axes or shape[1] not in (1, channels) or constant.size != shape[1]:
            return f"{add.name} adds more than one constant per channel"
        return cls(layer, tensor, add, constant.astype(np.float64).reshape(-1))


class _Folder:
    """Folds one normalization at a time.

    Each method answers why it does not, without having changed anything, or None when it is done.
    """

    def __init__(self, model: Model, changes: Changes) -> None:
        self.model = model
        self.changes = changes
        self._main = {id(n) for n in model.graph.nodes}  # not those of subgraphs
        self._gone: set[int] = set()
        self._after: dict[int, gs.Node] = {}  # id of a MatMul -> the Add put after it

    def finish(self) -> None:
        """Bring the list of nodes up to date, once for all folds."""
        if not self._gone and not self._after:
            return
        nodes = []
        for node in self.model.graph.nodes:
            nodes += [] if id(node) in self._gone else [node]
            nodes += [self._after[id(node)]] if id(node) in self._after else []
        self.model.graph.nodes[:] = nodes

    def into_layers_before(self, norm: _Norm) -> str | None:
        """Rules 1 to 3: scale the output channels of what comes before."""
        model, rank = self.model, _rank(norm.x)
        join, tensors, inside = producer(norm.x), [norm.x], ""
        if join is not None and join.op == "Concat" and is_standard(join):
            axis = join.attrs.get("axis", 1)
            if axis != 1 and (rank is None or axis + rank != 1):
                return f"{join.name} is not known to join channels"
            tensors, inside = list(join.inputs), f"{join.name} joins other channels, too: "
            if why := _read_twice(model, norm.x):
                return why
        branches = []
        for tensor in tensors:
            branch = _Branch.of(model, tensor, rank)
            if isinstance(branch, str):
                return inside + branch
            branches.append(branch)
        ends = np.cumsum([b.layer.output_channels for b in branches])
        if ends[-1] != norm.scale.size:
            return "it has not as many channels as what comes before it"
        gamma, beta = norm.statistics.gamma, norm.statistics.beta
        parts = [np.split(a, ends[:-1]) for a in (norm.scale, norm.shift, gamma, beta)]
        for branch, scale, shift, *statistics in zip(branches, *parts, strict=True):
            self._scale_outputs(branch, scale, shift)
            model.batch_norms[branch.tensor.name] = BatchNormStatistics(*statistics)
        self._take_over(norm)
        self.changes.add(f"{norm.node.name} folded into {_names(b.layer for b in branches)}")
        return None

    def into_layers_after(self, norm: _Norm) -> str | None:
        """Rule 4: scale the input channels of every layer that reads the result."""
        found: list[Layer] = []
        for reader in consumers(norm.y):
            flat = reader.outputs[0] if _is_flatten(reader) else None
            tensor, nodes = (norm.y, [reader]) if flat is None else (flat, consumers(flat))
            if self.model.is_output(tensor):
                return f"{tensor.name} is an output of the model"
            for node in nodes:
                layer = Layer.of(self.model, node)
                if id(node) not in self._main:
                    return "a subgraph reads it"
                if layer is None:
                    return f"after it is {_described(node)}"
                rank = _rank(norm.x) if flat is None else 2
                if why := layer.unscalable or _unfit_input(layer, tensor, norm, rank):
                    return why
                found.append(layer)
        if self.model.is_output(norm.y):
            return f"{norm.y.name} is an output of the model"
        for layer in found:
            self._scale_inputs(layer, norm.scale, norm.shift)
        for reader in consumers(norm.y):
            rewire(reader, norm.y, norm.x)
        self._remove(norm.node)
        self.changes.add(f"{norm.node.name} folded into {_names(found)}")
        return None

    def into_convolution(self, norm: _Norm) -> str | None:
        """Rule 5: a depthwise 1x1 convolution, or part of the one just made before it."""
        if self.into_layers_before(norm) is None:
            return None
        model, node, x, rank = self.model, norm.node, norm.x, _rank(norm.x)
        if rank is None or rank < 3:
            return "it has no axes besides batch and channels"
        dtype = model.array(node.inputs[1]).dtype if x.dtype is None else x.dtype
        scale = norm.scale.astype(dtype).reshape(-1, *[1] * (rank - 1))
        weight = model.constant(f"{node.name}.weight", scale)
        bias = model.constant(f"{node.name}.bias", norm.shift.astype(dtype))
        node.op = "Conv"
        node.attrs = OrderedDict(group=norm.scale.size, kernel_shape=[1] * (rank - 2))
        node.inputs.clear()
        node.inputs.extend([x, weight, bias])
        model.batch_norms[norm.y.name] = norm.statistics
        self.changes.add(f"{node.name} became a depthwise convolution")
        return None

    # ------------------------------------------------------------------ edits

    def _scale_outputs(self, branch: _Branch, scale: np.ndarray, shift: np.ndarray) -> None:
        layer = branch.layer
        layer.scale_outputs(scale)
        if branch.add is not None and branch.constant is not None:
            shift = shift + scale * branch.constant
            self._set_constant(branch.add, shift.reshape(-1, *[1] * (layer.weight.ndim - 2)))
        elif shift.any():
            self._add_bias(layer, shift)

    def _scale_inputs(self, layer: Layer, scale: np.ndarray, shift: np.ndarray) -> None:
        if shift.any():
            weight = layer.weight.astype(np.float64)
            extra = layer.sum_over_inputs(weight * layer.along_inputs(shift))
            self._add_bias(layer, extra * float(layer.node.attrs.get("alpha", 1.0)))
        layer.scale_inputs(scale)

    def _add_bias(self, layer: Layer, extra: np.ndarray) -> None:
        """Add a constant per channel to what a layer puts out; for a MatMul by an Add after it."""
        model, node, y = self.model, layer.node, layer.y
        dtype = layer.weight.dtype
        if layer.op != "MatMul":
            layer.set_bias((layer.take_bias() + extra).astype(dtype))
            return
        after = y.outputs[0] if len(y.outputs) == 1 and not model.is_output(y) else None
        if (
            after is not None
            and after.op == "Add"
            and is_standard(after)
            and id(after) in self._main
        ):
            index = _constant_input(after)
            old = None if index is None else model.array(after.inputs[index])
            if old is not None and old.ndim <= 2:
                self._set_constant(after, old.astype(np.float64) + extra)
                return
        product = model.variable(f"{node.name}.product", y.dtype, y.shape)
        constant = model.constant(f"{node.name}.bias", extra.astype(dtype))
        node.outputs[0] = product
        name = model.free_name(f"{node.name}.add")
        add = gs.Node("Add", name, inputs=[product, constant], outputs=[y])
        self._after[id(node)] = add
        self._main.add(id(add))

    def _set_constant(self, add: gs.Node, values: np.ndarray) -> None:
        index = _constant_input(add)
        dtype = self.model.array(add.inputs[index]).dtype
        add.inputs[index] = self.model.constant(f"{add.name}.constant", values.astype(dtype))

    def _take_over(self, norm: _Norm) -> None:
        """Let what comes before put out the tensor of the normalization, whose name survives."""
        x, y = norm.x, norm.y
        [node] = x.inputs
        y.dtype = x.dtype if y.dtype is None else y.dtype
        y.shape = x.shape if y.shape is None else y.shape
        self._remove(norm.node)
        node.outputs[0] = y
        self.model.batch_norms.pop(x.name, None)
        self.model.batch_norms[y.name] = norm.statistics

    def _remove(self, node: gs.Node) -> None:
        node.inputs.clear()
        node.outputs.clear()
        self._gone.add(id(node))


# ---------------------------------------------------------------------- what fits


def _needs_rank(node: gs.Node, standalone: str) -> bool:
    """Whether folding this one depends on a rank that is not known."""
    x, y = node.inputs[0], node.outputs[0]
    source = producer(x)
    ops = [n.op for n in (source, *consumers(y)) if n is not None]
    doubtful = {"MatMul", "Add", "Concat"}.intersection(ops) or standalone == "conv"
    return bool(doubtful) and _rank(x) is None


def _read_twice(model: Model, tensor: gs.Tensor) -> str | None:
    if model.is_output(tensor):
        return f"{tensor.name} is an output of the model"
    if len(tensor.outputs) > 1:
        return f"{tensor.name} is read by something else, too"
    return None


def _unfit_input(layer: Layer, tensor: gs.Tensor, norm: _Norm, rank: int | None) -> str | None:
    """Why the input channels of a layer cannot take up the scale and shift."""
    if sum(t is tensor for t in layer.node.inputs) != 1 or layer.x is not tensor:
        return f"{layer.name} reads it as a parameter"
    if layer.node.attrs.get("transA", 0) or (layer.op == "MatMul" and rank != 2):
        return f"the last axis of {layer.name} is not known to be the channel axis"
    inputs, channels = layer.input_channels, norm.scale.size
    if inputs % channels or (inputs != channels and "Conv" in layer.op):
        return f"it has not as many channels as {layer.name} reads"
    if norm.shift.any() and layer.op == "ConvTranspose":
        return f"the border that {layer.name} puts out would change"
    if norm.shift.any() and layer.is_padded:
        return f"the zero-padded border of {layer.name} would change"
    return None


def _is_flatten(node: gs.Node) -> bool:
    return node.op == "Flatten" and is_standard(node) and node.attrs.get("axis", 1) == 1


def _described(node: gs.Node | None) -> str:
    if node is None:
        return "no node"
    return f"{node.name} ({node.op}), which has no constant weight"


def _names(layers: Iterable[Layer]) -> str:
    return ", ".join(layer.name for layer in layers)


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _constant_input(add: gs.Node) -> int | None:
    return next((i for i, t in enumerate(add.inputs) if isinstance(t, gs.Constant)), None)
