"""Which layers overflow where uint8 times int8 is added in pairs of 16 bits.

x86-64 without VNNI multiplies by VPMADDUBSW: two neighbouring products are added in int16, which
saturates; everything after that is added in 32 bits.  Neighbours are those along K as onnxruntime
packs weights: for matrices as they stand; for convolutions the input channels of a group, tap after
tap of the window, so that with an odd number of channels pairs reach into the next tap.  A layer
multiplies the integers themselves; zero points are taken out of the sums later.

Source: onnxruntime's mlas/lib/x86_64/QgemmU8X8KernelAvx2.S and
providers/cpu/quantization/qlinearconv.cc.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.kernels.saturation import add_overflows
from onnxq.model import Layer, Model, producer
from onnxq.patches import PatchSource, rows_of, supports
from onnxq.runtime import Session

__all__ = ["Saturation", "multiplied_exactly", "neighbours", "saturation", "worst_sums"]

_LIMIT = 32767
# What a bit less costs: the step grows to 127 / 63, its squared error is a twelfth of its square.
_BIT = ((127 / 63) ** 2 - 1) / 12
# The operators that onnxruntime multiplies so.
_MULTIPLY = ("Conv", "Gemm", "MatMul")
# Patches that are drawn at once.
_CHUNK = 1024


@dataclass(frozen=True)
class Saturation:
    """What the sums of pairs do in one layer.

    Args:
        name: Name of the node.
        op: Operator type.
        exact: Why nothing can overflow, whatever the weights; empty if it can.
        pairs: Pairs of neighbouring weights, over all output channels.
        possible: Those whose sum can leave int16, given the least and greatest value that the
            samples showed for each input.
        worst: The greatest magnitude that a sum can reach so.
        sums: Sums that the samples gave, at the positions looked at.
        overflows: Those that left int16.
        noise: What was cut off then: its squared error at the layer's output, as a share of the
            squared error that the seventh bit costs, rounded to nearest.
    """

    name: str
    op: str
    exact: str = ""
    pairs: int = 0
    possible: int = 0
    worst: int = 0
    sums: int = 0
    overflows: int = 0
    noise: float = 0.0

    def __str__(self) -> str:
        if self.exact:
            return self.exact
        text = f"sums of pairs reach {self.worst:,} of {_LIMIT:,}"
        if self.possible:
            text += f" in {self.possible:,} of {self.pairs:,}"
        if self.overflows:
            text += f", {self.overflows:,} of {self.sums:,} overflow on the samples,"
            text += f" {self.noise:.2g} times what a bit costs"
        return text


def multiplied_exactly(layer: Layer, weight: Encoding) -> str:
    """Why a layer's products cannot overflow, whatever their values; empty if they can."""
    if weight.storage.kind != "i":
        return "weights of type uint8 are multiplied exactly"
    if layer.op == "Conv" and layer.group == layer.input_channels == layer.output_channels > 1:
        return "depthwise convolutions are multiplied exactly"
    return ""


def neighbours(layer: Layer, integers: np.ndarray) -> np.ndarray:
    """A layer's weight as rows [G, R, K] in the order of its products, K made even by a zero."""
    if layer.op == "MatMul" and integers.ndim != 2:
        rows = integers.swapaxes(-1, -2).reshape(1, -1, integers.shape[-2])
    else:
        rows = rows_of(layer, integers)
    return _ordered(layer, rows)


def worst_sums(rows: np.ndarray, low: np.ndarray, high: np.ndarray, slack: int = 0) -> np.ndarray:
    """The greatest magnitude that the sum of each pair can reach, [G, R, K / 2].

    Args:
        rows: Weights, integers [G, R, K].
        low: Least integer of each input, [G, K].
        high: Greatest integer of each input, [G, K].
        slack: By how many steps each weight may still move.
    """
    least, most = (np.asarray(a, np.int64)[:, None, :] for a in (low, high))
    wide = rows.astype(np.int64)
    top = np.maximum((wide + slack) * least, (wide + slack) * most)
    bottom = np.minimum((wide - slack) * least, (wide - slack) * most)
    shape = (*rows.shape[:2], -1, 2)
    found: np.ndarray = np.maximum(
        top.reshape(shape).sum(axis=-1), -1 - bottom.reshape(shape).sum(axis=-1)
    )
    return found


