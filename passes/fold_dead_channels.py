"""Channels that are constant, or that nothing reads, folded away before they set scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.dead_channels import DeadChannels, LayerChannels, find_dead_channels
from onnxq.model import BatchNormStatistics, Layer, Model
from onnxq.pass_manager import Changes, Context

__all__ = ["FoldDeadChannels"]


@dataclass(frozen=True, kw_only=True)
class FoldDeadChannels:
    r"""Set the weights of dead channels to zero; what they held goes into the next bias.

    Weight decay leaves channels whose weights are about zero.  Such a channel puts out a constant,
    k = f(b), and what reads it learned from nothing: its weights there may be of any size, and once
    batch normalization is folded they are often the largest of all.  They set the scale of a
    tensor that has one scale, and cross-layer equalization has nothing to weigh them against::

        Conv(W1, b1) -> f -> Conv(W2, b2)

        W1[i, :] about 0:     W1[i, :] = 0        b2 += k sum(W2[:, i])        W2[:, i] = 0
        W2[:, i] = 0:         W1[i, :] = 0        b1[i] = 0

        [ 3  1 -2]                                   [ 3  1 -2]
        [1e-9   0] -> f -> [ 1 90 -2] b2       =>    [ 0  0  0] -> f -> [ 1  0 -2] b2 + 90 k
        [-1  2  2]                                   [-1  2  2]

    Constants go through element-wise functions, pooling, BatchNormalization, Concat, Split,
    Flatten, reductions over positions, sums with other constants and products with zero.  An output
    channel that reads nothing but constants, as in a depthwise convolution, is one itself.
    Channels that nothing reads are followed backwards in the same way, until nothing changes.  The
    bias of a MatMul is the Add behind it.  `Model.batch_norms` learns of each constant: gamma = 0,
    beta = its value.

    All this is exact but for the weights that are about zero.  What they put out is lost, at most
    their share (`negligible`) of what others of the layer make of an equally large input; how
    large inputs are, no one knows without samples.

    Refused, with the reason:

    1. constants other than zero that a layer reads across a zero-padded border, by ConvTranspose
       with a window or stride, or by MatMul without an Add: these weights stay, and so does k;
    2. layers whose weight or bias is computed, shared, not finite or not in floating point.

    A constant that something else reads (Softmax, an output of the model, a subgraph, an Add of
    what varies) stays as it is; the weights that make it are zero all the same.

    Args:
        negligible: The weights of an output channel are about zero if the largest is at most this
            share of the median over the layer's channels, of which each counts by its largest.
            Since most of a layer may be dead, the median leaves out channels below this share of
            the layer's largest weight.

    Source: Nagel et al. 2019 (arXiv 1906.04721) equalize weights so that one scale fits a whole
    tensor; dead channels, which they do not treat, are what that fails on first.
    """

    name: ClassVar[str] = "fold-dead-channels"

    negligible: float = 1e-5

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Fold until nothing changes."""
        changes = Changes()
        model.infer()
        found = find_dead_channels(model)
        given = {c.layer.name: _sizes(c.layer) for c in found.layers}
        edited: set[str] = set()
        while names := self._edit(found):
            edited |= names
            found = find_dead_channels(model)
        _correct_statistics(model, found)
        for name, why in found.refused.items():
            changes.skip(name, why)
        total, worst = 0, 0.0
        for channels in found.layers:
            layer = channels.layer
            if channels.stuck:
                what = f"{channels.stuck} of its inputs are constant and not zero"
                changes.skip(layer.name, f"{what}, but {channels.obstacle}")
            if layer.name not in edited:
                continue
            size = given[layer.name]
            dead = (size > 0.0) & (_sizes(layer) == 0.0)
            if not dead.any():
                changes.add(f"{layer.name}: dead channels beside it folded")
                continue
            share = float(size[dead].max() / self._median(size))
            what = f"{dead.sum()} of {size.size} channels dead"
            changes.add(f"{layer.name}: {what}, weights up to {share:.2g} times the median")
            total, worst = total + int(dead.sum()), max(worst, share)
        if total:
            changes.add(
                f"dead channels in all: {total}, weights up to {worst:.2g} times the median"
            )
        return changes

    def _edit(self, found: DeadChannels) -> set[str]:
        """One round; the names of the layers that it changed."""
        cleared = {c.layer.name for c in found.layers if self._clear(c.layer)}
        return cleared or {c.layer.name for c in found.layers if _fold(c)}

    def _clear(self, layer: Layer) -> bool:
        """Set what is left of nearly dead output channels to zero; whether there were any."""
        size = _sizes(layer)
        leftover = (size > 0.0) & (size <= self.negligible * self._median(size))
        return _zero(layer, layer.along_outputs(leftover))

    def _median(self, size: np.ndarray) -> float:
        """The median over the channels that are alive."""
        alive = size[(size > 0.0) & (size >= min(self.negligible, 1.0) * size.max(initial=0.0))]
        return float(np.median(alive)) if alive.size else 0.0


def _sizes(layer: Layer) -> np.ndarray:
    """The greatest magnitude of the weights of each output channel."""
    return np.asarray(layer.magnitudes.max(axis=1, initial=0.0))


def _zero(layer: Layer, where: np.ndarray) -> bool:
    """Set weights to zero; whether any was not."""
    old = layer.weight
    new = np.where(where, old.dtype.type(0), old)
    if np.array_equal(new, old):
        return False
    layer.set_weight(new)
    return True


def _fold(channels: LayerChannels) -> bool:
    """Let go of constant inputs and of outputs that are not read; whether there were any."""
    layer, unread = channels.layer, ~channels.read
    dead = layer.along_inputs(channels.absorbed) | layer.along_outputs(unread)
    zeroed = _zero(layer, dead)
    bias = np.where(unread, 0.0, channels.bias + channels.shift)
    if np.array_equal(bias, channels.bias):
        return zeroed
    if layer.addend is None:
        layer.take_bias()
        layer.set_bias(bias.astype(layer.weight.dtype))
    else:
        node, index = layer.addend
        old = layer.model.array(node.inputs[index])
        values = bias.astype(old.dtype).reshape(old.shape)
        node.inputs[index] = layer.model.constant(f"{node.name}.constant", values)
    return True


def _correct_statistics(model: Model, found: DeadChannels) -> None:
    """Tell the constants to who reads the statistics of folded batch normalization."""
    for name, known in model.batch_norms.items():
        values = found.values.get(name)
        if values is None or values.size != known.gamma.size:
            continue
        varies = np.isnan(values)
        gamma = np.where(varies, known.gamma, 0.0)
        beta = np.where(varies, known.beta, values)
        model.batch_norms[name] = BatchNormStatistics(
            gamma.astype(np.float32), beta.astype(np.float32)
        )
