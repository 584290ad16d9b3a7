"""What the page of a run shows of each layer beside its report, watched over the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq.analysis.findings import ActivationFindings, Histogram
from onnxq.analysis.value_ranges import activation_findings, histogram
from onnxq.encoding import Encoding
from onnxq.model import Model
from onnxq.statistics import Statistics

__all__ = ["Seen", "Watch"]


@dataclass(frozen=True)
class Seen:
    """What was seen of a layer.

    Args:
        before: Its weights in the float model; None where a pass made it, or not all are finite.
        after: The same as they are written.
        reads: What it reads, and the range chosen for it; None where it is not in integers.
    """

    before: Histogram | None
    after: Histogram | None
    reads: ActivationFindings | None


class Watch:
    """Histograms of all layers, watched over a run: show it the model after each pass.

    Args:
        model: The float model; its weights are those before the run until `start` is called.
    """

    def __init__(self, model: Model) -> None:
        self._before: dict[str, Histogram | None] = {}
        self._after: dict[str, Histogram | None] = {}
        self._reads: dict[str, tuple[str, Encoding]] = {}
        self.start(model)

    def start(self, model: Model) -> None:
        """Take the weights of a model as those before the run."""
        self._before = {layer.name: _histogram(layer.weight) for layer in model.layers()}

    def see(self, model: Model) -> None:
        """Take what the encodings of a model make of its weights, and of what layers read."""
        for layer in model.layers():
            encoding, read = layer.weight_encoding, model.encodings.get(layer.x.name)
            if encoding is not None:
                self._after[layer.name] = _histogram(encoding.fake_quantize(layer.weight))
                if read is not None and read.axis is None:
                    self._reads[layer.name] = str(layer.x.name), read

    def finish(self, model: Model, statistics: Statistics | None) -> Mapping[str, Seen]:
        """Layer -> what was seen.

        Args:
            model: The model that the run gave.
            statistics: Of its activations; None where there were no samples.
        """
        # what is still a layer kept its floats, whatever encoding was proposed for it
        self._after |= {layer.name: _histogram(layer.weight) for layer in model.layers()}
        inputs = {*model.inputs}
        known = {} if statistics is None else statistics
        found = {}
        for name, after in self._after.items():
            tensor, encoding = self._reads.get(name, ("", None))
            seen = known.get(tensor)
            reads = None
            if encoding is not None and seen is not None and seen.count:
                reads = activation_findings(tensor, seen, encoding, is_input=tensor in inputs)
            found[name] = Seen(self._before.get(name), after, reads)
        return found


def _histogram(weight: np.ndarray) -> Histogram | None:
    return histogram(weight) if weight.size and np.isfinite(weight).all() else None
