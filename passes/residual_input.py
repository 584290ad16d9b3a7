"""Give an input of wide dynamic range, such as sound, the precision of eleven bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.model import Layer, Model, consumers
from onnxq.pass_manager import Changes, Context
from onnxq.runtime import Session

__all__ = ["ResidualInput"]


@dataclass(frozen=True, kw_only=True)
class ResidualInput:
    r"""Feed a convolution its quantized input and, magnified, what quantization left of it.

    Recordings differ in loudness by orders of magnitude.  On one 8-bit grid the quiet ones keep a
    handful of steps, and no later layer can mend that.  The residue of quantization is known,
    though, and may go through the same integer convolution as further input channels::

        x -> Conv(W)         x -> Q -> DQ -> q ---------> Concat -> Conv([W, W / R])
                              \-- (x - q) * R -----------/

        W x  =  W q + (W / R) (R (x - q))

    Both halves are on the grid of the input, so the noise of the input falls to 1 / R; W / R is
    rounded on the grid of W, which costs little, as the residue is small.  The convolution has
    twice the multiply-adds, so this is done only where the input's own grid is too coarse.

    Refused, with the reason: inputs that something else than one convolution reads, grouped
    convolutions, and targets other than a CPU.

    Args:
        least: Least SQNR of the quantized input in dB, averaged over the samples' noise-to-signal
            ratios, that is good enough as it is.
        magnify: R, a power of two.
        samples: Look at so many samples, spread evenly.

    Source: residual quantization, as in Chen et al. 2010, "Approximate Nearest Neighbor Search by
    Residual Vector Quantization", applied to an input.
    """

    name: ClassVar[str] = "residual-input"

    least: float = 30.0
    magnify: float = 8.0
    samples: int = 64

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Rewrite the convolutions that read coarse inputs."""
        changes = Changes()
        if ctx.data is None:
            return changes
        inputs = [t for t in model.graph.inputs if t.name in model.encodings]
        quality = self._quality(model, inputs, ctx)
        for tensor in inputs:
            sqnr = quality[tensor.name]
            if sqnr >= self.least:
                continue
            layer = _only_reader(model, tensor)
            if isinstance(layer, str):
                changes.skip(tensor.name, f"its SQNR is {sqnr:.1f} dB in integers, but {layer}")
                continue
            if not ctx.target.cpu:
                why = f"{ctx.target.name} would run its residue in float, elsewhere"
                changes.skip(tensor.name, f"its SQNR is {sqnr:.1f} dB in integers, but {why}")
                continue
            self._rewrite(model, tensor, layer)
            changes.add(f"{tensor.name}: {sqnr:.1f} dB in 8 bits, residue through {layer.name}")
        return changes

    def _quality(self, model: Model, inputs: list[gs.Tensor], ctx: Context) -> dict[str, float]:
        """SQNR in dB of each input, from the mean ratio of noise to signal power of a sample."""
        ratios: dict[str, list[float]] = {t.name: [] for t in inputs}
        if not inputs:
            return {}
        session = Session(model.to_proto(), threads=1, level="disabled")
        for feed in ctx.spread(session, self.samples):
            for name, found in ratios.items():
                x = feed[name].astype(np.float32)
                power = float(np.square(x, dtype=np.float64).mean()) if x.size else 0.0
                if power > 0:
                    error = model.encodings[name].fake_quantize(x) - x
                    found.append(float(np.square(error, dtype=np.float64).mean()) / power)
        return {
            name: -10 * float(np.log10(np.mean(found))) if any(found) else np.inf
            for name, found in ratios.items()
        }

    def _rewrite(self, model: Model, tensor: gs.Tensor, layer: Layer) -> None:
        encoding: Encoding = model.encodings[tensor.name]
        name, shape = tensor.name, tensor.shape
        scale = model.constant(f"{name}.scale", encoding.scale)
        zero = model.constant(f"{name}.zero_point", encoding.zero_point.astype(encoding.dtype))
        integers = model.variable(f"{name}.coarse_quantized", np.dtype(encoding.dtype), shape)
        coarse, residue, large = (
            model.variable(f"{name}.{part}", np.float32, shape)
            for part in ("coarse", "residue", "magnified")
        )
        both = model.variable(f"{name}.with_residue", np.float32)
        if shape is not None:
            both.shape = [shape[0], 2 * layer.input_channels, *shape[2:]]
        magnify = model.constant(f"{name}.magnify", np.array(self.magnify, np.float32))
        # the weight keeps its encoding: the new half is smaller
        known = model.encodings[layer.weight_tensor.name]
        weight = layer.weight
        layer.set_weight(np.concatenate([weight, weight / np.float32(self.magnify)], axis=1))
        model.encodings[layer.weight_tensor.name] = known
        layer.node.inputs[0] = both
        model.encodings.derive(both.name, encoding)
        model.insert(
            [
                gs.Node(
                    "QuantizeLinear", f"{name}.quantize", {}, [tensor, scale, zero], [integers]
                ),
                gs.Node(
                    "DequantizeLinear", f"{name}.dequantize", {}, [integers, scale, zero], [coarse]
                ),
                gs.Node("Sub", f"{name}.subtract", {}, [tensor, coarse], [residue]),
                gs.Node("Mul", f"{name}.multiply", {}, [residue, magnify], [large]),
                gs.Node("Concat", f"{name}.join", {"axis": 1}, [coarse, large], [both]),
            ]
        )


def _only_reader(model: Model, tensor: gs.Tensor) -> Layer | str:
    """The convolution that alone reads a tensor, or why there is none."""
    readers = consumers(tensor)
    if len(readers) != 1 or model.is_output(tensor):
        return f"{len(readers)} nodes read it"
    layer = Layer.of(model, readers[0])
    if layer is None or layer.op != "Conv" or layer.x is not tensor:
        return f"{readers[0].name} ({readers[0].op}) reads it"
    if layer.group != 1:
        return f"{layer.name} has groups"
    if layer.name in model.encodings.float_nodes:
        return f"{layer.name} stays in float"
    return layer
