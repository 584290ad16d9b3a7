"""Number formats of weights layer by layer, written SELECTOR=FORMAT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.encoding import Encoding, Format
from onnxq.errors import RecipeError
from onnxq.model import Layer, Model
from onnxq.placement import Ends, Placement, fits, match_nodes

__all__ = ["WORDS", "ZERO_WEIGHT", "LayerFormat", "weight_encoding"]

# The range given to a weight of zeros: small, so that the scale of its bias is fine.
ZERO_WEIGHT = 1e-3


@dataclass(frozen=True)
class LayerFormat:
    """A number format for the weights, or the results, of some of the layers.

    Args:
        selector: A glob on node names and operator types, or ``first``, ``last`` or ``depthwise``;
            for results also on the names of tensors.
        format: How they are written.
    """

    selector: str
    format: Format

    @classmethod
    def parse(cls, text: str) -> LayerFormat:
        """The selector and the format of a text such as ``first=int8/channel``.

        Raises:
            RecipeError: The text is not of that form, or names no format of integers.
        """
        selector, _, written = text.partition("=")
        if not selector.strip() or not written.strip():
            raise RecipeError(
                f"{text!r} is not SELECTOR=FORMAT",
                fix="write first, last, depthwise or a glob, and a number format, as in"
                " first=int8/channel",
            )
        try:
            wanted = Format.parse(written)
        except RecipeError as error:
            raise RecipeError(error.what, where=f"format {text}", fix=error.fix) from error
        if wanted.dtype == "float":
            raise RecipeError(
                "weights in float are no matter of their format",
                where=f"format {text}",
                fix="use --exclude GLOB for layers that stay in float",
            )
        return cls(selector.strip(), wanted)

    def __str__(self) -> str:
        return f"{self.selector}={self.format}"

    def layers(self, model: Model) -> set[str]:
        """Names of the layers that are meant; none where a word fits none of the model.

        Raises:
            RecipeError: A glob matches nothing, or no layer; near misses are named.
        """
        if self.selector in _WORDS:
            return _WORDS[self.selector](model)
        found = match_nodes(model, (self.selector,), words=_WORDS)
        layers = found & {layer.name for layer in model.layers()}
        if not layers:
            raise RecipeError(
                f"{self.selector!r} matches {len(found)} nodes, but none with constant weights",
                where=f"format {self}",
                fix=f"name nodes of type {', '.join(ops.LAYERS)}",
            )
        return layers

    def activations(self, model: Model, placement: Placement) -> set[str]:
        """Names of the activations that are meant: tensors, or what the nodes meant put out.

        Raises:
            RecipeError: None of them is in integers; near misses are named.
        """
        found = {t for t in placement.tensors if fits(t, self.selector)}
        ends = Ends(model, placement.float_nodes)
        if self.selector in _WORDS:
            nodes = _WORDS[self.selector](model)
        else:
            words = (*_WORDS, *placement.tensors)
            nodes = set() if found else match_nodes(model, (self.selector,), words)
        for node in model.graph.nodes:
            if node.name in nodes:
                kernel = placement.nodes.get(node.name)
                for tensor in node.outputs:
                    end = tensor if kernel is None else ends.of(tensor, kernel)
                    found |= {end.name} & {*placement.tensors}
        if not found and self.selector not in _WORDS:
            raise RecipeError(
                f"nothing that {self.selector!r} matches is an activation in integers",
                where=f"format {self}",
                fix="name a tensor between integer nodes, or the node that puts it out",
            )
        return found


def _first(model: Model) -> set[str]:
    """The layers that an input of the model reaches without another layer in between."""
    layers = {layer.name for layer in model.layers()}
    reached = {id(t) for t in model.graph.inputs}
    found = set()
    for node in model.graph.nodes:
        if node.op in ops.SHAPES or not any(id(t) in reached for t in _read(node)):
            continue
        if node.name in layers:
            found.add(node.name)
        else:
            reached.update(id(t) for t in node.outputs)
    return found


def _last(model: Model) -> set[str]:
    """The layers from which an output of the model is reached without another in between."""
    layers = {layer.name for layer in model.layers()}
    wanted = {id(t) for t in model.graph.outputs}
    found = set()
    for node in reversed(model.graph.nodes):
        if node.op in ops.SHAPES or not any(id(t) in wanted for t in node.outputs):
            continue
        if node.name in layers:
            found.add(node.name)
        else:
            wanted.update(id(t) for t in _read(node))
    return found


def _depthwise(model: Model) -> set[str]:
    """The convolutions whose groups are all of their input channels, more than one."""
    return {
        layer.name
        for layer in model.layers()
        if layer.op == "Conv" and 1 < layer.group == layer.input_channels
    }


def _read(node: gs.Node) -> Iterator[gs.Tensor]:
    """What a node reads, and what its subgraphs do."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield from value.outputs  # a branch may hand through a tensor from outside
            for inner in value.nodes:
                yield from _read(inner)


_WORDS: dict[str, Callable[[Model], set[str]]] = {
    "first": _first,
    "last": _last,
    "depthwise": _depthwise,
}

WORDS = tuple(_WORDS)


def weight_encoding(
    layer: Layer,
    values: np.ndarray,
    wanted: Format,
    activations: Format,
    *,
    symmetric: bool = False,
) -> Encoding:
    """The encoding of a weight from its least to its greatest value, blocks left out.

    Args:
        layer: The layer.
        values: Its weight.
        wanted: The format.
        activations: How activations are written; a weight on the left is written alike.
        symmetric: Whether its zero point is 0, too.
    """
    if layer.side == 0 and activations.dtype != "float":  # one type and scale for that side
        low, high = values.min(initial=0), values.max(initial=0)
        return Encoding.of_range(low, high, activations.dtype, symmetric=symmetric)
    if wanted.granularity == "tensor" or (layer.op == "MatMul" and values.ndim != 2):
        if wanted.dtype.startswith("u"):
            return Encoding.of_range(values.min(initial=0), values.max(initial=0), wanted.dtype)
        bound = np.abs(values).max(initial=0) or ZERO_WEIGHT
        return Encoding.symmetric(np.array(bound), wanted.dtype)
    axis = layer.channel_axis
    others = tuple(i for i in range(values.ndim) if i != axis)
    bound = np.abs(values).max(axis=others, initial=0)
    # A channel of zeros has no scale of its own; the finest of the others keeps its bias exact.
    bound = np.where(bound > 0, bound, bound[bound > 0].min(initial=np.inf))
    return Encoding.symmetric(np.where(np.isfinite(bound), bound, ZERO_WEIGHT), wanted.dtype, axis)
