"""Where along a graph the error of quantization enters, and where it grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxq.analysis.findings import TensorFindings
from onnxq.analysis.sensitivity import decibel
from onnxq.frontier import AS_WRITTEN
from onnxq.kernels.difference import powers
from onnxq.model import Model
from onnxq.runtime import Session

__all__ = ["error_flow"]

_Powers = dict[str, tuple[float, float]]


def error_flow(
    model: Model,
    simulated: Model,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    threads: int = 1,
    progress: Callable[[int], object] = lambda steps: None,
) -> list[TensorFindings]:
    """SQNR of each tensor of a simulated model, in graph order.

    Args:
        model: The float model.
        simulated: What `onnxq.simulation.simulated` makes of it.
        samples: What to run both on; one at a time in memory.
        threads: Samples that are run side by side.
        progress: Called with 1 after each sample.
    """
    made = [t.name for node in model.graph.nodes for t in node.outputs if t.name]
    raw, rounded = _names(model, simulated)
    inside = [n for n in dict.fromkeys([*raw.values(), *rounded.values()]) if n not in model.inputs]
    before = Session(model.to_proto(made), outputs=made, threads=1)
    after = Session(simulated.to_proto(inside), outputs=inside, threads=1, config=AS_WRITTEN)
    computed, written = _Flow(raw), _Flow(rounded)

    def one(feed: Mapping[str, np.ndarray]) -> tuple[_Powers, _Powers]:
        wanted = {**feed, **before.run_shared(feed)}
        got = after.run_shared(feed)
        return computed.powers(wanted, got), written.powers(wanted, got)

    with ThreadPoolExecutor(threads) as pool:
        for parts in pool.map(one, samples):
            computed.add(parts[0])
            written.add(parts[1])
            progress(1)
    found = [TensorFindings(n, "", "", None, written.sqnr(n)) for n in model.inputs if n in rounded]
    seen = {f.name: f.written_sqnr_db for f in found}
    for node in model.graph.nodes:
        known = [s for t in node.inputs if (s := seen.get(t.name)) is not None]
        for name in (t.name for t in node.outputs):
            if name not in computed.names:
                continue
            sqnr, as_read = computed.sqnr(name), written.sqnr(name)
            inherited = min(known, default=None)
            note = computed.notes.get(name, "")
            found.append(TensorFindings(name, node.name, node.op, sqnr, as_read, inherited, note))
            seen[name] = sqnr if as_read is None else as_read
    return found


def _names(model: Model, simulated: Model) -> tuple[dict[str, str], dict[str, str]]:
    """Tensor -> its name in the simulated model as it is computed, and as it is read."""
    known = model.tensors()
    raw = {t.name: t.name for node in model.graph.nodes for t in node.outputs if t.name}
    rounded = {}
    for node in simulated.graph.nodes:
        if node.op != "QuantizeLinear":
            continue
        source = node.inputs[0].name
        for reader in node.outputs[0].outputs:
            result = reader.outputs[0].name
            name = result if result in known else source  # an output keeps its name
            if name in known and reader.op == "DequantizeLinear":
                rounded[name] = result
                raw |= {name: source} if name in raw else {}
    return raw, rounded


class _Flow:
    """Tensors of two models, sample by sample; one that cannot be compared stops no other.

    Args:
        names: Tensor -> its name in the other model.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.notes: dict[str, str] = {}
        self._total: dict[str, np.ndarray] = {}

    def powers(self, wanted: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> _Powers:
        """Signal and noise of each tensor of floats; NaN where shapes differ."""
        found = {}
        for name, other in self.names.items():
            a, b = wanted.get(name), got.get(other)
            if a is not None and b is not None and a.dtype.kind == "f" and a.size:
                found[name] = powers(a, b) if a.shape == b.shape else (np.nan, np.nan)
        return found

    def add(self, found: _Powers) -> None:
        """Take in one sample."""
        for name, pair in found.items():
            self._total[name] = self._total.get(name, np.zeros(2)) + pair
            if not np.isfinite(pair).all():
                self.notes[name] = "values are NaN or infinite, or of another shape"

    def sqnr(self, name: str) -> float | None:
        """SQNR in dB; None where there is none."""
        if name in self.notes or name not in self._total:
            return None
        signal, noise = self._total[name].tolist()
        return decibel(noise / signal if signal > 0 else math.inf if noise > 0 else 0.0)
