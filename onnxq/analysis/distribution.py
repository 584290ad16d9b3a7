"""What is known of each channel of a tensor without any data, from batch normalization.

Behind a BatchNormalization a channel is about N(beta, gamma^2) over the training data.  From there
moments are carried through the graph: in closed form through what clips (Relu, Clip, Min, Max), by
linearity through sums, concatenation, data movement and pooling, and as an estimate through layers
without a normalization of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.cost import Shapes, tensor_shapes
from onnxq.analysis.moments import Distribution
from onnxq.analysis.movement import follow, is_followed
from onnxq.kernels import normals
from onnxq.kernels import observe as counting
from onnxq.model import Layer, Model, has_subgraph, is_standard
from onnxq.ops import Window, conv_coverage, conv_taps, conv_window, window_sums
from onnxq.statistics import TensorStatistics

__all__ = ["Distribution", "patch_mean", "propagate", "shapes_of", "statistics_of"]

# Sizes that an input leaves open count as this, the batch as 1: wide enough for borders not to
# matter, and divisible by what networks halve it by.
FREE_SIZE = 128
# Values that a channel counts for in a histogram: about those of a hundred samples.
VALUES = 1 << 20
# An operator gives its distribution, or the reason why nothing is known of its result.
_Found = Distribution | str


def propagate(model: Model) -> tuple[dict[str, Distribution], dict[str, str]]:
    """What is known of each tensor without data, and why nothing is known of the others.

    Exact, as far as the statistics of the normalization are those of the data:

    - behind a normalization, folded or not: N(beta, gamma^2);
    - Relu, Clip, Min and Max with constants, LeakyRelu, PRelu: clipped normals in closed form;
    - sums with and products by one constant per channel;
    - Concat, Split, Slice, Flatten, Reshape, Transpose and their like; the zeros of a Pad are mixed
      in by their share of the positions.

    Estimates, marked so:

    - Add: means add up; variances do as if the operands were independent;
    - pooling and ReduceMean: a window of k values is worth the cube root of k independent ones;
    - Resize by interpolation: as by nearest neighbours, whose variance is a little larger;
    - a layer without normalization: its mean is W m + b, the zero-padded border included as far as
      the input is alike everywhere; its variance is W^2 var, as if inputs were independent.

    Returns:
        Tensor -> distribution of its channels; tensor -> why nothing is known.
    """
    walk = _Propagation(model)
    walk.run()
    return walk.known, walk.unknown


def shapes_of(model: Model) -> Shapes:
    """Concrete shapes, what the inputs leave open filled in."""
    free = {
        t.name: [1 if i == 0 else FREE_SIZE for i in range(len(t.shape))]
        for t in model.graph.inputs
        if t.shape is not None
    }
    for tensor in model.graph.inputs:
        for axis, size in enumerate(tensor.shape or ()):
            if isinstance(size, int) and size >= 0:
                free[tensor.name][axis] = size
    return tensor_shapes(model, free)


def statistics_of(distribution: Distribution, sigmas: float = 6.0) -> TensorStatistics:
    """The statistics that samples of these channels would give, each channel as often as another.

    Args:
        distribution: Of a tensor.
        sigmas: The values end so many standard deviations from each mean, or at the bounds; what
            lies beyond counts at the ends.
    """
    low, high = distribution.extremes(sigmas)
    bins, grid = np.zeros(counting.BINS, np.int64), counting.empty_grid()
    counting.observe(np.array([low.min(), high.max()]), bins, grid)  # for the grid that holds them
    edges = (grid[3] + np.arange(bins.size + 1)) * 2.0 ** grid[2]
    below, zero = normals.mixture(*distribution.unclipped, low, high, edges)
    below[0], below[edges > grid[1]] = 0.0, 1.0  # extremes are rounded to float32
    count = VALUES * distribution.channels
    bins = np.diff(np.rint(below * count).astype(np.int64))
    zeros = min(round(zero * count), int(bins[-int(grid[3])]) if -bins.size < grid[3] <= 0 else 0)
    mean, square = distribution.mean, distribution.mean**2 + distribution.std**2
    return TensorStatistics(
        count=count,
        minimum=float(grid[0]),
        maximum=float(grid[1]),
        sum=VALUES * float(mean.sum()),
        sum_squares=VALUES * float(square.sum()),
        zeros=zeros,
        batches=1,
        ema_minimum=float(grid[0]),
        ema_maximum=float(grid[1]),
        bins=bins,
        exponent=int(grid[2]),
        offset=int(grid[3]),
    )


def patch_mean(layer: Layer, x: Distribution, shapes: Shapes) -> np.ndarray | str:
    """The mean patch that a layer's weight meets, per group as `onnxq.second_order` has it, [G, K].

    Where its border is padded with zeros, taps meet as many of them as their positions say, as if
    the input were alike everywhere.

    Args:
        layer: A Conv, Gemm or MatMul.
        x: What it reads.
        shapes: Concrete shapes by name.

    Returns:
        The mean patch, or why it cannot be told.
    """
    if why := _unfit(layer, x, shapes):
        return why
    shares = _coverage(layer, shapes)
    patches: np.ndarray = x.mean.reshape(-1, *[1] * shares.ndim) * shares
    return patches.reshape(layer.group, -1)


def _unfit(layer: Layer, x: Distribution, shapes: Shapes) -> str | None:
    """Why the channels of its input are not those of a layer's weight."""
    if layer.unscalable or layer.op == "ConvTranspose" or layer.node.attrs.get("transA", 0):
        return f"{layer.name} ({layer.op}) is not followed"
    shape = shapes.get(layer.x.name)
    if shape is None:
        return f"the shape of {layer.x.name} is not known"
    axis = 1 if layer.op == "Conv" else len(shape) - 1
    if x.axis != axis or layer.input_channels != x.channels:
        return f"{layer.name} ({layer.op}) reads {layer.x.name} along another axis"
    return None


