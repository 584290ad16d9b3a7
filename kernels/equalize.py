"""Scales that even out the channels of neighbouring layers."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel

__all__ = ["equalize"]


@kernel
def equalize(
    weights: np.ndarray,
    layers: np.ndarray,
    classes: np.ndarray,
    members: np.ndarray,
    sites: np.ndarray,
    tops: np.ndarray,
    fixed: np.ndarray,
    scale: np.ndarray,
    by_weight: bool,
    sweeps: int,
    tolerance: float,
    largest: float,
) -> int:
    """Find the scales at which rows and columns of all layers are equally large; in place.

    Class i of channels is divided by scale[i] where it is put out and multiplied by it where it is
    read.  The step for a class is sqrt(r1 / r2), r1 the largest magnitude of its rows or of its
    activations, r2 that of its columns, each as a share of the largest of its layer.

    Args:
        weights: Largest magnitude per output and input channel of each layer, float64, row by row,
            the layers one after the other.
        layers: int64 [L, 6]: where the layer starts in `weights`; its outputs; its inputs per
            group; outputs per group; where its output classes and its input classes start in
            `classes`, -1 where they are not known.
        classes: Class of each channel, int64.
        members: int64 [M, 2]: layer, and 0 if it puts the classes of the site out or 1 if it reads
            them.
        sites: Where the members of each site start, int64 [S + 1].
        tops: Largest magnitude of the activation of each input channel, 0 where it is not to
            count, float64 like `classes`.
        fixed: Classes that keep their scale, bool [classes].
        scale: float64 [classes], changed.
        by_weight: Whether the rows of the weights count.
        sweeps: At most so many sweeps over the sites.
        tolerance: Stop when no scale changed by more than this in a sweep, as |log|.
        largest: Scales stay between 1 / largest and largest.

    Returns:
        How many sweeps it took.

    Source: Nagel et al. 2019 (arXiv 1906.04721), equation 11, iterated.
    """
    rows = np.zeros(scale.size)
    columns = np.zeros(scale.size)
    for sweep in range(sweeps):
        change = 0.0
        for site in range(sites.size - 1):
            for m in range(sites[site], sites[site + 1]):
                offset = layers[members[m, 0], 4 + members[m, 1]]
                count = layers[members[m, 0], 1]
                if members[m, 1] == 1:
                    count = count // layers[members[m, 0], 3] * layers[members[m, 0], 2]
                for c in range(count):
                    rows[classes[offset + c]] = 0.0
                    columns[classes[offset + c]] = 0.0
            for m in range(sites[site], sites[site + 1]):
                layer, side = layers[members[m, 0]], members[m, 1]
                if by_weight or side == 1:
                    found = columns if side == 1 else rows
                    _measure(weights, layer, classes, scale, side, found)
                if side == 1:
                    _measure_activations(tops, layer, classes, scale, rows)
            for m in range(sites[site], sites[site + 1]):
                if members[m, 1] == 1:
                    continue
                offset = layers[members[m, 0], 4]
                for c in range(layers[members[m, 0], 1]):
                    i = classes[offset + c]
                    if fixed[i] or rows[i] <= 0.0 or columns[i] <= 0.0:
                        continue
                    new = scale[i] * np.sqrt(rows[i] / columns[i])
                    new = min(max(new, 1.0 / largest), largest)
                    change = max(change, abs(np.log(new / scale[i])))
                    scale[i] = new
                    rows[i] = 0.0  # once is enough where several layers put it out
        if change <= tolerance:
            return sweep + 1
    return sweeps


@kernel
def _measure(
    weights: np.ndarray,
    layer: np.ndarray,
    classes: np.ndarray,
    scale: np.ndarray,
    side: int,
    found: np.ndarray,
) -> None:
    """Raise found[class] to the largest magnitude of each row or column, shares of the layer's."""
    start, outputs, width, per_group, out, into = layer
    channels = outputs if side == 0 else outputs // per_group * width
    largest = np.zeros(channels)
    top = 0.0
    for o in range(outputs):
        down = 1.0 / scale[classes[out + o]] if out >= 0 else 1.0
        first = o // per_group * width
        for k in range(width):
            up = scale[classes[into + first + k]] if into >= 0 else 1.0
            value = weights[start + o * width + k] * up * down
            c = o if side == 0 else first + k
            largest[c] = max(largest[c], value)
            top = max(top, value)
    if top <= 0.0:
        return
    offset = out if side == 0 else into
    for c in range(channels):
        i = classes[offset + c]
        found[i] = max(found[i], largest[c] / top)


@kernel
def _measure_activations(
    tops: np.ndarray,
    layer: np.ndarray,
    classes: np.ndarray,
    scale: np.ndarray,
    found: np.ndarray,
) -> None:
    """Raise found[class] to the largest magnitude of each input channel, shares of the tensor's."""
    offset = layer[5]
    channels = layer[1] // layer[3] * layer[2]
    top = 0.0
    for c in range(channels):
        top = max(top, tops[offset + c] / scale[classes[offset + c]])
    if top <= 0.0:
        return
    for c in range(channels):
        i = classes[offset + c]
        found[i] = max(found[i], tops[offset + c] / scale[i] / top)
