"""A float model right before it is quantized: cleaned, folded, with ranges and encodings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxq.encoding import Encoding
from onnxq.errors import CalibrationError
from onnxq.model import Model
from onnxq.pass_manager import Context, Pass, PassManager
from onnxq.passes import (
    Calibrate,
    Clean,
    FoldBatchNorm,
    FoldDeadChannels,
    GateEqualization,
    SpaceToDepth,
)
from onnxq.placement import place
from onnxq.runtime import Session
from onnxq.statistics import Statistics

__all__ = ["Calibrated", "calibrate"]

# What comes before calibration in the default recipe, and needs no samples.
_PREPARATION: tuple[Pass, ...] = (Clean(), SpaceToDepth(), FoldBatchNorm(), FoldDeadChannels())


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A float model with encodings, and what they were chosen by.

    Args:
        model: The model, encodings in place.
        statistics: Of every activation that layers read, channels told apart where they have some.
        broken: Tensors with values that are NaN or infinite -> how many; what reads or makes them
            has no encoding.
        passes: What was run.
    """

    model: Model
    statistics: Statistics
    broken: Mapping[str, str]
    passes: tuple[Pass, ...]

    def encoding(self, name: str, dtype: str) -> Encoding | None:
        """How an activation is written in a type: as calibrated, else by least squared error."""
        known = self.model.encodings.get(name)
        if known is not None and known.dtype == dtype and known.axis is None:
            return known
        seen = self.statistics.get(name)
        if seen is None or not seen.count:
            return None
        bits = int(dtype.lstrip("uint"))
        return Encoding.of_range(*seen.range("mse", bits=bits), dtype)


def calibrate(model: Model, ctx: Context, step: Calibrate) -> Calibrated:
    """Bring a model to where it is quantized, in place.

    Args:
        model: The float model.
        ctx: Samples and the rest.
        step: How it is calibrated.

    Raises:
        OnnxqError: Samples do not fit; a weight is not finite.
    """
    PassManager(*_PREPARATION).apply(model, ctx)
    model.raise_opset(13)  # as calibrate would, with the revision
    gates = GateEqualization()
    try:
        PassManager(gates).apply(model, ctx)
        found = _observed(model, ctx, step, {})
    except CalibrationError:
        broken = _broken(model, ctx)
        if not broken:
            raise
        return Calibrated(model, _observed(model, ctx, step, broken), broken, (*_PREPARATION, step))
    return Calibrated(model, found, {}, (*_PREPARATION, gates, step))


def _observed(model: Model, ctx: Context, step: Calibrate, broken: Collection[str]) -> Statistics:
    """Calibrate; the statistics of what layers read, from the same pass over the samples."""
    touched = [
        node.name
        for node in model.graph.nodes
        if any(t.name in broken for t in (*node.inputs, *node.outputs))
    ]
    exclude = (*step.exclude, *touched)
    placement = place(model, ctx.target, exclude)
    layers = [layer for layer in model.layers() if layer.x.name not in broken]
    read = [layer.x.name for layer in layers]
    names = list(dict.fromkeys([*placement.tensors, *read]))
    if not names:
        return Statistics()
    apart = [layer.x.name for layer in layers if layer.op != "MatMul"]
    channels = {*placement.exits, *apart}
    statistics = ctx.statistics(model, names, channels=channels)
    PassManager(replace(step, exclude=exclude)).apply(model, ctx)
    return statistics


def _broken(model: Model, ctx: Context) -> dict[str, str]:
    """Tensors that are not finite on some sample, and what of them is not."""
    made = [t.name for node in model.graph.nodes for t in node.outputs if t.name]
    session = Session(model.to_proto(made), outputs=made, threads=ctx.threads)
    samples = ctx.spread(session, 0)
    found: dict[str, list[int]] = {}
    with ctx.progress.task("look for NaN", samples.length) as advance:
        for feed in samples:
            for name, array in {**feed, **session.run_shared(feed)}.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    total = found.setdefault(name, [0, 0])
                    total[0] += int(array.size - np.isfinite(array).sum())
                    total[1] += array.size
            advance(1)
    return {n: f"{bad} of {size} values are NaN or infinite" for n, (bad, size) in found.items()}