def _coverage(layer: Layer, shapes: Shapes) -> np.ndarray:
    """How much of each tap of a window meets real values; 1 for a matrix."""
    return conv_coverage(*_window(layer, shapes)) if layer.op == "Conv" else np.ones(())


def _window(layer: Layer, shapes: Shapes) -> tuple[Window, tuple[int, ...]]:
    """The window of a Conv, and the sizes of what it slides over."""
    spatial = (shapes[layer.x.name] or ())[2:]
    return conv_window(dict(layer.node.attrs), spatial, tuple(layer.weight.shape[2:])), spatial


class _Propagation:
    """Walks the graph once, forwards."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[str, Distribution] = {}
        self.unknown: dict[str, str] = {n: f"{n} is an input of the model" for n in model.inputs}
        self.shapes = shapes_of(model)
        self.rules: dict[str, Callable[[gs.Node], _Found]] = {
            "Add": self._add,
            "AveragePool": self._average_pool,
            "BatchNormalization": self._normalization,
            "Clip": self._clip,
            "Div": self._multiply,
            "Dropout": self._input,
            "GlobalAveragePool": self._global_pool,
            "GlobalMaxPool": self._global_pool,
            "Identity": self._input,
            "LeakyRelu": self._leaky,
            "Max": self._bound,
            "MaxPool": self._max_pool,
            "Min": self._bound,
            "Mul": self._multiply,
            "Neg": self._negate,
            "PRelu": self._leaky,
            "ReduceMean": self._reduce,
            "Relu": lambda node: self._then(node, lambda x: x.clipped(0.0, np.inf)),
            "Resize": self._resize,
            "Sub": self._add,
            "Sum": self._add,
        }

    def run(self) -> None:
        for node in self.model.graph.nodes:
            for tensor, found in zip(node.outputs, self._through(node), strict=True):
                if isinstance(found, str):
                    self.unknown[tensor.name] = found
                else:
                    self.known[tensor.name] = found

    def _through(self, node: gs.Node) -> list[_Found]:
        """What is known of each output."""
        opaque = f"{node.name} ({node.op}) is not followed"
        rest: list[_Found] = [opaque] * (len(node.outputs) - 1)
        norm = self.model.batch_norms.get(node.outputs[0].name)
        if norm is not None:
            return [Distribution.normal(norm.beta, norm.gamma), *rest]
        if not is_standard(node) or has_subgraph(node):
            return [opaque, *rest]
        layer = Layer.of(self.model, node)
        if layer is not None:
            return [self._layer(layer)]
        if is_followed(node):
            moved = self._move(node)
            return [moved] * len(node.outputs) if isinstance(moved, str) else [*moved]
        rule = self.rules.get(node.op)
        return [opaque if rule is None else rule(node), *rest]

    # ---------------------------------------------------------------- reading

    def _of(self, tensor: gs.Tensor) -> _Found:
        if tensor.name in self.known:
            return self.known[tensor.name]
        return self.unknown.get(tensor.name, f"{tensor.name} is a constant")

    def _input(self, node: gs.Node) -> _Found:
        return self._of(node.inputs[0])

    def _then(self, node: gs.Node, what: Callable[[Distribution], _Found]) -> _Found:
        x = self._input(node)
        return x if isinstance(x, str) else what(x)

    def _constant(self, node: gs.Node, tensor: gs.Tensor, x: Distribution) -> np.ndarray | str:
        """A constant as one value per channel, or per tensor, of the result of a node."""
        shape = self.shapes.get(node.outputs[0].name)
        if not isinstance(tensor, gs.Constant):
            return f"{node.name} ({node.op}) reads {tensor.name}, of which nothing is known"
        values = np.asarray(self.model.array(tensor), np.float64)
        if values.size == 1:
            return values.reshape(())
        if shape is not None and values.ndim <= len(shape):
            padded = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
            if padded.shape[x.axis] == values.size == x.channels:
                return values.reshape(-1)
        return f"{node.name} ({node.op}) reads {tensor.name}, which is no constant per channel"

    # ---------------------------------------------------------------- rules

    def _normalization(self, node: gs.Node) -> _Found:
        gamma, beta = node.inputs[1:3]
        if not (isinstance(gamma, gs.Constant) and isinstance(beta, gs.Constant)):
            return f"the parameters of {node.name} are computed"
        return Distribution.normal(self.model.array(beta), self.model.array(gamma))

    def _clip(self, node: gs.Node) -> _Found:
        bounds = [node.attrs.get("min", -np.inf), node.attrs.get("max", np.inf)]
        for i, tensor in enumerate(node.inputs[1:3]):
            if tensor.name and not isinstance(tensor, gs.Constant):
                return f"a bound of {node.name} is computed"
            if tensor.name:
                bounds[i] = float(self.model.array(tensor).reshape(-1)[0])
        return self._then(node, lambda x: x.clipped(*bounds))

    def _bound(self, node: gs.Node) -> _Found:
        """Min and Max of one activation and constants."""
        return self._with_constants(
            node,
            lambda x, c: x.clipped(-np.inf, c) if node.op == "Min" else x.clipped(c, np.inf),
        )

    def _with_constants(
        self, node: gs.Node, what: Callable[[Distribution, np.ndarray], Distribution]
    ) -> _Found:
        """What one activation and constants, taken in turn, make."""
        xs = [t for t in node.inputs if not isinstance(t, gs.Constant)]
        if len(xs) != 1:
            return f"{node.name} ({node.op}) combines several activations"
        x = self._of(xs[0])
        for tensor in node.inputs:
            if tensor is xs[0] or isinstance(x, str):
                continue
            constant = self._constant(node, tensor, x)
            x = constant if isinstance(constant, str) else what(x, constant)
        return x

    def _leaky(self, node: gs.Node) -> _Found:
        def rectified(x: Distribution) -> _Found:
            if node.op == "LeakyRelu":
                return x.leaky(np.array(node.attrs.get("alpha", 0.01)))
            slope = self._constant(node, node.inputs[1], x)
            return slope if isinstance(slope, str) else x.leaky(slope)

        return self._then(node, rectified)

    def _negate(self, node: gs.Node) -> _Found:
        return self._then(node, lambda x: x.affine(-1.0, 0.0))

    def _add(self, node: gs.Node) -> _Found:
        terms: dict[str, float] = {}
        for i, tensor in enumerate(node.inputs):
            sign = -1.0 if node.op == "Sub" and i == 1 else 1.0
            terms[tensor.name] = terms.get(tensor.name, 0.0) + sign
        tensors = {t.name: t for t in node.inputs}
        total: Distribution | None = None
        for name, factor in terms.items():
            if isinstance(tensors[name], gs.Constant):
                continue
            x = self._of(tensors[name])
            if isinstance(x, str):
                return x
            x = x if factor == 1 else x.affine(factor, 0.0)
            if total is not None and (why := self._unlike(node, total, x)):
                return why
            total = x if total is None else total.plus(x)
        if total is None:
            return f"{node.name} ({node.op}) adds constants"
        for name, factor in terms.items():
            if isinstance(tensors[name], gs.Constant):
                constant = self._constant(node, tensors[name], total)
                if isinstance(constant, str):
                    return constant
                total = total.affine(1.0, factor * constant)
        return total

    def _unlike(self, node: gs.Node, a: Distribution, b: Distribution) -> str | None:
        if (a.channels, a.axis) != (b.channels, b.axis):
            return f"{node.name} ({node.op}) adds channels along different axes"
        return None

    def _multiply(self, node: gs.Node) -> _Found:
        """Products by constants, and divisions by them."""
        if node.op == "Mul":
            return self._with_constants(node, lambda x, c: x.affine(c, 0.0))
        if isinstance(node.inputs[0], gs.Constant):
            return f"{node.name} ({node.op}) divides by it"
        return self._with_constants(node, lambda x, c: x.affine(1.0 / c, 0.0))

    def _layer(self, layer: Layer) -> _Found:
        """W m + b, and W^2 var, of what the window meets."""
        x = self._of(layer.x)
        if isinstance(x, str):
            return x
        if why := _unfit(layer, x, self.shapes):
            return why
        attrs = layer.node.attrs
        weight = layer.weight.astype(np.float64) * float(attrs.get("alpha", 1.0))
        bias = np.zeros(1) if layer.bias is None else layer.bias * float(attrs.get("beta", 1.0))
        inner = weight**2 * layer.along_inputs(x.std**2) * _coverage(layer, self.shapes)
        held = weight * layer.along_inputs(x.mean)
        if layer.op == "Conv":
            means, share = window_sums(held.sum(axis=1), *_window(layer, self.shapes))
        else:
            means, share = layer.sum_over_inputs(held), np.ones(())
        places = tuple(range(1, means.ndim))
        y = (means * share).sum(axis=places)
        about = (means - y.reshape(-1, *[1] * share.ndim)) ** 2  # at borders it is another one
        variance = layer.sum_over_inputs(inner) + (about * share).sum(axis=places)
        return Distribution.normal(y + bias.reshape(-1), np.sqrt(variance), x.axis, estimated=True)

    # ---------------------------------------------------------------- pooling and movement

    def _window(self, node: gs.Node) -> tuple[int, float, float] | str:
        """Values in a pooling window; which part of them is no padding: mean and mean square."""
        spatial = (self.shapes.get(node.inputs[0].name) or ())[2:]
        if not spatial:
            return f"the shape of {node.inputs[0].name} is not known"
        size = tuple(node.attrs["kernel_shape"])
        inside = conv_taps(conv_window(dict(node.attrs), spatial, size), spatial)
        real = [taps.mean(axis=1) for taps in inside]
        return prod(size), prod(r.mean() for r in real), prod((r**2).mean() for r in real)

    def _average_pool(self, node: gs.Node) -> _Found:
        window = self._window(node)
        if isinstance(window, str):
            return window
        count, share, square = window
        if not node.attrs.get("count_include_pad", 0):
            share = square = 1.0
        return self._then(node, lambda x: x.averaged(count, share, square))

    def _max_pool(self, node: gs.Node) -> _Found:
        window = self._window(node)
        if isinstance(window, str):
            return window
        return self._then(node, lambda x: x.largest(window[0] * window[1]))

    def _global_pool(self, node: gs.Node) -> _Found:
        shape = self.shapes.get(node.inputs[0].name)
        if shape is None:
            return f"the shape of {node.inputs[0].name} is not known"
        count = prod(shape[2:])
        largest = node.op == "GlobalMaxPool"
        return self._then(node, lambda x: x.largest(count) if largest else x.averaged(count))

    def _reduce(self, node: gs.Node) -> _Found:
        shape, axes = self.shapes.get(node.inputs[0].name), node.attrs.get("axes")
        if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
            axes = self.model.array(node.inputs[1]).tolist()
        if shape is None or not axes:
            return f"the axes that {node.name} (ReduceMean) takes the mean over are not known"
        gone = {a % len(shape) for a in axes}

        def reduced(x: Distribution) -> _Found:
            if x.axis in gone:
                return f"{node.name} (ReduceMean) takes the mean over channels"
            pooled = x.averaged(prod(shape[a] for a in gone))
            if node.attrs.get("keepdims", 1):
                return pooled
            return replace(pooled, axis=x.axis - sum(a < x.axis for a in gone))

        return self._then(node, reduced)

    def _resize(self, node: gs.Node) -> _Found:
        shape = self.shapes.get(node.outputs[0].name)
        mode = node.attrs.get("mode", "nearest")

        def resized(x: Distribution) -> _Found:
            if shape is None or shape[x.axis] != x.channels:
                return f"the shape that {node.name} (Resize) gives is not known"
            if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
                return f"{node.name} (Resize) fills in values of its own"
            if mode == "cubic":  # may pass the bounds
                return Distribution.normal(x.mean, x.std, x.axis, estimated=True)
            return x if mode == "nearest" else replace(x, estimated=True)

        return self._then(node, resized)

    def _move(self, node: gs.Node) -> list[Distribution] | str:
        parts: list[Distribution] = []
        for tensor in node.inputs if node.op == "Concat" else node.inputs[:1]:
            x = self._of(tensor)
            if isinstance(x, str):
                return x
            parts.append(x)
        if any(p.axis != parts[0].axis for p in parts):
            return f"{node.name} ({node.op}) joins channels along different axes"
        moves = follow(self.model, node, [p.axis for p in parts], self.shapes)
        return moves if isinstance(moves, str) else [parts[0].moved(m, *parts[1:]) for m in moves]
