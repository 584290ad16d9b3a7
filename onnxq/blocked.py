"""Sessions that put tensors out as onnxruntime computes them, whatever the order of their values.

On x86-64 onnxruntime keeps channels in blocks of 8 or 16 between convolutions, and reorders every
tensor that is fetched::

    Conv (blocked) -> t -> ReorderOutput -> y        Conv (blocked) -> y
                      |                                             |
                      `-> Conv (blocked)                            `-> Conv (blocked)
    as onnxruntime optimizes a model                 as it runs here

Extremes, counts and histograms do not depend on the order, and reordering costs about as much as
they do. So the model is optimized once, written, relieved of its last ReorderOutputs, and opened as
it is. Blocks that channels do not fill are filled up with more, which must not be counted: such
tensors are reordered as ever.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from math import gcd
from pathlib import Path

import onnx

from onnxq.errors import ModelError
from onnxq.model_io import TWO_GB, serialized_size
from onnxq.runtime import EXTERNAL_FOLDER, Session
from onnxq.scratch import Scratch

__all__ = ["any_order", "relieved"]

_DOMAIN = "com.microsoft.nchwc"
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def any_order(model: onnx.ModelProto, names: Collection[str], *, threads: int = 0) -> Session:
    """A session whose outputs of these names have the right values in an order of their own.

    Their shapes are right, too. It is a session like any other where there is nothing to gain: the
    model has subgraphs or more than 2 GB of weights, or onnxruntime does not block it, as on Arm,
    or it cannot load what it wrote.

    Args:
        model: The model; its outputs are those of the session.
        names: Outputs of which only the values matter.
        threads: Threads within an operator; 0 lets onnxruntime take every core.

    Raises:
        ModelError: The model is not valid.
    """
    if not _may_block(model) or serialized_size(model) > TWO_GB:
        return Session(model, threads=threads)
    scratch = Scratch()
    try:
        session = _opened(model, names, threads, os.fspath(scratch.path))
    except BaseException:
        scratch.close()
        raise
    scratch.lasts(session)  # what was opened may have mapped its weights into memory
    return session


def _may_block(model: onnx.ModelProto) -> bool:
    """Whether there are convolutions, which onnxruntime may block, and no subgraphs."""
    nodes = model.graph.node
    return any(n.op_type == "Conv" for n in nodes) and not _has_subgraphs(model.graph)


def _has_subgraphs(graph: onnx.GraphProto) -> bool:
    return any(a.type in _GRAPHS for node in graph.node for a in node.attribute)


def _opened(model: onnx.ModelProto, names: Collection[str], threads: int, folder: str) -> Session:
    path = Path(folder) / "optimized.onnx"
    apart = {
        "session.optimized_model_external_initializers_file_name": "weights",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    plain = Session(model, threads=threads, optimized_path=path, config=apart)
    optimized = onnx.load(path, load_external_data=False)
    kept = relieved(optimized, names)
    if not kept:
        return plain
    try:
        session = Session(
            optimized.SerializeToString(),
            threads=threads,
            level="disabled",
            config={EXTERNAL_FOLDER: folder},
        )
    except ModelError:  # onnxruntime does not promise to load what it wrote
        return plain
    wanted = {spec.name: spec.shape for spec in plain.outputs}
    given = {spec.name: spec.shape for spec in session.outputs}
    return session if all(_as_many(wanted[n], given.get(n)) for n in kept) else plain


def _as_many(wanted: tuple[int | str | None, ...] | None, given: object) -> bool:
    """Whether a blocked tensor is known to have the channels of the reordered one, and no more."""
    if not isinstance(given, tuple) or wanted is None or len(given) != len(wanted):
        return False
    return len(wanted) > 1 and isinstance(wanted[1], int) and given[1] == wanted[1]


def relieved(optimized: onnx.ModelProto, names: Collection[str]) -> list[str]:
    """Let tensors keep their blocks where nothing but the caller reads them reordered.

    Args:
        optimized: What onnxruntime runs, edited in place: a blocked tensor takes the name of the
            reordered one.
        names: Outputs whose values may be in any order.

    Returns:
        Those of the names that are blocked now.
    """
    graph = optimized.graph
    block = _block(graph)
    if not block or _has_subgraphs(graph):
        return []
    readers = Counter(name for node in graph.node for name in node.input)
    outputs = {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        attributes = {a.name: a.i for a in node.attribute}
        if (
            (node.domain, node.op_type) == (_DOMAIN, "ReorderOutput")
            and node.output[0] in names
            and node.output[0] in outputs
            and not readers[node.output[0]]
            and node.input[0] not in renamed
            and not attributes.get("channels_last")
            and attributes["channels"] % block == 0
        ):
            renamed[node.input[0]] = node.output[0]
        else:
            kept.append(node)
    for node in kept:
        for tensors in (node.input, node.output):
            tensors[:] = [renamed.get(name, name) for name in tensors]
    free = {*renamed, *renamed.values()}
    infos = [v for v in graph.value_info if v.name not in free]
    # onnxruntime infers the shapes of the blocked ones
    ends = [onnx.ValueInfoProto(name=o.name) if o.name in free else o for o in graph.output]
    for field, items in ((graph.node, kept), (graph.value_info, infos), (graph.output, ends)):
        del field[:]
        field.extend(items)
    return [*renamed.values()]


def _block(graph: onnx.GraphProto) -> int:
    """A number of channels whose multiples fill their blocks; 0 if that is not known.

    Blocked convolutions put out whole blocks, so whatever divides all their numbers of channels is
    a multiple of the block.
    """
    channels = {t.name: t.dims[0] for t in graph.initializer if t.dims}
    blocked = (n for n in graph.node if (n.domain, n.op_type) == (_DOMAIN, "Conv"))
    return gcd(*(channels.get(node.input[1], 0) for node in blocked))
