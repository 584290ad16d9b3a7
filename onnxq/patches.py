"""What a layer's weight multiplies: the patches of its input, and the weight as rows upon them.

For a layer y = W x the weight is seen as rows, [G, O/G, K] for G groups, and its input as patches,
K values per group for every position of the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from onnxq.kernels.patches import add_patch_products, add_patch_sums, gather_patches
from onnxq.model import Layer
from onnxq.ops import Window, conv_transpose_window, conv_window

__all__ = ["PatchSource", "columns_of", "rows_of", "supports", "weight_of"]

_Three = tuple[int, int, int]
_Geometry = tuple[_Three, _Three, _Three, _Three, _Three]
_WINDOW = ("strides", "dilations", "pads", "auto_pad", "output_padding", "output_shape")


def rows_of(layer: Layer, weight: np.ndarray | None = None) -> np.ndarray:
    """The weight as rows that multiply patches, [G, O/G, K].

    Args:
        layer: Conv [O, I/G, ...], ConvTranspose [I, O/G, ...], Gemm [K, N] or [N, K], or MatMul
            [K, N].
        weight: Other values, laid out as the layer's weight.
    """
    weight = layer.weight if weight is None else weight
    if layer.op == "Conv":
        return weight.reshape(layer.group, weight.shape[0] // layer.group, -1)
    if layer.op == "ConvTranspose":  # a convolution of the widened input with the kernel mirrored
        grouped = weight.reshape(layer.group, -1, *weight.shape[1:]).swapaxes(1, 2)
        grouped = np.flip(grouped, tuple(range(3, grouped.ndim)))
        return grouped.reshape(*grouped.shape[:2], -1)
    if layer.op == "Gemm" and layer.node.attrs.get("transB", 0):
        return weight[None]
    return weight.T[None]


def weight_of(layer: Layer, rows: np.ndarray) -> np.ndarray:
    """The inverse of `rows_of`: rows [G, O/G, K] in the layout of the layer's weight."""
    shape = layer.weight.shape
    if layer.op == "Conv" or (layer.op == "Gemm" and layer.node.attrs.get("transB", 0)):
        return rows.reshape(shape)
    if layer.op == "ConvTranspose":
        grouped = rows.reshape(layer.group, shape[1], -1, *shape[2:]).swapaxes(1, 2)
        return np.flip(grouped, tuple(range(3, grouped.ndim))).reshape(shape)
    return np.ascontiguousarray(rows[0].T)


