"""Round weights so that what the quantized layer puts out stays near what the float layer did."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxq.checkpoint import Checkpoint, fingerprint
from onnxq.errors import RecipeError
from onnxq.kernels.relaxation import Relaxation, relax, relax_activated
from onnxq.kernels.tabu import tabu_search, usual_sweeps
from onnxq.layer_inputs import LayerInputs, statistics_bytes, why_nearest
from onnxq.model import Layer, Model
from onnxq.pass_manager import Changes, Context, options
from onnxq.placement import Ends, activation_bounds
from onnxq.quadratic import Quadratic, settle
from onnxq.runtime import cores
from onnxq.targets import Kernel
from onnxq.version import __version__

__all__ = ["AdaRound"]

# The search takes no less than this, and no more than so many times what was asked for.
LEAST_EFFORT, MOST_EFFORT = 0.01, 8
_MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AdaRound:
    r"""Round each weight up or down, whichever serves the layer's output, and correct the biases.

    To nearest is best for the weight, not for what the layer puts out. With d the rounding error of
    a row w of the weight, the error of its output is a quadratic in d::

        E|(w + d) x' - w x|^2  =  d H d^T + 2 d g + what no rounding changes

        H = E[x' x'^T]    g = w (H - C)    C = E[x x'^T]    x: input in the float model
                                                            x': in the model quantized so far

    H and C are collected once per layer, so samples cost little and the search is arithmetic on one
    matrix. Layers are done in graph order, each against the inputs that the ones before it, now
    quantized, really give. Before and after::

        W: float                      W: values on the grid of its encoding, scales chosen anew
        b                             b + W m - Q m'     m, m': mean of x, of x'

    Solver "tabu" walks over the roundings: always the best move, uphill too, that does not touch a
    weight moved lately; the rests of moved weights shorten, round by round. "relaxation" is the
    paper's: each weight gets a continuous variable between down and up, which a regularizer drives
    to one of the two; fifty times slower, and there for reference. Neither leaves a row worse than
    rounded to nearest.

    Few samples show drifts H - C that others do not. How much of g is believed is found by what the
    g of half of the samples does on the other half; H is drawn towards its diagonal by how far
    the halves differ.

    Refused: layers without an encoding (they stay float), weights that two layers share, MatMul
    with its weight on the left; these are rounded to nearest, as is a layer that no sample
    reached, and what is left when the time of the run is up.

    Args:
        solver: tabu or relaxation.
        sequential: Whether layers are done one after the other, against quantized inputs; otherwise
            all are from the float model's inputs, in fewer runs.
        scales: output-error (the best of 12 from 0.4 of the given scale up, by the same error, and
            of short searches around it) or given.
        samples: Use at most so many calibration samples, spread evenly; 0 uses all.
        patches: Patches drawn per layer, about; fewer where they are short.
        effort: Moves of the tabu search, as a multiple of a number that takes about 2 us per weight
            on one core.
        iterations: Steps of the relaxation.
        activation: Whether the relaxation takes the error behind the Relu or Clip that follows a
            layer without groups, from `patches` samples in place of H.
        memory_mb: Megabytes that activations and statistics may take each; where more would be
            needed, fewer samples are used.

    Source: Nagel et al. 2020 (arXiv 2004.10568); tabu search: Glover 1989.
    """

    name: ClassVar[str] = "adaround"

    solver: Literal["tabu", "relaxation"] = "tabu"
    sequential: bool = True
    scales: Literal["output-error", "given"] = "output-error"
    samples: int = 0
    patches: int = 16384
    effort: float = 1.0
    iterations: int = 10_000
    activation: bool = False
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        for name in ("patches", "iterations", "memory_mb"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if not self.effort > 0:
            raise RecipeError(f"effort: wanted more than 0, got {self.effort}")
        if self.activation and not (self.solver == "relaxation" and self.sequential):
            raise RecipeError("activation: wanted solver relaxation, and sequential")
        if self.samples < 0:
            raise RecipeError(f"samples: wanted 0 or more, got {self.samples}")

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Rewrite weights, scales and biases."""
        changes = Changes()
        layers = [layer for layer in model.layers() if self._wanted(layer, changes)]
        if not layers:
            return changes
        seed = int(ctx.rng(self).integers(2**31))
        inputs = LayerInputs(
            model,
            layers,
            ctx,
            rng=lambda index: np.random.default_rng([seed, index]),
            sequential=self.sequential,
            samples=self.samples,
            patches=self.patches,
            memory_mb=self.memory_mb,
        )
        for note in inputs.notes:
            changes.add(note)
        checkpoint = None
        if ctx.resume is not None:
            key = fingerprint(model, __version__, options(self), ctx.seed, inputs.digest())
            checkpoint = Checkpoint(ctx.resume, key)
        clock = _Clock(layers, ctx.deadline, self.effort)
        kept = done = 0
        size = sum(layer.weight.size for layer in layers)
        try:
            with ctx.progress.task("round weights (thousands)", -(-size // 1000)) as advance:
                for index, layer in enumerate(layers):
                    if checkpoint is not None and checkpoint.restore(layer, index):
                        kept += 1
                        inputs.reach(layer)
                    elif clock.is_up:
                        changes.skip(layer.name, "the time was up; rounded to nearest")
                    elif reason := self._do(layer, index, inputs, clock, [seed, index], ctx):
                        changes.skip(layer.name, f"{reason}; rounded to nearest")
                    else:
                        if checkpoint is not None:
                            checkpoint.keep(layer, index)
                        done += 1
                    inputs.settle(layer)
                    advance(-(-layer.weight.size // 1000))
        except KeyboardInterrupt:
            if checkpoint is not None:
                ctx.progress.say(
                    f"{kept + done} of {len(layers)} layers are kept in {ctx.resume};"
                    " the same command goes on from there"
                )
            raise
        if kept:
            changes.add(f"{kept} weights taken up from an earlier run")
        if done:
            changes.add(f"{done} weights rounded by {self.solver}")
        return changes

    def _wanted(self, layer: Layer, changes: Changes) -> bool:
        if layer.weight_encoding is None:
            return False
        if why := why_nearest(layer):
            changes.skip(layer.name, why)
            return False
        if statistics_bytes(layer) > self.memory_mb * _MB:
            megabytes = statistics_bytes(layer) // _MB
            changes.skip(layer.name, f"its statistics take {megabytes} MB; rounded to nearest")
            return False
        if self.sequential and statistics_bytes(layer, halves=True) > self.memory_mb * _MB:
            changes.skip(layer.name, "its statistics do not fit twice: no drift is believed")
        return True

    def _do(
        self,
        layer: Layer,
        index: int,
        inputs: LayerInputs,
        clock: _Clock,
        seed: Sequence[int],
        ctx: Context,
    ) -> str | None:
        """Round one layer; the reason why not, if there is one."""
        statistics = inputs.measure(layer)
        if statistics is None:
            return "no sample reached it"
        problem = Quadratic.of(layer, statistics)
        start = int(np.random.default_rng(seed).integers(2**31))
        threads = min(ctx.threads, cores()) or cores()
        if self.scales == "output-error":
            problem = problem.with_scale(problem.best_scale(start, threads))
        bounds = _bounds(layer) if self.activation else None
        with clock.searching(index) as effort:
            if bounds is None:
                rounded = self._search(problem, effort, start, threads)
            else:
                drawn = inputs.draw(layer)
                rounded = self._search_behind(problem, layer, drawn, bounds, start, threads)
        if bounds is not None:  # the bias was a part of what was searched with
            settle(layer, rounded, None, problem.scale)
            return None
        if self.scales == "output-error":
            problem, rounded = problem.refitted(rounded)
        settle(layer, rounded, statistics, problem.scale)
        return None

    def _search(self, problem: Quadratic, effort: float, seed: int, threads: int) -> np.ndarray:
        """The best rounding that the solver finds, [G, R, K]."""
        given = (problem.rows, problem.scale, problem.zero, problem.qmin, problem.qmax)
        if self.solver == "relaxation":
            options = Relaxation(iterations=self.iterations)
            return relax(*given, problem.gram, problem.linear, options=options, threads=threads)
        sweeps = effort * usual_sweeps(problem.rows.shape[-1])
        return tabu_search(
            *given, problem.gram, problem.linear, sweeps=sweeps, seed=seed, threads=threads
        )

    def _search_behind(
        self,
        problem: Quadratic,
        layer: Layer,
        drawn: tuple[np.ndarray, np.ndarray],
        bounds: tuple[float, float],
        seed: int,
        threads: int,
    ) -> np.ndarray:
        """The same with the error taken behind the activation function, [1, R, K]."""
        bias = np.zeros(problem.scale.shape) if layer.bias is None else layer.bias.reshape(-1)
        found = relax_activated(
            problem.rows[0],
            problem.scale,
            problem.zero,
            problem.qmin,
            problem.qmax,
            patches=drawn[1],
            quantized=drawn[0],
            bias=bias.astype(np.float32),
            low=bounds[0],
            high=bounds[1],
            seed=seed,
            options=Relaxation(iterations=self.iterations),
            threads=threads,
        )
        return found[None]


def _bounds(layer: Layer) -> tuple[float, float] | None:
    """Of the Relu or Clip behind a layer without groups; None where there is none."""
    if layer.group != 1:
        return None
    ends = Ends(layer.model, layer.model.encodings.float_nodes)
    node = ends.absorbed(layer.y, Kernel("layer"))
    return None if node is None else activation_bounds(layer.model, node)


class _Clock:
    """Shares the time that is left among the layers that are left.

    Args:
        layers: All that are to be done.
        deadline: When the time is up, by `time.monotonic`; None: never.
        effort: Of the search where time does not matter.
    """

    def __init__(self, layers: Sequence[Layer], deadline: float | None, effort: float) -> None:
        self._sizes = [layer.weight.size for layer in layers]
        self._deadline = deadline
        self._effort = effort
        self._searched = self._spent = 0.0  # weights times effort, and seconds, so far
        self._begun = time.monotonic()
        self._done = 0

    @property
    def is_up(self) -> bool:
        """Whether no time is left."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    @contextmanager
    def searching(self, index: int) -> Iterator[float]:
        """Give the effort that one layer may take, and learn from how long that does."""
        effort = self._affordable(index)
        start = time.monotonic()
        yield effort
        self._spent += max(time.monotonic() - start, 1e-6)
        self._searched += effort * self._sizes[index]
        self._done += 1

    def _affordable(self, index: int) -> float:
        if self._deadline is None or not self._done:
            return self._effort
        now = time.monotonic()
        aside = (now - self._begun - self._spent) / self._done  # per layer, for its statistics
        left = self._deadline - now - aside * (len(self._sizes) - index - 1)
        share = left * self._searched / (self._spent * sum(self._sizes[index:]))
        return float(np.clip(share, LEAST_EFFORT, MOST_EFFORT * self._effort))
