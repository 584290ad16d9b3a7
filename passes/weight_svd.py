"""Layers as two of lower rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.low_rank import LowRank
from onnxq.splits import Rows, Split

__all__ = ["WeightSVD"]


@dataclass(frozen=True, kw_only=True)
class WeightSVD(LowRank):
    """Split convolutions and matrix products into two of lower rank, by the error of their outputs.

    Of the outputs, the r directions of most power are kept::

        Q = U U^T W        U: the leading eigenvectors of W H W^T

        x -> Conv kh x kw, C to O        x -> Conv kh x kw, C to r -> Conv 1 x 1, r to O
        x -> Gemm, K to N                x -> Gemm, K to r -> Gemm, r to N

    with H the second moment of what the layer reads: the best of rank r in
    tr((W - Q) H (W - Q)^T).  A weight of K columns takes r (K + O) in place of O K
    multiplications.  Where gradients are known, errors of the outputs are weighed by what they do
    to the outputs of the model, tr(G (W - Q) H (W - Q)^T): W is G^1/2 W above, and Q is G^-1/2 Q
    in the end.

    Layers are done one after the other.  Each reads what those before it, now compressed, deliver,
    and is to put out what it did in the float model; where it is added to another branch, what
    makes up for the error there.  Half of the samples tell how far the other half is to be
    followed.  The bias, where there may be one, keeps the mean.

    Refused, with the reason: groups, ConvTranspose, MatMul with its weight on the left, weights
    that are shared, computed or not float32, and layers of which no rank saves anything.

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

    Source: Zhang et al. 2016 (arXiv 1505.06798).
    """

    name: ClassVar[str] = "weight-svd"
    split: ClassVar[type[Split]] = Rows
