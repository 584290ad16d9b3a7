"""Train the example: a small convolutional network for scikit-learn's digits, in plain numpy.

    python examples/digits/train.py

Writes `digits.onnx`, `calib/` and `test.npz` beside this file: what `make demo` and the README run.
They are committed, so nobody needs to run this. The same seed on one machine gives the same bytes.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

HERE = Path(__file__).parent
SEED, EPOCHS, BATCH, RATE, DECAY = 0, 30, 64, 4e-3, 2e-2
rng = np.random.default_rng(SEED)


class Graph:
    """The nodes and initializers of the ONNX file, as the layers add them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, name: str, *inputs: str, params=None, output="", **attributes) -> str:
        """Append a node with its parameters; return the name of its output."""
        for suffix, array in (params or {}).items():
            self.initializers.append(numpy_helper.from_array(array, f"{name}.{suffix}"))
            inputs += (f"{name}.{suffix}",)
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output


class Layer:
    """`forward` keeps in `kept` what `backward` needs; `grads` are the gradients of `params`."""

    params: dict[str, np.ndarray]

    def __init__(self) -> None:
        self.params = {}

    def leaves(self) -> list[Layer]:
        """The layers that hold parameters themselves."""
        return [self]


class Conv(Layer):
    """K x K convolution, stride 1, output as large as the input; no bias, BatchNorm has one."""

    product = "nchwij,ocij->nohw"  # windows, weights -> output
    to_input = "nohwij,ocij->nchw"  # windows of the output's gradient, flipped weights -> input's
    to_weight = "nchwij,nohw->ocij"
    group = 1

    def __init__(self, *shape: int) -> None:
        self.k = shape[-1]
        self.params = {"weight": he(*shape, self.k)}

    def windows(self, x: np.ndarray) -> np.ndarray:
        return sliding_window_view(pad(x, self.k // 2), (self.k, self.k), axis=(2, 3))

    def forward(self, x: np.ndarray, train: bool) -> np.ndarray:
        self.kept = self.windows(x)
        return np.einsum(self.product, self.kept, self.params["weight"], optimize=True)

    def backward(self, d: np.ndarray) -> np.ndarray:
        self.grads = {"weight": np.einsum(self.to_weight, self.kept, d, optimize=True)}
        flipped = self.params["weight"][..., ::-1, ::-1]
        return np.einsum(self.to_input, self.windows(d), flipped, optimize=True)

    def export(self, graph: Graph, name: str, x: str) -> str:
        kernel, pads = [self.k] * 2, [self.k // 2] * 4
        weight = self.params["weight"]
        params = {"weight": weight.reshape(len(weight), -1, *kernel)}
        fixed = {"kernel_shape": kernel, "pads": pads, "strides": [1, 1], "group": self.group}
        return graph.add("Conv", f"{name}/conv", x, params=params, **fixed)


class DepthwiseConv(Conv):
    """One K x K filter per channel."""

    product = to_input = "nchwij,cij->nchw"
    to_weight = "nchwij,nchw->cij"

    def __init__(self, channels: int, k: int) -> None:
        super().__init__(channels, k)
        self.group = channels


class BatchNorm(Layer):
    """Normalize channels: by the batch while training, by running statistics afterwards."""

    epsilon, momentum = np.float32(1e-5), 0.95

    def __init__(self, channels: int) -> None:
        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        self.params = {"scale": ones, "bias": zeros}
        self.mean, self.var = zeros.copy(), ones.copy()

    def forward(self, x: np.ndarray, train: bool) -> np.ndarray:
        mean, var = self.mean, self.var
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.mean += (1 - self.momentum) * (mean - self.mean)
            self.var += (1 - self.momentum) * (var - self.var)
        inv = 1 / np.sqrt(var + self.epsilon)
        normal = (x - channels(mean)) * channels(inv)
        self.kept = normal, inv
        return channels(self.params["scale"]) * normal + channels(self.params["bias"])

    def backward(self, d: np.ndarray) -> np.ndarray:
        normal, inv = self.kept
        self.grads = {"scale": (d * normal).sum((0, 2, 3)), "bias": d.sum((0, 2, 3))}
        # what the batch's own mean and variance take back, averaged over the batch
        back = channels(self.grads["bias"]) + normal * channels(self.grads["scale"])
        return channels(self.params["scale"] * inv) * (d - back * inv.size / np.float32(d.size))

    def export(self, graph: Graph, name: str, x: str) -> str:
        params = {**self.params, "mean": self.mean, "var": self.var}
        epsilon = float(self.epsilon)
        return graph.add("BatchNormalization", f"{name}/bn", x, params=params, epsilon=epsilon)


class Relu(Layer):
    def forward(self, x: np.ndarray, train: bool) -> np.ndarray:
        self.kept = x > 0
        return x * self.kept

    def backward(self, d: np.ndarray) -> np.ndarray:
        return d * self.kept

    def export(self, graph: Graph, name: str, x: str) -> str:
        return graph.add("Relu", f"{name}/relu", x)


class MaxPool(Layer):
    """The largest of every 2 x 2 block."""

    def forward(self, x: np.ndarray, train: bool) -> np.ndarray:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // 2, 2, w // 2, 2)
        largest = blocks.max((3, 5), keepdims=True)
        self.kept = blocks == largest
        return largest[:, :, :, 0, :, 0]

    def backward(self, d: np.ndarray) -> np.ndarray:
        n, c, h, w = d.shape
        share = self.kept / self.kept.sum((3, 5), keepdims=True, dtype=np.float32)
        return (share * d[:, :, :, None, :, None]).reshape(n, c, 2 * h, 2 * w)

    def export(self, graph: Graph, name: str, x: str) -> str:
        return graph.add("MaxPool", f"{name}/pool", x, kernel_shape=[2, 2], strides=[2, 2])


class Classifier(Layer):
    """GlobalAveragePool, Flatten and a fully connected layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        self.params = {"weight": he(classes, inputs), "bias": np.zeros(classes, np.float32)}

    def forward(self, x: np.ndarray, train: bool) -> np.ndarray:
        self.kept = x.shape, x.mean((2, 3))
        return self.kept[1] @ self.params["weight"].T + self.params["bias"]

    def backward(self, d: np.ndarray) -> np.ndarray:
        (n, c, h, w), pooled = self.kept
        self.grads = {"weight": d.T @ pooled, "bias": d.sum(0)}
        return np.broadcast_to(
            (d @ self.params["weight"])[:, :, None, None] / (h * w), (n, c, h, w)
        )

    def export(self, graph: Graph, name: str, x: str) -> str:
        x = graph.add("GlobalAveragePool", f"{name}/pool", x)
        x = graph.add("Flatten", f"{name}/flatten", x, axis=1)
        gemm = {"params": self.params, "output": "logits", "transB": 1}
        return graph.add("Gemm", f"{name}/gemm", x, **gemm)


class Sequential(Layer):
    """Blocks of layers, one after the other; their names become the nodes' names."""

    def __init__(self, **blocks: list[Layer]) -> None:
        self.blocks = blocks
        self.layers = [layer for block in blocks.values() for layer in block]

    def forward(self, x: np.ndarray, train: bool) -> np.ndarray:
        for layer in self.layers:
            x = layer.forward(x, train)
        return x

    def backward(self, d: np.ndarray) -> np.ndarray:
        for layer in reversed(self.layers):
            d = layer.backward(d)
        return d

    def leaves(self) -> list[Layer]:
        return [leaf for layer in self.layers for leaf in layer.leaves()]

    def export(self, graph: Graph, name: str, x: str) -> str:
        for block, layers in self.blocks.items():
            for layer in layers:
                x = layer.export(graph, f"{name}/{block}".lstrip("/"), x)
        return x


class Residual(Sequential):
    """The blocks' output plus their input."""

    def forward(self, x: np.ndarray, train: bool) -> np.ndarray:
        return x + super().forward(x, train)

    def backward(self, d: np.ndarray) -> np.ndarray:
        return d + super().backward(d)

    def export(self, graph: Graph, name: str, x: str) -> str:
        return graph.add("Add", f"{name}/add", super().export(graph, name, x), x)


def he(*shape: int) -> np.ndarray:
    """He's initial weights: variance 2 / fan-in."""
    return rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)


def pad(x: np.ndarray, p: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))


def channels(v: np.ndarray) -> np.ndarray:
    """Per-channel values, ready to broadcast over [N, C, H, W]."""
    return v[:, None, None]


def network() -> Sequential:
    return Sequential(
        stem=[Conv(16, 1, 3), BatchNorm(16), Relu()],
        depthwise=[DepthwiseConv(16, 3), BatchNorm(16), Relu()],
        pointwise=[Conv(32, 16, 1), BatchNorm(32), Relu(), MaxPool()],
        residual=[
            Residual(
                first=[Conv(32, 32, 3), BatchNorm(32), Relu()],
                second=[Conv(32, 32, 3), BatchNorm(32)],
            ),
            Relu(),
        ],
        head=[Classifier(32, 10)],
    )


def shifted(x: np.ndarray) -> np.ndarray:
    """Every picture moved by at most one pixel in each direction."""
    windows = sliding_window_view(pad(x, 1), x.shape[2:], axis=(2, 3))
    down, right = rng.choice(3, (2, len(x)), p=[0.15, 0.7, 0.15])
    return windows[np.arange(len(x)), :, down, right]


def train(net: Sequential, x: np.ndarray, labels: np.ndarray) -> None:
    """Cross-entropy, AdamW with a cosine rate."""
    leaves = net.leaves()
    moments = [
        {n: np.zeros((2, *p.shape), np.float32) for n, p in e.params.items()} for e in leaves
    ]
    per_epoch = len(x) // BATCH
    steps = EPOCHS * per_epoch
    for step in range(steps):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order = rng.permutation(len(x))
        pick = order[batch * BATCH :][:BATCH]
        logits = net.forward(shifted(x[pick]), train=True)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        net.backward((odds - np.eye(10, dtype=np.float32)[labels[pick]]) / BATCH)

        rate = RATE * (1 + np.cos(np.pi * step / steps)) / 2
        unbias = np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        for leaf, moment in zip(leaves, moments, strict=True):
            for name, p in leaf.params.items():
                mean, square = moment[name]
                mean += 0.1 * (leaf.grads[name] - mean)
                square += 0.001 * (leaf.grads[name] ** 2 - square)
                decay = DECAY * p if name == "weight" else 0
                p -= rate * (unbias * mean / (np.sqrt(square) + 1e-8) + decay)
        if batch == 0 and epoch % 5 == 0:
            loss = -np.log(odds[np.arange(BATCH), labels[pick]]).mean()
            print(f"epoch {epoch:2} of {EPOCHS}, loss {loss:.3f}")


def check_statistics(net: Sequential, x: np.ndarray) -> None:
    """The running statistics must be those of the training set: the file holds nothing else."""
    norms = [leaf for leaf in net.leaves() if isinstance(leaf, BatchNorm)]
    running = [(norm.mean.copy(), norm.var.copy()) for norm in norms]
    for norm in norms:
        norm.momentum = 0  # one pass over everything then leaves the exact statistics
    net.forward(x, train=True)
    for norm, (mean, var) in zip(norms, running, strict=True):
        assert np.all(abs(mean - norm.mean) < 0.2 * np.sqrt(norm.var)), "running mean"
        assert np.all(abs(var / norm.var - 1) < 0.25), "running variance"
        norm.mean, norm.var = mean, var


def save(net: Sequential, path: Path) -> None:
    graph = Graph()
    output = net.export(graph, "", "input")
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "digits",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 8, 8])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", 10])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="examples/digits/train.py",
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def main() -> None:
    start = time.perf_counter()
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x, x_test, labels, labels_test = train_test_split(
        x, labels, test_size=500, stratify=labels, random_state=SEED
    )
    net = network()
    train(net, x, labels)
    check_statistics(net, x)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    logits = net.forward(x_test, train=False)
    print(f"test accuracy {100 * (logits.argmax(1) == labels_test).mean():.1f} %")
    save(net, HERE / "digits.onnx")
    session = onnxruntime.InferenceSession(HERE / "digits.onnx")
    np.testing.assert_allclose(session.run(None, {"input": x_test})[0], logits, atol=1e-4)

    np.savez_compressed(HERE / "test.npz", input=x_test, labels=labels_test.astype(np.uint8))
    shutil.rmtree(HERE / "calib", ignore_errors=True)
    (HERE / "calib").mkdir()
    # ten of each digit, taking turns, so that the first few files are as mixed as all of them
    picks = np.stack([np.flatnonzero(labels == digit)[:10] for digit in range(10)], axis=1)
    for i, sample in enumerate(x[picks.ravel()]):
        np.savez_compressed(HERE / "calib" / f"{i:03}.npz", input=sample[None])


if __name__ == "__main__":
    with threadpool_limits(1):  # sums in another order would change the last bits
        main()
