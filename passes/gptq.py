"""Round weights by the error of the layer's output, and correct its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.layer_inputs import LayerInputs, why_nearest
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context
from onnxq.quadratic import Quadratic, settle
from onnxq.second_order import SecondOrder

__all__ = ["GPTQ"]


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Move weights onto their grid so that layer outputs change least, then correct the biases.

    Rounding to nearest minimises the error of the weight; what matters is that of the output,
    tr((Q - W) H (Q - W)^T) with H the second moment of the layer's input.  Columns are rounded one
    after the other, and the columns not yet rounded make up for each error::

        w[j] -= (w[k] - q[k]) / U[k, k] * U[k, j]   for j > k,      H^-1 = U^T U
        b    += (W - Q) m                                           m = mean patch

    Where a bias takes up the shift of the mean, H is taken about the mean.  H is drawn towards its
    diagonal by its sampling noise, and the rounding noise of the integer input, s_x^2 / 12, is
    added to its diagonal, so that few samples do no harm.

    Before and after::

        W: float                      W: values on the grid of its encoding, b moved

    Refused: layers without an encoding (they stay float), shared weights, MatMul with its weight on
    the left; these are rounded to nearest.  A row is left at nearest where that is no worse.

    Args:
        samples: Use at most so many calibration samples, spread evenly; 0 uses all.
        patches: Patches drawn per layer, about.
        sequential: Whether layers are done one after the other, each against the inputs that the
            ones before it, now quantized, give it; w is then first moved to what serves those best.
        memory_mb: Megabytes that statistics may take; where they would take more, layers go in
            groups, with one run over the samples for each.

    Source: Frantar et al. 2022 (arXiv 2210.17323); bias: Nagel et al. 2019 (arXiv 1906.04721).
    """

    name: ClassVar[str] = "gptq"

    samples: int = 32
    patches: int = 8192
    sequential: bool = False
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if self.samples < 0 or self.patches < 1 or self.memory_mb < 1:
            raise RecipeError(
                f"samples {self.samples}, patches {self.patches}, memory_mb {self.memory_mb}:"
                " wanted at least 0, 1 and 1"
            )

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Rewrite weights and biases."""
        changes = Changes()
        layers = [layer for layer in model.layers() if self._wanted(layer, changes)]
        if not layers:
            return changes
        inputs = LayerInputs(
            model,
            layers,
            ctx,
            rng=lambda index: ctx.rng(self),
            sequential=self.sequential,
            samples=self.samples,
            patches=self.patches,
            memory_mb=self.memory_mb,
        )
        count = 0
        with ctx.progress.task("round weights", len(layers)) as advance:
            for layer in layers:
                statistics = inputs.measure(layer)
                if statistics is None:
                    changes.skip(layer.name, "no sample reached it")
                else:
                    count += self._search(layer, statistics)
                inputs.settle(layer)
                advance(1)
        changes.add(f"{count} weights rounded by output error")
        return changes

    def _wanted(self, layer: Layer, changes: Changes) -> bool:
        if layer.weight_encoding is None:
            return False
        if why := why_nearest(layer):
            changes.skip(layer.name, why)
            return False
        return True

    def _search(self, layer: Layer, statistics: SecondOrder) -> bool:
        """Round one layer and correct its bias; False if nearest was kept."""
        problem = Quadratic.of(layer, statistics)
        nearest = problem.nearest
        rounded = problem.better(nearest, problem.column_by_column())
        settle(layer, rounded, statistics, problem.scale)
        return not np.array_equal(rounded, nearest)
