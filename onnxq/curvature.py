"""What errors of a layer's outputs do to the outputs of the model, direction by direction.

With g the gradient of the model's outputs, along a random direction there, with respect to what a
layer puts out at a position, an error d there is expected to change the model's outputs by the
squared error d^T G d, G = E[g g^T]: the curvature of that error, after Gauss and Newton.  An error
D of the weight, which meets patches with the second moment H, so costs tr(G D H D^T) in place of
tr(D H D^T).  Outputs that saturate, or that later layers hardly read, count for little.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from onnxq.analysis.adjoint import Adjoint, draw_directions, output_powers
from onnxq.errors import OnnxqError
from onnxq.kernels.rounding import shrink
from onnxq.model import Layer, Model
from onnxq.pass_manager import Context
from onnxq.patches import PatchSource
from onnxq.runtime import Session, cores

__all__ = ["Curvature", "curvatures"]

# Samples that gradients come from.
SAMPLES = 64
# Of the mean of G's diagonal, added to it: what these samples show nothing of counts a little, too.
_DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature G of one layer.

    Args:
        root: S with S S = G, symmetric, float64 [G, O/G, O/G].
        inverse: Its inverse.
    """

    root: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, halves: np.ndarray) -> Curvature:
        """The curvature by sums of g g^T over two halves of the samples, [2, G, O/G, O/G]."""
        roots = []
        for half, other in zip(*halves, strict=True):
            found = shrink((half + other) / 2, 1, half, other)
            found.flat[:: len(found) + 1] += _DAMPING * np.trace(found) / len(found)
            values, vectors = np.linalg.eigh(found)
            roots.append([(vectors * values**power) @ vectors.T for power in (0.5, -0.5)])
        root, inverse = np.array(roots).swapaxes(0, 1)
        return cls(root, inverse)

    def weigh(self, rows: np.ndarray) -> np.ndarray:
        """Rows [G, O/G, K] whose errors count as much one as another."""
        return np.asarray(np.matmul(self.root, rows))

    def undo(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `weigh`."""
        return np.asarray(np.matmul(self.inverse, rows))


def curvatures(
    model: Model, layers: Sequence[Layer], ctx: Context, rng: np.random.Generator
) -> tuple[dict[str, Curvature], dict[str, str]]:
    """The curvature of layers, by their names.

    Args:
        model: A float model.
        layers: Its layers of which they are wanted, all of which `supports`.
        ctx: Where samples come from.
        rng: Draws directions.

    Returns:
        The curvatures, and, of each layer that has none, why.
    """
    plain = Session(model.to_proto(), threads=1)
    feeds = [*ctx.spread(plain, SAMPLES)]
    try:
        adjoint = Adjoint(model, layers, feeds[0])
    except OnnxqError as error:
        return {}, {layer.name: str(error) for layer in layers}
    unknown = {
        name: f"no gradient passes {cut}: {adjoint.stopped[cut]}"
        for name, cut in adjoint.partial.items()
    }
    feeds = [feed for feed in feeds if adjoint.fits(feed)]
    seeds = draw_directions(adjoint, output_powers(plain, feeds), len(feeds), rng)
    wanted = {layer.name: layer for layer in layers if layer.name not in unknown}

    def squares(index: int) -> dict[str, np.ndarray]:
        found = adjoint.run(feeds[index], seeds[index])
        return {name: _squares(wanted[name], g.output) for name, g in found if name in wanted}

    halves: dict[str, np.ndarray] = {}
    threads = min(ctx.threads, cores()) or cores()
    with (
        ctx.progress.task("curvature", len(feeds)) as advance,
        ThreadPoolExecutor(threads) as pool,
    ):
        for index, found in enumerate(pool.map(squares, range(len(feeds)))):
            for name, part in found.items():
                if name not in halves:
                    halves[name] = np.zeros((2, *part.shape))
                halves[name][index % 2] += part
            advance(1)
    known = {}
    for name in wanted:
        if name not in halves:
            unknown[name] = "no output depends on it"
        elif not np.isfinite(total := float(halves[name].sum())) or total == 0:
            unknown[name] = "its gradients are zero or not finite"
        else:
            known[name] = Curvature.of(2 * halves[name] / len(feeds))
    return known, unknown


def _squares(layer: Layer, gradient: np.ndarray) -> np.ndarray:
    """The sum over positions of g g^T, [G, O/G, O/G]."""
    if PatchSource.of(layer).op != "rows":
        gradient = np.moveaxis(gradient, 1, -1)
    groups = gradient.reshape(-1, layer.group, layer.output_channels // layer.group)
    columns = np.ascontiguousarray(groups.transpose(1, 2, 0))
    return np.asarray(np.matmul(columns, columns.swapaxes(1, 2)), np.float64)