def columns_of(layer: Layer, channels: np.ndarray) -> np.ndarray:
    """One value per input channel, [I], for each column of the patches that holds it, [G, K]."""
    each = channels.reshape(layer.group, -1)
    return np.repeat(each, rows_of(layer).shape[-1] // each.shape[1], axis=1)


def supports(layer: Layer) -> bool:
    """Whether the layer is one whose patches can be drawn."""
    if layer.op in ("Conv", "ConvTranspose"):
        return layer.weight.ndim <= 5
    if layer.op == "Gemm":
        return layer.side == 1 and not layer.node.attrs.get("transA", 0)
    return layer.op == "MatMul" and layer.side == 1 and layer.weight.ndim == 2


@dataclass(frozen=True)
class PatchSource:
    """One input with one window; layers that have both in common meet the same patches.

    Args:
        name: The tensor.
        op: Conv, ConvTranspose, or "rows" for matrices.
        groups: G.
        size: Window sizes; empty for matrices.
        window: Strides, dilations and padding, as the node has them.
        columns: K.
    """

    name: str
    op: str
    groups: int
    size: tuple[int, ...]
    window: tuple[tuple[str, object], ...]
    columns: int

    @classmethod
    def of(cls, layer: Layer) -> PatchSource:
        """The source of a layer that `supports`."""
        convolution = layer.op in ("Conv", "ConvTranspose")
        attrs = layer.node.attrs
        window = ((k, attrs[k]) for k in _WINDOW if convolution and k in attrs)
        return cls(
            name=layer.x.name,
            op=layer.op if convolution else "rows",
            groups=layer.group,
            size=tuple(layer.weight.shape[2:]) if convolution else (),
            window=tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in window),
            columns=rows_of(layer).shape[-1],
        )

    def positions(self, x: np.ndarray) -> int:
        """How many patches an input has."""
        return int(np.prod(self.grid(x)))

    def is_pointwise(self, x: np.ndarray) -> bool:
        """Whether each place of an input is a patch of its own."""
        ones = (1,) * len(self.size)
        return self.size == ones and self.grid(x) == (x.shape[0], *x.shape[2:])

    def grid(self, x: np.ndarray) -> tuple[int, ...]:
        """The axes along which patches lie, in order: those of the output, without channels."""
        if self.op == "rows":
            return x.shape[:-1]
        return (x.shape[0], *self._on(x.shape[2:]).positions)

    def draw(self, x: np.ndarray, picked: np.ndarray) -> np.ndarray:
        """The patches at some positions.

        Args:
            x: The input, float32.
            picked: Indices below `positions`, int64 [P].

        Returns:
            float32 [P, G, K].
        """
        shape = (picked.size, self.groups, self.columns)
        if self.op == "rows":
            return np.asarray(x.reshape(-1, x.shape[-1])[picked]).reshape(shape)
        cube, geometry = self._unfolding(x)
        drawn = np.empty((picked.size, self.groups * self.columns), np.float32)
        gather_patches(cube, *geometry, picked, drawn)
        return drawn.reshape(shape)

    def sums(self, x: np.ndarray) -> np.ndarray:
        """The sum of all patches, float64 [G, K]."""
        if self.op == "rows":
            total = x.reshape(-1, x.shape[-1]).sum(axis=0, dtype=np.float64)
        else:
            cube, geometry = self._unfolding(x)
            total = np.zeros((x.shape[1], *geometry[0]))
            add_patch_sums(cube, *geometry, total)
        return np.asarray(total.reshape(self.groups, self.columns))

    def products(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The sum of all patches of channels that groups have to themselves, weighed.

        Args:
            x: The input, float32, as many channels as groups.
            weights: What each patch is multiplied by, float32 [N, G * R, *positions].

        Returns:
            float64 [G, R, K].
        """
        cube, geometry = self._unfolding(x)
        shape = (x.shape[0], self.groups, -1, *geometry[4])
        by = np.ascontiguousarray(weights, np.float32).reshape(shape)
        total = np.zeros((self.groups, by.shape[2], *geometry[0]))
        add_patch_products(cube, by, *geometry, total)
        return total.reshape(*total.shape[:2], self.columns)

    def _on(self, spatial: tuple[int, ...]) -> Window:
        attrs: Mapping[str, object] = dict(self.window)
        if self.op == "Conv":
            return conv_window(dict(attrs), spatial, self.size)
        return conv_transpose_window(dict(attrs), spatial, self.size)

    def _unfolding(self, x: np.ndarray) -> tuple[np.ndarray, _Geometry]:
        """The input as [N, C, D, H, W] and the geometry of its patches, as kernels want them."""
        window = self._on(x.shape[2:])
        if self.op == "ConvTranspose":
            x = _widened(x, cast("Mapping[str, tuple[int, ...]]", dict(self.window)).get("strides"))
        geometry = (
            _three(window.size, 1),
            _three(window.strides, 1),
            _three(window.begin, 0),
            _three(window.dilations, 1),
            _three(window.positions, 1),
        )
        return np.ascontiguousarray(x.reshape(*x.shape[:2], *_three(x.shape[2:], 1))), geometry


def _widened(x: np.ndarray, strides: tuple[int, ...] | None) -> np.ndarray:
    """The input with zeros between neighbours, so that a transposed stride becomes 1."""
    if strides is None or set(strides) == {1}:
        return x
    spatial = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    wide = np.zeros((*x.shape[:2], *spatial), x.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return wide


def _three(sizes: tuple[int, ...], fill: int) -> _Three:
    """Sizes of up to three spatial axes, leading axes filled."""
    padded = (*[fill] * (3 - len(sizes)), *sizes)
    return padded[0], padded[1], padded[2]
