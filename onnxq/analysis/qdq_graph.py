"""A copy of a Q/DQ model that is rewritten as onnxruntime would, with the grids of its nodes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.qdq import Grid, grid_of, is_dequantize, is_quantize
from onnxq.model import Model, producer, rewire

__all__ = ["QdqGraph"]


class QdqGraph:
    """A copy of a model, of which Q and DQ may come, go and change.

    Args:
        source: The model, with the types of its tensors; left as it is.
        arm: Whether int8 activations stay int8, as on ARM.

    Attributes:
        model: The copy.
        arm: Whether int8 activations stay int8.
    """

    def __init__(self, source: Model, *, arm: bool) -> None:
        self.arm = arm
        self.model = source.clone()
        self._grids: dict[int, Grid] = {}
        self._unsigned: set[int] = set()
        self._inserted: set[int] = set()
        self._main = {id(n) for n in self.model.graph.nodes}

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is an output of the model."""
        return self.model.is_output(tensor)

    def grid(self, node: gs.Node) -> Grid:
        """The grid of a Q or a DQ as it is by then."""
        found = self._grids.get(id(node))
        if found is None:
            found = grid_of(self.model, node)
            self._grids[id(node)] = found
        return found

    def dtype(self, node: gs.Node) -> str:
        """The element type on the integer side of a Q or a DQ."""
        side = node.outputs[0] if is_quantize(node) else node.inputs[0]
        dtype = self.grid(node).dtype
        return "uint8" if dtype == "int8" and id(side) in self._unsigned else dtype

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Who reads a tensor, once per input; subgraphs among them."""
        return list(tensor.outputs)

    def pair_readers(self, quantize: gs.Node) -> int:
        """How many edges a Q has once every reader has a DQ of its own."""
        tensor = quantize.outputs[0]
        count = int(self.is_output(tensor))
        for node in tensor.outputs:
            if is_dequantize(node):
                result = node.outputs[0]
                count += max(1, len(result.outputs) + self.is_output(result))
            else:
                count += 1
        return count

    def _remove(self, node: gs.Node) -> None:
        node.inputs.clear()
        node.outputs.clear()
        self.model.graph.nodes[:] = [n for n in self.model.graph.nodes if n is not node]

    def _only_reader(self, node: gs.Node) -> gs.Node | None:
        """The node that alone reads the result of another."""
        tensor = node.outputs[0]
        if self.is_output(tensor) or len(tensor.outputs) != 1:
            return None
        after: gs.Node = tensor.outputs[0]
        return after if id(after) in self._main else None

    def _one_edge(self, tensor: gs.Tensor) -> bool:
        return len(tensor.outputs) == 1 and not self.is_output(tensor)

    def _insert(self, tensor: gs.Tensor, readers: list[gs.Node], grid: Grid) -> gs.Node:
        """A pair behind a tensor, for these readers; for the output of the model if none."""
        integers = gs.Variable(f"{tensor.name}/q{len(self._grids)}")
        if readers:
            result = gs.Variable(f"{tensor.name}/dq{len(self._grids)}", shape=tensor.shape)
            result.dtype = tensor.dtype
            for reader in {id(n): n for n in readers}.values():
                rewire(reader, tensor, result)
        else:  # the output keeps its name, so what came before gets another one
            before, result = producer(tensor), tensor
            tensor = gs.Variable(f"{result.name}/pre{len(self._grids)}", shape=result.shape)
            tensor.dtype = result.dtype
            assert before is not None
            for index, output in enumerate(before.outputs):
                if output is result:
                    before.outputs[index] = tensor
        scale = gs.Constant(f"{integers.name}/scale", np.asarray(grid.scale))
        names = (f"{integers.name}/node", f"{result.name}/node")
        quantize = gs.Node("QuantizeLinear", names[0], {}, [tensor, scale], [integers])
        dequantize = gs.Node("DequantizeLinear", names[1], {}, [integers, scale], [result])
        for node in (quantize, dequantize):
            self._grids[id(node)] = grid
            self._main.add(id(node))
            self._inserted.add(id(node))
        self.model.graph.nodes += [quantize, dequantize]
        return dequantize
