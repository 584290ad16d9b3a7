"""Rounding relaxed to a rectified sigmoid that gradients decide: the solver of AdaRound's paper.

Each weight is low + h (high - low), h = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), and V
follows the gradient of the output's error plus lambda * sum(1 - |2 h - 1|^beta), which drives every
h to 0 or 1 while beta falls.  On the second moment H of the layer's input the error's gradient is
2 (high - low) (d H + g0), whatever the amount of data.

Source: Nagel et al. 2020 (arXiv 2004.10568).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from onnxq.kernels._jit import kernel, read_only
from onnxq.kernels.tabu import choices, tabu_search

__all__ = ["Relaxation", "relax", "relax_activated"]


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """How the relaxation is solved; the defaults are the paper's, but for the rate.

    Args:
        iterations: Steps of Adam.
        rate: Of Adam, 1e-2; the paper leaves it open.
        zeta: The sigmoid is stretched to this, above 1,
        gamma: and this, below 0, so that it reaches 0 and 1.
        weight: lambda, of the term that decides, where outputs have unit power on average.
        beta: The exponent of that term, first and last; falls as a cosine.
        warm: Share of the iterations without that term.
    """

    iterations: int = 10_000
    rate: float = 1e-2
    zeta: float = 1.1
    gamma: float = -0.1
    weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warm: float = 0.2


def relax(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None = None,
    *,
    options: Relaxation = Relaxation(),
    descend: bool = True,
    threads: int = 1,
) -> np.ndarray:
    """Round each weight down or up so that the layer's output changes least.

    Args:
        weight: float32 [O, K], or [G, O/G, K] for G groups with an H each.
        scale: float32 [O].
        zero: Zero points, int32 [O].
        qmin: Least integer.
        qmax: Greatest integer.
        gram: H, the second moment of the layer's input, [K, K] or [G, K, K].
        linear: g0, shaped as the weight; None for 0.
        options: Of the solver.
        descend: Whether to end with single moves and pairs that improve, and to keep nearest
            rounding where it is better.
        threads: Threads that share the rows, beside those of BLAS.

    Returns:
        Values s (q - z), float32, shaped as the weight.
    """
    wide = weight.astype(np.float64)
    power = float(np.mean(np.einsum("...k,...k->...", np.matmul(wide, gram), wide)))
    h = np.asarray(gram / max(power, 1e-300), np.float32)
    g0 = None if linear is None else np.asarray(linear / max(power, 1e-300), np.float32)

    def pull(error: np.ndarray, _: int) -> np.ndarray:
        product: np.ndarray = np.matmul(error, h)
        if g0 is not None:
            product += g0
        return product

    found = _solve(weight, scale, zero, qmin, qmax, pull, options, threads)
    if not descend:
        return found
    return tabu_search(
        weight, scale, zero, qmin, qmax, gram, linear, found, sweeps=0, threads=threads
    )


def relax_activated(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    patches: np.ndarray,
    quantized: np.ndarray,
    bias: np.ndarray,
    *,
    low: float = 0.0,
    high: float = np.inf,
    batch: int = 128,
    seed: int = 0,
    options: Relaxation = Relaxation(),
    threads: int = 1,
) -> np.ndarray:
    """The same with the error taken behind the activation function, clip(y, low, high).

    What that hides costs nothing, but it takes samples instead of their second moment.  Rows that
    nearest rounding serves better keep it.

    Args:
        weight: float32 [O, K].
        scale: float32 [O].
        zero: Zero points, int32 [O].
        qmin: Least integer.
        qmax: Greatest integer.
        patches: x, the float model's inputs, float32 [N, K].
        quantized: x of the model whose layers before are quantized, [N, K].
        bias: float32 [O].
        low: Lower bound of the activation function.
        high: Upper bound.
        batch: Patches that each step draws.
        seed: Of the draws.
        options: Of the solver.
        threads: Threads that share the rows, beside those of BLAS.

    Returns:
        Values s (q - z), float32 [O, K].
    """
    wanted: np.ndarray = np.clip(patches @ weight.T + bias, low, high)
    power = max(float(np.mean(np.square(wanted))), 1e-30)
    rng = np.random.default_rng(seed)

    def pull(error: np.ndarray, _: int) -> np.ndarray:
        drawn = rng.integers(0, len(patches), batch)
        x = quantized[drawn]
        y = x @ (weight + error).T + bias
        miss = np.clip(y, low, high) - wanted[drawn]
        miss *= (y > low) & (y < high)
        half: np.ndarray = miss.T @ x / (batch * power)
        return half.astype(np.float32)

    def cost(values: np.ndarray) -> np.ndarray:
        miss = np.clip(quantized @ values.T + bias, low, high) - wanted
        return np.asarray(np.square(miss, dtype=np.float64).sum(axis=0))

    found = _solve(weight, scale, zero, qmin, qmax, pull, options, threads)
    nearest = choices(weight, scale, zero, qmin, qmax).nearest
    return np.where((cost(found) < cost(nearest))[:, None], found, nearest)


def _solve(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    pull: Callable[[np.ndarray, int], np.ndarray],
    options: Relaxation,
    threads: int,
) -> np.ndarray:
    """Follow the gradient; `pull` gives half of it by the error d, for each iteration."""
    grid = choices(weight, scale, zero, qmin, qmax)
    shape = (-1, weight.shape[-1])
    span = np.ascontiguousarray((grid.high - grid.low).reshape(shape))
    base = np.ascontiguousarray((grid.low - weight).reshape(shape))
    share = np.clip(np.divide(-base, span, out=np.zeros_like(base), where=span > 0), 0, 1)
    stretch = options.zeta - options.gamma
    v = -np.log(stretch / (share - options.gamma) - 1).astype(np.float32)
    first, second, error = np.zeros_like(v), np.zeros_like(v), base + share * span
    pieces = [slice(a[0], a[-1] + 1) for a in np.array_split(np.arange(len(v)), threads) if a.size]
    with ThreadPoolExecutor(threads) as pool:
        for i in range(options.iterations):
            half = pull(error.reshape(weight.shape), i).reshape(shape)
            rates = np.array(_rates(options, i), np.float32)

            def step(rows: slice, half: np.ndarray = half, rates: np.ndarray = rates) -> None:
                _step(
                    read_only(base[rows]),
                    read_only(span[rows]),
                    read_only(half[rows]),
                    v[rows],
                    first[rows],
                    second[rows],
                    error[rows],
                    read_only(rates),
                )

            if len(pieces) == 1:
                step(pieces[0])
            else:
                list(pool.map(step, pieces))
    up = v.reshape(weight.shape) >= 0
    return np.where(up, grid.high, grid.low)


def _rates(options: Relaxation, i: int) -> tuple[float, ...]:
    """What changes with the iterations: beta, lambda, the rate and Adam's corrections."""
    warm = options.warm * options.iterations
    passed = (i - warm) / max(options.iterations - warm, 1)
    first, last = options.beta
    beta = last + 0.5 * (first - last) * (1 + np.cos(np.pi * max(passed, 0)))
    return (
        options.gamma,
        options.zeta,
        options.weight if i >= warm else 0.0,
        beta,
        options.rate / (1 - 0.9 ** (i + 1)),
        1 / (1 - 0.999 ** (i + 1)),
    )


