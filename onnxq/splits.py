"""Ways to make two layers of lower rank of one: what can be split, at which ranks, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.curvature import Curvature
from onnxq.graph import rewire
from onnxq.kernels.lowrank import halved, low_rank, rank_errors, spatial, spatial_errors
from onnxq.model import Layer, Model
from onnxq.patches import rows_of, supports
from onnxq.second_order import SecondOrder, trusted_moment
from onnxq.selection import Candidate

__all__ = ["Rows", "Spatial", "Split"]


class Split(ABC):
    """One way to make two layers of one.

    Args:
        multiple: Ranks are multiples of this.
        least: Least rank.
    """

    method: str

    def __init__(self, multiple: int = 8, least: int = 1) -> None:
        self.multiple = multiple
        self.least = least

    def why_not(self, layer: Layer) -> str | None:
        """Why a layer cannot be split so; None if it can."""
        if layer.op == "ConvTranspose":
            return "transposed convolutions are not split"
        if not supports(layer):
            return f"{layer.op} of this kind is not split"
        if layer.group != 1:
            return f"it has {layer.group} groups, each with channels of its own"
        if layer.weight.dtype != np.float32:
            return f"its weight is {layer.weight.dtype}, not float32"
        if not layer.owns_params or layer.model.is_output(layer.weight_tensor):
            return "its weight or bias is shared"
        if layer.bias_tensor is not None and layer.bias is None:
            return "its bias is computed"
        if why := self._shape_unfit(layer):
            return why
        if not self.ranks(layer):
            return f"no rank that is a multiple of {self.multiple} saves anything"
        return None

    def ranks(self, layer: Layer) -> range:
        """The ranks at which there are fewer weights than the layer has."""
        most = (layer.weight.size - 1) // self.weights(layer)
        first = self.multiple * max(1, -(-self.least // self.multiple))
        return range(first, min(most, self.full_rank(layer)) + 1, self.multiple)

    def rank_at(self, layer: Layer, ratio: float) -> int | None:
        """The rank that keeps about a share of a layer's weights; None if that is all of them."""
        wanted = ratio * layer.weight.size / self.weights(layer)
        ranks = self.ranks(layer)
        if ratio >= 1 or not ranks or wanted >= ranks[-1] + self.multiple:
            return None
        return min(ranks, key=lambda rank: abs(rank - wanted))

    def candidates(
        self,
        layer: Layer,
        statistics: SecondOrder,
        macs: int,
        widening: float = 1.0,
        curvature: Curvature | None = None,
        points: int = 0,
    ) -> list[Candidate]:
        """What a layer costs and loses at each rank, from what it reads in the float model.

        Args:
            layer: A layer that can be split.
            statistics: Of its input.
            macs: Multiply-accumulates of the layer.
            widening: Columns of its input for each column of its output.
            curvature: What errors of its outputs are weighed by; None: all alike.
            points: Ranks that are looked at, about; 0 for all.
        """
        moment = trusted_moment(layer, statistics)[0]
        rows = _weighed(rows_of(layer).astype(np.float64), curvature)[0]
        ranks, weights = self.ranks(layer), self.weights(layer)
        ranks = ranks[:: max(1, -(-len(ranks) // points))] if points else ranks
        bias = 0 if layer.bias is None else layer.bias.nbytes
        each = macs / layer.weight.size * self._macs_per_position(layer, widening)
        return [
            Candidate(
                layer=layer.name,
                method=self.method,
                ratio=rank * weights / layer.weight.size,
                rank_or_channels=rank,
                macs=round(rank * each),
                bytes=rank * weights * layer.weight.itemsize + bias,
                error=float(error),
            )
            for rank, error in zip(ranks, self._errors(layer, rows, moment, ranks), strict=True)
        ]

    def nearest(
        self,
        layer: Layer,
        rows: np.ndarray,
        moment: np.ndarray | None,
        rank: int,
        curvature: Curvature | None = None,
    ) -> np.ndarray:
        """The rows of a rank whose outputs are nearest to those of some rows.

        Args:
            layer: Whose rows they are.
            rows: float64 [O, K].
            moment: Second moment of what they multiply, [K, K]; None: the plain SVD.
            rank: The rank.
            curvature: What errors of the outputs are weighed by; None: all alike.
        """
        found = self._nearest(layer, _weighed(rows[None], curvature)[0], moment, rank)
        return found if curvature is None else curvature.undo(found[None])[0]

    @abstractmethod
    def weights(self, layer: Layer) -> int:
        """Weights of both factors for each unit of rank."""

    @abstractmethod
    def full_rank(self, layer: Layer) -> int:
        """The rank at which nothing is lost."""

    @abstractmethod
    def write(self, model: Model, layer: Layer, rank: int) -> None:
        """Put two layers in place of one whose weight has that rank."""

    @abstractmethod
    def _errors(
        self, layer: Layer, rows: np.ndarray, moment: np.ndarray, ranks: Sequence[int]
    ) -> np.ndarray:
        """The relative error of what rows put out at some ranks, by the moment of the input."""

    @abstractmethod
    def _nearest(
        self, layer: Layer, rows: np.ndarray, moment: np.ndarray | None, rank: int
    ) -> np.ndarray:
        """See `nearest`: errors weigh alike."""

    @abstractmethod
    def _shape_unfit(self, layer: Layer) -> str | None:
        """Why a weight of this shape cannot be split."""

    @abstractmethod
    def _macs_per_position(self, layer: Layer, widening: float) -> float:
        """Multiply-accumulates for each unit of rank and position of the output."""


class Spatial(Split):
    """A convolution of kh x kw as one of kh x 1 to r channels, then one of 1 x kw."""

    method = "spatial-svd"

    def weights(self, layer: Layer) -> int:
        """C kh of the first, O kw of the second."""
        outputs, channels, height, width = layer.weight.shape
        return int(channels * height + outputs * width)

    def full_rank(self, layer: Layer) -> int:
        """That of the kernel as a matrix of O kw rows and C kh columns."""
        outputs, channels, height, width = layer.weight.shape
        return int(min(channels * height, outputs * width))

    def _errors(
        self, layer: Layer, rows: np.ndarray, moment: np.ndarray, ranks: Sequence[int]
    ) -> np.ndarray:
        return spatial_errors(rows.reshape(layer.weight.shape), moment, ranks)

    def _nearest(
        self, layer: Layer, rows: np.ndarray, moment: np.ndarray | None, rank: int
    ) -> np.ndarray:
        return spatial(rows.reshape(layer.weight.shape), moment, rank).reshape(rows.shape)

    def write(self, model: Model, layer: Layer, rank: int) -> None:
        """Put two layers in place of one whose weight has that rank."""
        weight = layer.weight.astype(np.float64)
        outputs, channels, height, width = weight.shape
        by_column = weight.transpose(0, 3, 1, 2).reshape(outputs * width, channels * height)
        second, first = halved(by_column, rank)
        second = second.reshape(outputs, width, rank).transpose(0, 2, 1)[:, :, None, :]
        attrs = dict(layer.node.attrs)
        along = dict(attrs)
        attrs["kernel_shape"], along["kernel_shape"] = [height, 1], [1, width]
        for name in ("strides", "dilations"):
            if name in attrs:
                down, across = attrs[name]
                attrs[name], along[name] = [down, 1], [1, across]
        if "pads" in attrs:
            top, left, bottom, right = attrs["pads"]
            attrs["pads"], along["pads"] = [top, 0, bottom, 0], [0, left, 0, right]
        _write(model, layer, first.reshape(rank, channels, height, 1), second, attrs, along)

    def _shape_unfit(self, layer: Layer) -> str | None:
        if layer.op != "Conv":
            return f"{layer.op} has no window"
        window = layer.weight.shape[2:]
        if len(window) != 2:
            return "its window does not have two axes"
        if min(window) == 1:
            return f"its window is {window[0]} x {window[1]}: nothing to take apart"
        return None

    def _macs_per_position(self, layer: Layer, widening: float) -> float:
        outputs, channels, height, width = layer.weight.shape
        return float(channels * height * widening + outputs * width)


class Rows(Split):
    """A weight of O rows as one of r rows, and one that makes O of r values."""

    method = "weight-svd"

    def weights(self, layer: Layer) -> int:
        """K of the first, O of the second."""
        outputs = layer.output_channels
        return int(layer.weight.size // outputs + outputs)

    def full_rank(self, layer: Layer) -> int:
        """That of the weight as a matrix."""
        outputs = layer.output_channels
        return int(min(layer.weight.size // outputs, outputs))

    def _errors(
        self, layer: Layer, rows: np.ndarray, moment: np.ndarray, ranks: Sequence[int]
    ) -> np.ndarray:
        return rank_errors(rows, moment)[[*ranks]]

    def _nearest(
        self, layer: Layer, rows: np.ndarray, moment: np.ndarray | None, rank: int
    ) -> np.ndarray:
        return low_rank(rows, moment, rank)

    def write(self, model: Model, layer: Layer, rank: int) -> None:
        """Put two layers in place of one whose weight has that rank."""
        second, first = halved(rows_of(layer)[0].astype(np.float64), rank)
        if layer.op == "Conv":
            window = layer.weight.shape[1:]
            pointwise = second.reshape(*second.shape, *[1] * (len(window) - 1))
            kernel = {"kernel_shape": [1] * (len(window) - 1)}
            _write(
                model,
                layer,
                first.reshape(rank, *window),
                pointwise,
                dict(layer.node.attrs),
                kernel,
            )
            return
        if not layer.node.attrs.get("transB", 0):  # MatMul, too
            first, second = first.T, second.T
        kept = {k: v for k, v in layer.node.attrs.items() if k == "transB"}
        _write(model, layer, first, second, kept, dict(layer.node.attrs))

    def _shape_unfit(self, layer: Layer) -> str | None:
        return None

    def _macs_per_position(self, layer: Layer, widening: float) -> float:
        return float(self.weights(layer))


def _weighed(rows: np.ndarray, curvature: Curvature | None) -> np.ndarray:
    return rows if curvature is None else curvature.weigh(rows)


def _write(
    model: Model,
    layer: Layer,
    first: np.ndarray,
    second: np.ndarray,
    attrs: Mapping[str, object],
    along: Mapping[str, object],
) -> None:
    """Let a new node make what the layer reads; the layer keeps its name, output and bias."""
    node, x = layer.node, layer.x
    weight = model.constant(f"{layer.weight_tensor.name}.first", first.astype(np.float32))
    between = model.variable(f"{layer.y.name}.first", x.dtype)
    inputs = [x, weight]
    if layer.op == "Gemm" and model.opset < 11:  # the bias could not be left out yet
        inputs.append(model.constant(f"{layer.name}.zero", np.zeros(1, np.float32)))
    before = gs.Node(layer.op, f"{layer.name}.first", dict(attrs), inputs, [between])
    layer.set_weight(np.ascontiguousarray(second.astype(np.float32)))
    rewire(node, x, between)
    node.attrs.clear()
    node.attrs.update(along)
    model.insert([before])