def saturation(
    model: Model,
    feeds: Callable[[Session], Iterable[Mapping[str, np.ndarray]]],
    *,
    rng: np.random.Generator,
    patches: int = 4096,
    slack: int = 0,
    threads: int = 0,
) -> list[Saturation]:
    """Look at the sums of each layer that multiplies integers, on samples.

    Args:
        model: A Q/DQ model, as written or as `simulated`; of weights that are no DequantizeLinear
            it holds the encodings.
        feeds: Gives the samples, given a session of the model.
        rng: Picks positions where there are more than `patches` in a sample.
        patches: Look at most at so many positions of a layer and sample.
        slack: By how many steps each weight may still move: what they could overflow then counts
            as possible.
        threads: Threads of onnxruntime; 0 for all cores.
    """
    ready = model.clone()
    known = [*_products(ready)]
    open_ones = [p for p in known if not p.exact]
    names = list(dict.fromkeys(p.layer.x.name for p in open_ones))
    if names:
        # not fused: integer kernels might saturate here, too
        session = Session(ready.to_proto(), outputs=names, threads=threads, level="basic")
        for feed in feeds(session):
            values = session.run_shared(feed)
            for products in open_ones:
                products.see(values[products.layer.x.name], rng, patches)
    return [p.result(slack) for p in known]


def _products(model: Model) -> Iterator[_Products]:
    for node in model.graph.nodes:
        if node.op not in _MULTIPLY:
            continue
        found = _dequantized(model, node.inputs[1])
        if found is not None and found[1] is not None:
            encoding, integers = found[0], found[1]
            constant = model.constant(f"{node.name}.float", encoding.dequantize(integers))
            node.inputs[1] = constant
            model.encodings.derive(constant.name, encoding)
        layer = Layer.of(model, node)
        if layer is None or layer.weight_encoding is None:
            continue
        x = _encoding_of(model, layer.x)
        known = layer.weight_encoding
        if known.axis is not None and known.scale.size != layer.output_channels:
            continue  # scales along another axis: onnxruntime computes something else
        if x is not None and x.bits <= 8 and x.axis is None and layer.side == 1:
            yield _Products(layer, known, x)


class _Products:
    """The products of one layer, and what the samples showed of them."""

    def __init__(self, layer: Layer, weight: Encoding, x: Encoding) -> None:
        self.layer = layer
        self.exact = multiplied_exactly(layer, weight)
        self.x = x
        self.rows = neighbours(layer, weight.quantize(layer.weight)).astype(np.int16)
        # onnxruntime makes int8 activations uint8 on x86-64
        self.shift = 128 if x.dtype == "int8" else 0
        self.source = PatchSource.of(layer) if supports(layer) else None
        groups, _, columns = self.rows.shape
        self.low = np.full((groups, columns), 255 if self.source else 0, np.int64)
        self.high = np.full((groups, columns), 0 if self.source else 255, np.int64)
        full = worst_sums(self.rows, np.zeros_like(self.low), np.full_like(self.high, 255))
        self.suspects = [np.nonzero(full[g] > _LIMIT) for g in range(groups)]
        self.counts = [np.zeros(len(s[0]), np.int64) for s in self.suspects]
        self.excess = [np.zeros(len(s[0]), np.float64) for s in self.suspects]
        self.scale = np.broadcast_to(weight.scale.astype(np.float64), self.rows[:, :, 0].size)
        self.squares = np.zeros(self.low.shape, np.float64)  # of inputs in steps, per position
        self.positions = 0

    def see(self, x: np.ndarray, rng: np.random.Generator, patches: int) -> None:
        """Add what the layer reads on one sample."""
        if self.source is None or not x.size:
            return
        self._stretch(x)
        count = self.source.positions(x)
        picked = np.arange(count)
        if count > patches:
            picked = np.sort(rng.choice(count, patches, replace=False))
        self.positions += picked.size
        self.squares += self._mean_squares(x) * picked.size
        if not any(c.size for c in self.counts):
            return
        for start in range(0, picked.size, _CHUNK):
            drawn = self.source.draw(x, picked[start : start + _CHUNK])
            self._count(_ordered(self.layer, self._integers(drawn)))

    def result(self, slack: int) -> Saturation:
        """What was found."""
        name, op = self.layer.name, self.layer.op
        if self.exact:
            return Saturation(name, op, self.exact)
        low, high = self.low, np.maximum(self.high, self.low)
        if self.source is not None and not self.positions:
            low, high = np.zeros_like(low), np.full_like(high, 255)  # no sample reached it
        worst = worst_sums(self.rows, low, high, slack)
        return Saturation(
            name=name,
            op=op,
            pairs=worst.size,
            possible=int((worst > _LIMIT).sum()),
            worst=int(worst.max(initial=0)),
            sums=self.positions * worst.size,
            overflows=sum(int(c.sum()) for c in self.counts),
            noise=self._noise(),
        )

    def _noise(self) -> float:
        """Squared error of what was cut off over that of a bit less."""
        scale = self.scale.reshape(self.rows.shape[:2]) ** 2
        cut = bit = 0.0
        for g, (suspects, excess) in enumerate(zip(self.suspects, self.excess, strict=True)):
            cut += float((scale[g, suspects[0]] * excess).sum())
            bit += float(scale[g].sum() * self.squares[g].sum()) * _BIT
        return cut / bit if bit > 0 else 0.0

    def _mean_squares(self, x: np.ndarray) -> np.ndarray:
        """Mean square of each input in steps from zero, [G, K]; borders count as the rest."""
        channel = 1 if self.layer.op == "Conv" else x.ndim - 1
        others = tuple(i for i in range(x.ndim) if i != channel)
        steps = x.astype(np.float64) / float(self.x.scale)
        return self._spread(np.square(steps).mean(axis=others))

    def _spread(self, channels: np.ndarray) -> np.ndarray:
        """What is known per input channel, for each input of each group, [G, K]."""
        groups, columns = self.low.shape
        known = channels.reshape(groups, -1)
        taps = self._columns // known.shape[1]
        return np.pad(np.tile(known, (1, taps)), ((0, 0), (0, columns - self._columns)))

    def _integers(self, x: np.ndarray) -> np.ndarray:
        """The integers that are multiplied, from values on the grid."""
        return self.x.quantize(x).astype(np.int16) + np.int16(self.shift)

    def _stretch(self, x: np.ndarray) -> None:
        """Stretch the ranges of the inputs, [G, K]."""
        channel = 1 if self.layer.op == "Conv" else x.ndim - 1
        others = tuple(i for i in range(x.ndim) if i != channel)
        for bounds, value, join in (
            (self.low, x.min(axis=others), np.minimum),
            (self.high, x.max(axis=others), np.maximum),
        ):
            seen = self._integers(value)
            if self.layer.op == "Conv" and _is_padded(self.layer.node):
                seen = join(seen, self._integers(np.zeros(1, np.float32)))
            join(bounds, self._spread(seen), out=bounds)

    @property
    def _columns(self) -> int:
        assert self.source is not None
        return self.source.columns

    def _count(self, drawn: np.ndarray) -> None:
        for g, (suspects, counts) in enumerate(zip(self.suspects, self.counts, strict=True)):
            if counts.size:
                row, pair = suspects
                first = 2 * pair.astype(np.int64)
                both = np.stack([self.rows[g, row, first], self.rows[g, row, first + 1]], axis=1)
                mine = np.ascontiguousarray(drawn[:, g])
                add_overflows(mine, first, both, counts, self.excess[g])