@kernel
def _step(
    base: np.ndarray,
    span: np.ndarray,
    half: np.ndarray,
    v: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    error: np.ndarray,
    rates: np.ndarray,
) -> None:
    """One step of Adam (0.9, 0.999), and the error behind it."""
    gamma, zeta, weight, beta, rate, correction = rates
    one, two = np.float32(1), np.float32(2)
    stretch = zeta - gamma
    for o in range(v.shape[0]):
        for k in range(v.shape[1]):
            sigmoid = one / (one + np.exp(-v[o, k]))
            h = sigmoid * stretch + gamma
            slope = sigmoid * (one - sigmoid) * stretch
            if h <= 0 or h >= 1:
                slope = np.float32(0)
            gradient = two * span[o, k] * half[o, k]
            if weight > 0 and slope > 0:
                far = two * h - one
                power = np.exp((beta - one) * np.log(np.abs(far) + np.float32(1e-30)))
                gradient -= weight * two * beta * power * np.sign(far)
            gradient *= slope
            first[o, k] += np.float32(0.1) * (gradient - first[o, k])
            second[o, k] += np.float32(0.001) * (gradient * gradient - second[o, k])
            v[o, k] -= rate * first[o, k] / (np.sqrt(second[o, k] * correction) + np.float32(1e-8))
            h = stretch / (one + np.exp(-v[o, k])) + gamma
            error[o, k] = base[o, k] + min(max(h, np.float32(0)), one) * span[o, k]
