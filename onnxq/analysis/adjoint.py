"""Gradients of a model's outputs with respect to what its layers put out, as an ONNX graph.

Behind the nodes of the model stand those of its adjoint: what is fed in at each output, a random
direction, is taken back through the graph.  One run of both so tells of every layer at once what a
small change of its output does to the model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxq import ops
from onnxq.analysis.derivatives import RULES, movement
from onnxq.analysis.tape import Tape, seed_name
from onnxq.frontier import reads
from onnxq.model import Layer, Model
from onnxq.runtime import Session

__all__ = ["Adjoint", "Gradient", "draw_directions", "output_powers"]

# Scatter, and Pad with a computed number, came with these.
_OPSET = 16


@dataclass(frozen=True, eq=False)
class Gradient:
    """What one sample tells of a layer.

    Args:
        x: The activation that it reads.
        output: Gradient with respect to its output, shaped as that.
        input: Gradient with respect to its input, of what goes through this layer alone.
    """

    x: np.ndarray
    output: np.ndarray
    input: np.ndarray


class Adjoint:
    """A model together with its adjoint, for samples of the shapes of one of them.

    One thread runs a sample; several samples may run side by side.

    Args:
        model: The model; floats.
        layers: The layers that gradients are wanted of.
        feed: A sample.

    Attributes:
        outputs: The outputs in float32, name -> shape: what directions are fed for.
        stopped: Nodes through which no gradient passes -> why.
        partial: Layers of which some effect passes through such nodes -> one of the nodes.

    Raises:
        ModelError: The model does not run on the sample, or its operator set cannot be raised.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[Layer],
        feed: Mapping[str, np.ndarray],
    ) -> None:
        copy = model.clone()
        copy.raise_opset(_OPSET)
        proto = copy.to_proto()
        tape = Tape(proto, feed)
        self._shapes = {name: array.shape for name, array in feed.items()}
        self.outputs = {n: tape.shape(n) for n in copy.outputs if tape.is_single(n)}
        for name in self.outputs:
            tape.add_seed(name)
        self.stopped: dict[str, str] = {}
        self._cut: dict[str, str] = {}  # tensor -> a node at which some of its gradient stops
        wanted = {layer.node.outputs[0].name: layer for layer in layers}
        self._fetched: dict[str, tuple[str, str, str]] = {}
        for node in reversed(proto.graph.node[: len(copy.graph.nodes)]):
            found = self._reverse(tape, node)
            layer = wanted.get(node.output[0]) if node.output else None
            gradient = tape.gradient(node.output[0]) if layer is not None else None
            if layer is not None and gradient is not None:
                part = found[1 - layer.side]
                if part is not None:
                    self._fetched[layer.name] = layer.x.name, gradient, part
        self.partial = {
            layer.name: self._cut[name] for name, layer in wanted.items() if name in self._cut
        }
        names = list(dict.fromkeys(n for triple in self._fetched.values() for n in triple))
        inner = [n for n in names if n not in feed]
        self._session = Session(tape.model(), outputs=inner, threads=1)

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose gradient is known."""
        return list(self._fetched)

    def fits(self, feed: Mapping[str, np.ndarray]) -> bool:
        """Whether a sample has the shapes that the adjoint is for."""
        return {name: array.shape for name, array in feed.items()} == self._shapes

    def run(
        self, feed: Mapping[str, np.ndarray], direction: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, Gradient]]:
        """Name and gradient of each layer on one sample.

        Args:
            feed: A sample that `fits`.
            direction: One array for each of `outputs`: gradients are those of the sum of their
                products with the outputs.
        """
        seeds = {seed_name(n): np.asarray(a, np.float32) for n, a in direction.items()}
        values = {**feed, **self._session.run_shared({**feed, **seeds})}
        for name, (x, gradient, part) in self._fetched.items():
            yield name, Gradient(values[x], values[gradient], values[part])

    def _reverse(self, tape: Tape, node: onnx.NodeProto) -> list[str | None]:
        """Take gradients from the outputs of a node to its inputs; those that it adds to these."""
        nothing: list[str | None] = [None] * len(node.input)
        floats = [n for n in reads(node) if tape.is_float(n)]
        given = [tape.gradient(n) if n else None for n in node.output]
        if cut := next((self._cut[n] for n in node.output if n in self._cut), None):
            self._cut.update(dict.fromkeys(floats, cut))
        if not any(given) or not floats:
            return nothing
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        standard = node.domain in ("", "ai.onnx")
        rule = RULES.get(node.op_type)
        if rule is None and ops.is_movement(node.op_type, _decoded(attrs)):
            rule = movement
        made: Sequence[str | None] | str = f"no rule for the derivative of {node.op_type}"
        if not all(map(tape.is_single, floats)):
            made = "it does not compute in float32"
        elif rule is not None and standard:
            made = rule(tape, node, _decoded(attrs), given)
        if isinstance(made, str):
            self.stopped[node.name] = made
            self._cut.update(dict.fromkeys(floats, node.name))
            return nothing
        found = [*made, *nothing][: len(node.input)]
        for name, part in zip(node.input, found, strict=True):
            if part is not None:
                tape.add_gradient(name, part)
        return found


def _decoded(attrs: Mapping[str, object]) -> dict[str, Any]:
    """Attributes with text in place of bytes."""
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in attrs.items()}


def draw_directions(
    adjoint: Adjoint, powers: Mapping[str, float], count: int, rng: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """Random directions along which squared changes are shares of the power of the outputs.

    Args:
        adjoint: Whose outputs they are of.
        powers: Sum of the squares of each output, of the mean sample.
        count: How many.
        rng: Draws them.
    """
    alive = [n for n in adjoint.outputs if powers.get(n, 0.0) > 0]
    scales = dict.fromkeys(adjoint.outputs, 0.0)
    scales |= {n: 1 / math.sqrt(powers[n] * len(alive)) for n in alive}
    signs = np.array([-1.0, 1.0], np.float32)
    return [
        {n: rng.choice(signs, s) * np.float32(scales[n]) for n, s in adjoint.outputs.items()}
        for _ in range(count)
    ]


def output_powers(session: Session, feeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Sum of the squares of each floating-point output, of the mean sample; 0 if not finite."""
    total: dict[str, float] = {}
    for feed in feeds:
        for name, array in session.run_shared(feed).items():
            if array.dtype.kind == "f":
                square = float(np.square(array.astype(np.float64)).sum()) / len(feeds)
                total[name] = total.get(name, 0.0) + square
    return {n: p if math.isfinite(p) else 0.0 for n, p in total.items()}
