"""Format says how numbers may be written; Encoding says how one tensor is written.

The quantizer is that of ONNX: ``q = clip(round(x / scale) + zero_point, qmin, qmax)`` and back
``x = scale * (q - zero_point)``, rounding half to even.  Scales are float32, and every decision is
made with the float32 value that is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace

import numpy as np

from onnxq.errors import RecipeError, did_you_mean
from onnxq.kernels import quantize as kernels

__all__ = ["DTYPES", "Encoding", "Encodings", "Format"]

# element type -> (bits, signed); those that ONNX has no type for lie in the next wider one
DTYPES = {f"{sign}int{bits}": (bits, not sign) for bits in range(2, 17) for sign in ("", "u")} | {
    "int32": (32, True)
}
TYPES = "types are int2 to int16, uint2 to uint16 and float"
# The least scale that is written: reciprocals of smaller ones overflow float32.
SMALLEST_SCALE = np.float32(1e-30)


@dataclass(frozen=True)
class Format:
    """An element type and how finely scales are shared.

    Written ``int8/channel``, ``int8/tensor``, ``int4/block=32``, ``uint8``, ``int16`` or ``float``;
    a type alone means one scale per tensor.

    Args:
        dtype: ``float`` or a key of `DTYPES`.
        granularity: ``tensor``, ``channel`` or ``block``.
        block: Values per scale; 0 unless the granularity is ``block``.
    """

    dtype: str
    granularity: str = "tensor"
    block: int = 0

    @classmethod
    def parse(cls, text: str | Format) -> Format:
        """The format that a text names.

        Raises:
            RecipeError: The text names no format.
        """
        if isinstance(text, Format):
            return text
        dtype, _, rest = text.strip().lower().partition("/")
        if dtype not in DTYPES and dtype != "float":
            raise RecipeError(
                f"no number format {text!r}", fix=did_you_mean(dtype, [*DTYPES, "float"], TYPES)
            )
        granularity, _, size = (rest or "tensor").partition("=")
        sized = granularity == "block"
        if (
            granularity not in ("tensor", "channel", "block")
            or bool(size) != sized
            or (sized and not (size.isdigit() and int(size) > 1))
        ):
            raise RecipeError(
                f"no number format {text!r}",
                fix="write TYPE, TYPE/tensor, TYPE/channel or TYPE/block=SIZE, as in int8/channel",
            )
        return cls(dtype, granularity, int(size) if sized else 0)

    def __str__(self) -> str:
        if self.granularity == "tensor":
            return self.dtype
        return f"{self.dtype}/{self.granularity}" + (f"={self.block}" if self.block else "")

    @property
    def bits(self) -> int:
        """Bits of one value; 32 for float."""
        return 32 if self.dtype == "float" else DTYPES[self.dtype][0]

    @property
    def signed(self) -> bool:
        """Whether the integers run below zero."""
        return self.dtype != "float" and DTYPES[self.dtype][1]


def in_bytes(dtype: str) -> str:
    """The element type of one or more whole bytes that holds the values of one."""
    bits, signed = DTYPES[dtype]
    size = next(n for n in (8, 16, 32) if n >= bits)
    return f"int{size}" if signed else f"uint{size}"


def limits(dtype: str) -> tuple[int, int]:
    """The least and the greatest integer of an element type."""
    bits, signed = DTYPES[dtype]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


@dataclass(frozen=True, eq=False)
class Encoding:
    """How one tensor is written in integers.

    Args:
        dtype: A key of `DTYPES`.
        scale: float32, shape [] (per tensor), [C] (one per index of `axis`), or, in blocks, that of
            the tensor with `axis` divided by the block.
        zero_point: int32, same shape.
        axis: The axis that the scales run along; None per tensor.
        block: So many neighbours along `axis` share a scale; 0: all that have the same index.
    """

    dtype: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    block: int = 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Encoding)
            and (self.dtype, self.axis, self.block) == (other.dtype, other.axis, other.block)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    def __hash__(self) -> int:
        arrays = self.scale.tobytes(), self.zero_point.tobytes()
        return hash((self.dtype, self.axis, self.block, *arrays))

    @classmethod
    def of_range(cls, low: float, high: float, dtype: str, *, symmetric: bool = False) -> Encoding:
        """The per-tensor encoding that covers [low, high], zero always exactly on the grid.

        Asymmetric grids shrink or grow by less than half a step so that zero is a grid point.
        """
        qmin, qmax = limits(dtype)
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if symmetric:
            return cls.symmetric(np.array(max(-low, high)), dtype)
        scale = max(np.float32((high - low) / (qmax - qmin)), SMALLEST_SCALE)
        if high == low:  # nothing but zeros: any scale is right, and 1 keeps biases exact
            scale = np.float32(1)
        zero = np.clip(np.rint(qmin - low / np.float64(scale)), qmin, qmax)
        return cls(dtype, np.array(scale, np.float32), np.array(zero, np.int32))

    @classmethod
    def of_ranges(cls, low: np.ndarray, high: np.ndarray, dtype: str, *, axis: int) -> Encoding:
        """The encoding that covers [low[c], high[c]] along an axis; both arrays have shape [C].

        Channels that are never anything but zero share the finest step of the others.
        """
        parts = [cls.of_range(a, b, dtype) for a, b in zip(low, high, strict=True)]
        dead = np.array([min(a, 0.0) == max(b, 0.0) for a, b in zip(low, high, strict=True)])
        scale = np.array([p.scale for p in parts], np.float32)
        scale = np.where(dead & ~dead.all(), scale[~dead].min(initial=np.inf), scale)
        zero = np.array([p.zero_point for p in parts], np.int32)
        return cls(dtype, scale.astype(np.float32), zero, axis)

    @classmethod
    def symmetric(
        cls, bound: np.ndarray, dtype: str, axis: int | None = None, block: int = 0
    ) -> Encoding:
        """The symmetric encoding whose largest magnitudes are `bound`, of the shape of the scales.

        int8 spans [-127, 127] and uint8 the same around 128, the rule of onnxruntime.
        """
        qmin, qmax = limits(dtype)
        centre = 0 if qmin < 0 else (qmax + 1) // 2
        bound = np.asarray(bound, np.float64)
        scale = np.where(bound > 0, bound / (qmax - centre), 1.0)
        scale = np.maximum(scale.astype(np.float32), SMALLEST_SCALE)
        return cls(dtype, scale, np.full(scale.shape, centre, np.int32), axis, block)

    @property
    def transposed(self) -> Encoding:
        """The encoding of the transposed matrix."""
        if self.axis is None:
            return self
        scale, zero = self.scale, self.zero_point
        if self.block:
            scale, zero = np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T)
        return replace(self, scale=scale, zero_point=zero, axis=1 - self.axis % 2)

    @property
    def storage(self) -> np.dtype:
        """The numpy type that holds the integers, a byte each or more."""
        return np.dtype(in_bytes(self.dtype))

    @property
    def fills_storage(self) -> bool:
        """Whether the type that holds the integers has no others."""
        return in_bytes(self.dtype) == self.dtype

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return DTYPES[self.dtype][0]

    @property
    def qmin(self) -> int:
        """The least integer."""
        return limits(self.dtype)[0]

    @property
    def qmax(self) -> int:
        """The greatest integer."""
        return limits(self.dtype)[1]

    @property
    def low(self) -> float:
        """The least value of the grid (over channels)."""
        return float(np.min((self.qmin - self.zero_point.astype(np.float64)) * self.scale))

    @property
    def high(self) -> float:
        """The greatest value of the grid (over channels)."""
        return float(np.max((self.qmax - self.zero_point.astype(np.float64)) * self.scale))

    def within(self, low: float, high: float) -> Encoding:
        """This per-tensor encoding, its step shrunk until the whole grid lies in [low, high].

        onnxruntime drops a Relu or Clip before QuantizeLinear only if the grid does not leave its
        bounds, to an absolute 1e-7, so the rounding of the scale to float32 matters.
        """
        scale, zero = np.float32(self.scale), int(self.zero_point)
        for steps, bound in ((self.qmin - zero, low), (self.qmax - zero, high)):
            if steps and np.isfinite(bound) and abs(np.float32(steps) * scale) > abs(bound):
                scale = np.float32(abs(bound) / abs(steps))
                while scale > 0 and abs(np.float32(steps) * scale) > abs(bound):
                    scale = np.nextafter(scale, np.float32(0))
        return replace(self, scale=np.array(max(scale, SMALLEST_SCALE), np.float32))

    def grid_shape(self, rank: int) -> tuple[int, ...]:
        """The shape in which scales, not in blocks, broadcast over a tensor of this rank."""
        if self.axis is None:
            return ()
        return tuple(-1 if i == self.axis % rank else 1 for i in range(rank))

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Float values to integers of the type `storage`."""
        scale, zero = self._grid(np.shape(x))
        return kernels.quantize(x, scale, zero, self.qmin, self.qmax, dtype=self.storage)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """Integers to float32 values."""
        return kernels.dequantize(q, *self._grid(np.shape(q)))

    def fake_quantize(self, x: np.ndarray) -> np.ndarray:
        """Float values moved to the nearest grid point, float32."""
        return kernels.fake_quantize(x, *self._grid(np.shape(x)), self.qmin, self.qmax)

    def _grid(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points in a shape that broadcasts over a tensor of this shape."""
        if self.block:
            assert self.axis is not None
            return (
                np.repeat(self.scale, self.block, self.axis),
                np.repeat(self.zero_point, self.block, self.axis),
            )
        along = self.grid_shape(len(shape))
        return self.scale.reshape(along), self.zero_point.reshape(along)


@dataclass
class Encodings(MutableMapping[str, Encoding]):
    """The one product that flows between passes: an encoding per tensor name.

    Args:
        tensors: Encoding of each activation and weight that is to be written in integers.
        float_nodes: Name of each node that stays in float -> the reason.
        derived: Tensors that passes made after calibration, as they will again: not worth saving.
        float_tensors: Tensors that a file says are written in a floating-point type -> the type.
    """

    tensors: dict[str, Encoding] = field(default_factory=dict)
    float_nodes: dict[str, str] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    float_tensors: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Encoding:
        return self.tensors[name]

    def __setitem__(self, name: str, encoding: Encoding) -> None:
        self.tensors[name] = encoding

    def __delitem__(self, name: str) -> None:
        del self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def opset(self) -> int:
        """The least operator set that can write them: 21 for blocks and 16 bits, else 13."""
        known = self.tensors.values()
        return 21 if any(e.block or e.storage.itemsize == 2 for e in known) else 13

    def copy(self) -> Encodings:
        """An independent copy; encodings themselves are immutable."""
        return Encodings(
            *(dict(self.tensors), dict(self.float_nodes), set(self.derived)),
            dict(self.float_tensors),
        )

    def derive(self, name: str, encoding: Encoding) -> None:
        """Give an encoding to a tensor that the model did not have when it was calibrated."""
        self.tensors[name] = encoding
        self.derived.add(name)

    def replace(self, other: Mapping[str, Encoding]) -> None:
        """Take over every encoding of `other`."""
        self.tensors.update(other)
