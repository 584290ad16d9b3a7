"""Activations of all samples at one cut of a graph, which moves from the inputs to the outputs.

What has to look at every layer's input in turn, each time after the layers before it have changed,
would run the model once per layer.  A frontier keeps what the rest of the graph still reads, runs
no more than the stretch up to the next tensor, and so runs the model once in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxq.errors import ModelError
from onnxq.runtime import Session

__all__ = ["AS_WRITTEN", "Frontier", "peak_bytes", "reads"]

# Otherwise onnxruntime rounds float weights between integers itself, on grids of its own.
AS_WRITTEN = {"session.disable_quant_qdq": "1"}

Feed = Mapping[str, np.ndarray]


class Frontier:
    """The samples' activations at a cut through the graph.

    Integers in front of a DequantizeLinear are kept in place of its result: a quarter of the bytes.

    Args:
        model: The model; nodes in topological order.
        feeds: The samples; held until the cut has left the inputs behind.
        threads: Samples that are run side by side.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Iterable[Feed], *, threads: int = 1) -> None:
        self._model = model
        self._threads = threads
        graph = model.graph
        self._constants = {t.name: t for t in graph.initializer}
        self._nodes = list(graph.node)
        self._producer = {o: i for i, n in enumerate(self._nodes) for o in n.output if o}
        self._waiting = {i for i in range(len(self._nodes)) if not self._is_lazy(i)}
        self._readers = self._find_readers()
        self._live: list[dict[str, np.ndarray]] = [dict(feed) for feed in feeds]

    def __len__(self) -> int:
        return len(self._live)

    @property
    def nbytes(self) -> int:
        """Bytes of the activations that are kept."""
        return sum(a.nbytes for live in self._live for a in live.values())

    def set_constant(self, name: str, values: np.ndarray) -> None:
        """Give a constant other values for the stretches that are still to be run.

        Raises:
            ModelError: There is no such constant.
        """
        if name not in self._constants:
            raise ModelError(f"the model has no constant {name!r}")
        self._constants[name] = numpy_helper.from_array(np.asarray(values), name)

    def advance(self, name: str) -> None:
        """Move the cut to where a tensor is known, running what it takes.

        The tensor is kept until what reads it has run.
        """
        wanted = self._stored(name)
        if not self._live or wanted in self._live[0]:
            return
        stretch = self._stretch(wanted)
        kept = self._kept(stretch, wanted)
        session = self._session(stretch, kept)
        self._waiting.difference_update(stretch)
        gone = [n for n in {*self._live[0], *kept} if n != wanted and not self._needed(n)]
        names = [spec.name for spec in session.inputs]

        def step(live: dict[str, np.ndarray]) -> None:
            results = session.run({n: live[n] for n in names})
            live.update(results)
            for n in gone:
                live.pop(n, None)

        if self._threads == 1:
            for live in self._live:
                step(live)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(step, self._live):
                pass

    @property
    def kept(self) -> list[dict[str, np.ndarray]]:
        """What is kept of each sample, by name."""
        return [dict(live) for live in self._live]

    def rest(self) -> onnx.ModelProto | None:
        """What is still to be run, as a model of what is kept; None where no output is left."""
        ahead = {o for i in self._waiting for o in self._nodes[i].output}
        lazy = {o for i, n in enumerate(self._nodes) if self._is_lazy(i) for o in n.output}
        outputs = [o.name for o in self._model.graph.output if o.name in ahead | lazy]
        nodes = {i for name in outputs for i in self._stretch(name)}
        return self._part(sorted(nodes), outputs) if outputs else None

    def values(self, name: str) -> Iterator[np.ndarray]:
        """A tensor that the cut has reached, sample by sample."""
        stored = self._stored(name)
        if stored == name:
            yield from (live[name] for live in self._live)
            return
        node = self._nodes[self._producer[name]]
        scale = numpy_helper.to_array(self._constants[node.input[1]])
        zero = np.zeros_like(scale, np.int32)
        if len(node.input) > 2:
            zero = numpy_helper.to_array(self._constants[node.input[2]]).astype(np.int32)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        for live in self._live:
            q = live[stored]
            shape = [-1 if scale.ndim and i == axis % q.ndim else 1 for i in range(q.ndim)]
            s, z = scale.reshape(shape), zero.reshape(shape).astype(np.float32)
            yield (q.astype(np.float32) - z) * s

    # ---------------------------------------------------------------------- the graph

    def _is_lazy(self, index: int) -> bool:
        """Whether it is a DequantizeLinear of an activation: run by whoever reads it."""
        node = self._nodes[index]
        return (
            node.op_type == "DequantizeLinear"
            and node.input[0] not in self._constants
            and all(n in self._constants for n in node.input[1:])
        )

    def _stored(self, name: str) -> str:
        """The name under which a tensor is kept."""
        index = self._producer.get(name)
        return self._nodes[index].input[0] if index is not None and self._is_lazy(index) else name

    def _find_readers(self) -> dict[str, list[int]]:
        """Kept tensor -> nodes that read it, through DequantizeLinear."""
        readers: dict[str, list[int]] = {}
        for index in self._waiting:
            for name in reads(self._nodes[index]):
                readers.setdefault(self._stored(name), []).append(index)
        return readers

    def _needed(self, name: str) -> bool:
        return any(i in self._waiting for i in self._readers.get(name, ()))

    def _stretch(self, wanted: str) -> list[int]:
        """The nodes that have to run for a tensor to be known, in order."""
        known = {*self._live[0], *self._constants}
        found: set[int] = set()
        todo = [wanted]
        while todo:
            name = todo.pop()
            if name in known or name not in self._producer:
                continue
            index = self._producer[name]
            if index not in found:
                found.add(index)
                todo += reads(self._nodes[index])
        return sorted(found)

    def _kept(self, stretch: Sequence[int], wanted: str) -> list[str]:
        """What a stretch makes that is read later."""
        inside = {*stretch}
        made = [o for i in stretch if not self._is_lazy(i) for o in self._nodes[i].output if o]
        later = self._waiting - inside
        return [
            name
            for name in made
            if name == wanted or any(i in later for i in self._readers.get(name, ()))
        ]

    def _session(self, stretch: Sequence[int], kept: Sequence[str]) -> Session:
        model = self._part(stretch, kept)
        return Session(model, outputs=kept, threads=1, config=AS_WRITTEN)

    def _part(self, stretch: Sequence[int], kept: Sequence[str]) -> onnx.ModelProto:
        """Some nodes as a model of what is kept before them."""
        nodes = [self._nodes[i] for i in stretch]
        read = dict.fromkeys(name for node in nodes for name in reads(node))
        live = self._live[0]
        constants = [self._constants[name] for name in read if name in self._constants]
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(live[name].dtype), self._shape(name)
            )
            for name in read
            if name in live
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in kept]
        graph = helper.make_graph(nodes, "stretch", inputs, outputs, constants)
        model = helper.make_model(graph, functions=list(self._model.functions))
        model.ir_version = self._model.ir_version
        del model.opset_import[:]
        model.opset_import.extend(self._model.opset_import)
        return model

    def _shape(self, name: str) -> list[int | None]:
        """The shape of a kept tensor, axes on which the samples differ unknown."""
        shapes = [live[name].shape for live in self._live]
        first = shapes[0]
        return [n if all(s[i] == n for s in shapes) else None for i, n in enumerate(first)]


def peak_bytes(model: onnx.ModelProto, feeds: Iterable[Feed], names: Iterable[str]) -> int:
    """The most bytes that samples take on the way through a model.

    Args:
        model: The model.
        feeds: The samples.
        names: Tensors to stop at, in graph order.
    """
    frontier = Frontier(model, feeds)
    peak = frontier.nbytes
    for name in names:
        frontier.advance(name)
        peak = max(peak, frontier.nbytes)
    return peak


def reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, those of its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names += reads(inner)
    return names