def _ordered(layer: Layer, patches: np.ndarray) -> np.ndarray:
    """Weights or inputs [.., K] of a layer in the order in which they are multiplied, K even."""
    if layer.op == "Conv":
        shape = patches.shape
        taps = int(np.prod(layer.weight.shape[2:]))
        patches = patches.reshape(*shape[:-1], -1, taps).swapaxes(-1, -2).reshape(shape)
    odd = patches.shape[-1] % 2
    return np.pad(patches, [*[(0, 0)] * (patches.ndim - 1), (0, odd)])


def _is_padded(node: gs.Node) -> bool:
    return any(node.attrs.get("pads") or ()) or str(node.attrs.get("auto_pad", "")).startswith(
        "SAME"
    )


def _encoding_of(model: Model, tensor: gs.Tensor) -> Encoding | None:
    found = _dequantized(model, tensor)
    return model.encodings.get(tensor.name) if found is None else found[0]


def _dequantized(model: Model, tensor: gs.Tensor) -> tuple[Encoding, np.ndarray | None] | None:
    """The encoding by which a tensor is dequantized, and its integers if they are constant.

    None if it is not dequantized by constants, or from something else than 8 bits.
    """
    node = producer(tensor)
    if node is None or node.op != "DequantizeLinear":
        return None
    if not all(isinstance(t, gs.Constant) for t in node.inputs[1:]) or node.attrs.get("block_size"):
        return None
    integers, scale = node.inputs[0], model.array(node.inputs[1]).astype(np.float32)
    if len(node.inputs) > 2:
        zero = model.array(node.inputs[2])
    elif isinstance(integers, gs.Constant):
        zero = np.zeros(scale.shape, integers.dtype)
    else:
        return None
    if zero.dtype not in (np.int8, np.uint8):
        return None
    axis = None
    if scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    else:
        axis = int(node.attrs.get("axis", 1))
    encoding = Encoding(zero.dtype.name, scale, zero.astype(np.int32), axis)
    constant = model.array(integers) if isinstance(integers, gs.Constant) else None
    return encoding, constant
