"""Take encodings from a file instead of calibrating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxq import encodings_json
from onnxq.biases import guard_bias, written_bias
from onnxq.fitting import channels, fit, lacking, unused
from onnxq.model import Model
from onnxq.pass_manager import Changes, Context
from onnxq.placement import Ends, match_nodes
from onnxq.targets import Kernel

__all__ = ["LoadEncodings"]


@dataclass(frozen=True, kw_only=True)
class LoadEncodings:
    """Replace the model's encodings by those of a JSON file.

    Before and after::

        encodings: anything          encodings: those of the file

    The file is one of AIMET's, of version 0.6.1, 1.0.0 or 2.0.0, or the TensorQuantOverrides of
    onnxruntime.  Biases follow from inputs and weights, moved data from their source.

    Refused: a file that names tensors or nodes which the model does not have, types, zero points
    and scales per channel that the target does not take, and scales that do not fit the tensor.
    Left in float: nodes of which a tensor has no encoding.  Weight scales at which the int32 bias
    would overflow are raised, and named.

    Args:
        path: An encodings file, as `onnxq quantize --save-encodings` writes it.
        exclude: Globs on node names and operator types that stay in float.
        missing: What becomes of tensors that the file leaves out: "float", or "keep" the encodings
            that they have already, as of a pass calibrate before.
    """

    name: ClassVar[str] = "load-encodings"

    path: str
    exclude: tuple[str, ...] = ()
    missing: Literal["float", "keep"] = "float"

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Read the file into `model.encodings`."""
        changes = Changes()
        model.raise_opset(13)
        given = encodings_json.load(self.path, channels(model))
        encodings, notes = fit(model, given, ctx.target, self.path)
        encodings.float_nodes |= dict.fromkeys(match_nodes(model, self.exclude), "excluded")
        changes.add(f"{len(encodings)} encodings from {self.path}")
        if self.missing == "keep":
            kept = {n: e for n, e in model.encodings.items() if n not in encodings}
            encodings.replace(kept)
            encodings.float_nodes = model.encodings.float_nodes | encodings.float_nodes
            changes.add(f"{len(kept)} encodings that the file leaves out kept")
        model.encodings = encodings
        _guard_biases(model, changes)
        for note in notes:
            changes.skip("encodings", note)
        for node, why in lacking(model, ctx.target):
            changes.skip(node, why)
        for tensor in unused(model, ctx.target):
            changes.skip(tensor, "nothing in integers reads or writes it")
        return changes


def _guard_biases(model: Model, changes: Changes) -> None:
    """Raise weight scales until the int32 biases do not overflow."""
    known = model.encodings
    ends = Ends(model, known.float_nodes)
    for layer in model.layers():
        weight, x = layer.weight_encoding, known.get(layer.x.name)
        if weight is None or x is None or layer.bias is None or x.axis is not None:
            continue
        kernel = Kernel("layer")
        raised = guard_bias(weight, written_bias(layer, ends.of(layer.y, kernel)), float(x.scale))
        if raised != weight:
            known[layer.weight_tensor.name] = raised
            changes.skip(layer.name, "a scale of its weight is raised: the int32 bias overflows")
