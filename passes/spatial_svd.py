"""Convolutions of kh x kw as two, kh x 1 and 1 x kw, with few channels between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.low_rank import LowRank
from onnxq.splits import Spatial, Split

__all__ = ["SpatialSVD"]


@dataclass(frozen=True, kw_only=True)
class SpatialSVD(LowRank):
    """Split convolutions into a vertical and a horizontal one, by the error of their outputs.

    A kernel of kh x kw that is a sum of r products of a column and a row is two convolutions::

        W[o, c, i, j]  ~  sum over q of  U[o, q, j] V[q, c, i]

        x -> Conv kh x kw, C to O        x -> Conv kh x 1, C to r -> Conv 1 x kw, r to O

    which takes r (C kh + O kw) in place of O C kh kw multiplications.  V begins with the leading
    directions of what single columns of the kernel put out, U is solved for by least squares on
    what V delivers, and both are improved in turns; the error is that of the outputs,
    tr((W - Q) H (W - Q)^T) with H the second moment of the patches that the layer meets.

    Layers are done one after the other.  Each reads what those before it, now compressed, deliver,
    and is to put out what it did in the float model; where it is added to another branch, what
    makes up for the error there.  Half of the samples tell how far the other half is to be
    followed.  The bias keeps the mean.

    Refused, with the reason: groups, windows that are not of two axes or have one of length 1,
    weights that are shared, computed or not float32, and layers of which no rank saves anything.

    Args:
        ratio: Share of a layer's weights that is kept; 1 leaves it whole.
        ratios: Names of layers with ratios of their own, as in [["conv1", 0.4]].
        multiple: Ranks are multiples of this.
        least: Least rank.
        exclude: Globs on names or operator types of layers that are left whole.
        reconstruct: all (layers that stay whole make up for errors before them, too), split (those
            that are split alone) or none (the plain SVD, without samples).
        samples: Use at most so many calibration samples, spread evenly; 0 uses all.
        patches: Patches drawn per layer, about.
        memory_mb: Megabytes that activations and statistics may take each.

    Source: Jaderberg et al. 2014 (arXiv 1405.3866); layer after layer: Zhang et al. 2016 (arXiv
    1505.06798).
    """

    name: ClassVar[str] = "spatial-svd"
    split: ClassVar[type[Split]] = Spatial
