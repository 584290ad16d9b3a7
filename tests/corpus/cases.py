"""The corpus: models of the onnx package, of the zoo, and generated ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tests.corpus import graphs

__all__ = ["Case", "corpus", "named"]

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One model of the corpus.

    Args:
        name: Where it comes from and what it is called there, by which it is made again.
        make: Makes the model.
        feeds: Makes the samples that come with it; none: there are none.
        bound_db: Least SQNR of a quantized model's float outputs; None: noise may be anything.
    """

    name: str
    make: Callable[[], onnx.ModelProto] = field(repr=False)
    feeds: Callable[[], list[Feed]] = field(repr=False, default=list)
    bound_db: float | None = None


def corpus(*, seed: int = 0, count: int = 300) -> Iterator[Case]:
    """Every case, the small ones first.

    Args:
        seed: Seed of the generated graphs.
        count: How many of them.
    """
    for number in range(count):
        yield _generated(seed + number)
    yield from _files()
    yield from _nodes().values()
    yield from _light()
    yield from _zoo()


def named(name: str) -> Case:
    """The case of a name that `corpus` gave."""
    source, _, rest = name.partition("/")
    if source == "graph":
        return _generated(int(rest))
    if source == "node":
        return _nodes()[name]
    return next(c for c in (*_files(), *_light(), *_zoo()) if c.name == name)


def _generated(seed: int) -> Case:
    return Case(f"graph/{seed}", lambda: graphs.graph(seed), bound_db=graphs.BOUND_DB)


def _files() -> Iterator[Case]:
    """Models that the onnx package ships with samples."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for file in sorted(folder.rglob("model.onnx")):
        name = "/".join(file.parent.relative_to(folder).parts)
        yield Case(f"onnx/{name}", _loader(file), _stored(file))


def _loader(file: Path) -> Callable[[], onnx.ModelProto]:
    return lambda: onnx.load(file)


def _stored(file: Path) -> Callable[[], list[Feed]]:
    """The samples beside a model of the onnx package; none if one of them is no tensor."""

    def read() -> list[Feed]:
        model = onnx.load(file, load_external_data=False)
        constants = {t.name for t in model.graph.initializer}
        infos = list(model.graph.input)
        feeds = []
        for folder in sorted(file.parent.glob("test_data_set_*")):
            feed = {}
            for number, info in enumerate(infos):
                path = folder / f"input_{number}.pb"
                if info.type.WhichOneof("value") != "tensor_type" or not path.exists():
                    if info.name not in constants:
                        return []
                    continue
                if info.name not in constants:
                    tensor = TensorProto.FromString(path.read_bytes())
                    feed[info.name] = numpy_helper.to_array(tensor)
            feeds.append(feed)
        return feeds

    return read


@cache
def _nodes() -> dict[str, Case]:
    """A model per example of each operator's documentation, with its sample."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the examples overflow and divide by zero on purpose
        found = collect_testcases(None)
    cases = {}
    for test in found:
        name = f"node/{test.name}"
        cases[name] = Case(name, _copier(test.model), _given(test.model, test.data_sets or []))
    return cases


def _copier(model: onnx.ModelProto) -> Callable[[], onnx.ModelProto]:
    return lambda: onnx.ModelProto.FromString(model.SerializeToString())


def _given(model: onnx.ModelProto, sets: Sequence[Any]) -> Callable[[], list[Feed]]:
    def read() -> list[Feed]:
        names = [i.name for i in model.graph.input]
        feeds = [dict(zip(names, inputs, strict=False)) for inputs, _ in sets]
        arrays = all(isinstance(a, np.ndarray) for feed in feeds for a in feed.values())
        return feeds if arrays else []

    return read


def _light() -> Iterator[Case]:
    """Networks that the onnx package ships without weights, as they are and with random ones."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for file in sorted(folder.glob("*.onnx")):
        yield Case(f"light/{file.stem}", _loader(file))
        yield Case(f"light/{file.stem}/random", _with_weights(file), bound_db=5.0)


def _with_weights(file: Path) -> Callable[[], onnx.ModelProto]:
    """The network with weights drawn at random where it makes constants of one value."""

    def make() -> onnx.ModelProto:
        model = onnx.load(file)
        rng = np.random.default_rng(0)
        shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        readers = {
            n: (node, slot) for node in model.graph.node for slot, n in enumerate(node.input)
        }
        kept = []
        for node in model.graph.node:
            if node.op_type != "ConstantOfShape" or node.output[0] not in readers:
                kept.append(node)
                continue
            reader, slot = readers[node.output[0]]
            shape = tuple(int(n) for n in shapes[node.input[0]])
            if reader.op_type == "BatchNormalization":
                array = (
                    rng.uniform(0.5, 1.5, shape) if slot in (1, 4) else rng.normal(0, 0.2, shape)
                )
            else:
                fan_in = max(1, int(np.prod(shape[1:])))
                array = rng.normal(0, (2 / fan_in) ** 0.5 if shape[1:] else 0.1, shape)
            tensor = numpy_helper.from_array(array.astype(np.float32), node.output[0])
            model.graph.initializer.append(tensor)
        del model.graph.node[:]
        model.graph.node.extend(kept)
        model.ir_version = 4
        used = {n for node in kept for n in node.input}
        constants = {t.name for t in model.graph.initializer}
        inputs = [i for i in model.graph.input if i.name in used and i.name not in constants]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        return model

    return make


def _zoo() -> Iterator[Case]:
    """The models of the zoo, where there is one."""
    folder = os.environ.get("ONNXQ_ZOO")
    for file in sorted(Path(folder, "models").glob("*.onnx")) if folder else ():
        yield Case(f"zoo/{file.stem}", _loader(file), bound_db=5.0)
