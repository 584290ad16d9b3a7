"""Choose what becomes of each layer, so that a budget is met, and do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from onnxq.analysis import latency
from onnxq.analysis.cost import layer_costs, tensor_shapes
from onnxq.errors import OnnxqError, RecipeError, did_you_mean
from onnxq.low_rank import LowRank
from onnxq.model import Model
from onnxq.pass_manager import Changes, Context
from onnxq.passes.spatial_svd import SpatialSVD
from onnxq.passes.weight_svd import WeightSVD
from onnxq.placement import match_nodes
from onnxq.runtime import Session
from onnxq.second_order import takes_bias
from onnxq.selection import (
    Budget,
    Candidate,
    Choice,
    Search,
    Sensitivities,
    least_share,
    select,
)
from onnxq.sensitivity import measure
from onnxq.tradeoff import Tradeoff, tradeoff

__all__ = ["Compress"]

# The passes that are chosen from, in the order in which they run.
METHODS: dict[str, type[LowRank]] = {step.name: step for step in (SpatialSVD, WeightSVD)}
BUDGETS, SEARCHES = ("macs", "bytes", "latency"), get_args(Search)
# Shares of multiply-accumulates that lie no further apart are not told apart by time.
_NEAR = 0.02


@dataclass(frozen=True, kw_only=True)
class Compress:
    """Meet a budget of multiply-accumulates, bytes or time with the least error of the outputs.

    For each layer, and each rank that it may be split at, the relative error of its output follows
    from the second moment of its input, and of the gradients at its output; what such an error does
    to the outputs of the model is measured once for each layer.  Errors add up::

        least of  sum over layers of  effect[l] * error[l, c]    over one candidate c for each layer
        with      sum over layers of  cost[l, c]  <=  share * cost of the model

    which is a knapsack with several sizes of each thing.  What is chosen is done by the passes
    spatial-svd and weight-svd::

        x -> Conv 3 x 3, 64 to 64         x -> Conv 3 x 1, 64 to 40 -> Conv 1 x 3, 40 to 64
        x -> Gemm, 1024 to 1000           x -> Gemm, 1024 to 256 -> Gemm, 256 to 1000

    A budget of time is met by trial: models that differ in their multiply-accumulates are timed in
    turn with the model as it is.

    Refused: a budget that all candidates together do not meet, with the one that they do; layers
    as the passes refuse them, with the reason.

    Args:
        budget: What the model is to have less of: macs, bytes or latency.
        share: How much of it may be left, in (0, 1].
        methods: The passes to choose from.
        search: optimal (dynamic programming) or greedy (least error for what it saves).
        multiple: Ranks are multiples of this.
        least: Least rank.
        exclude: Globs on names or operator types of layers that are left whole.
        sensitivities: A JSON file in which costs, errors and effects are kept, and taken from the
            next time; empty for none.
        reconstruct: How weights are found, see spatial-svd: all, split or none.
        measured: Samples that the errors come from, spread evenly; 0 uses all.
        samples: Samples that weights are fitted to, spread evenly; 0 uses all.
        patches: Patches drawn per layer as weights are fitted, about.
        memory_mb: Megabytes that activations and statistics may take each.

    Source: knapsack: Kellerer et al. 2004; errors that add up: Zhang et al. 2016 (arXiv
    1505.06798).
    """

    name: ClassVar[str] = "compress"

    budget: Literal["macs", "bytes", "latency"] = "macs"
    share: float = 0.5
    methods: tuple[str, ...] = tuple(METHODS)
    search: Search = "optimal"
    multiple: int = 8
    least: int = 1
    exclude: tuple[str, ...] = ()
    sensitivities: str = ""
    reconstruct: Literal["all", "split", "none"] = "all"
    measured: int = 64
    samples: int = 0
    patches: int = 32768
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        Budget("macs", self.share)
        for name, known in (("budget", BUDGETS), ("search", SEARCHES)):
            if (given := getattr(self, name)) not in known:
                raise RecipeError(f"{name}: wanted one of {', '.join(known)}, got {given!r}")
        for method in self.methods:
            if method not in METHODS:
                hint = did_you_mean(method, METHODS, f"methods are {', '.join(METHODS)}")
                raise RecipeError(f"no method {method!r}", fix=hint)
        if not self.methods:
            raise RecipeError("methods: wanted at least one", fix=", ".join(METHODS))
        if self.measured < 0:
            raise RecipeError(f"measured: wanted 0 or more, got {self.measured}")
        self._steps({}, self.reconstruct)  # they know what their options take

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Measure, choose, and run the passes."""
        if model.encodings.tensors:
            raise RecipeError("compress is for float models", fix="put it before calibrate")
        changes = Changes()
        table = self._table(model, ctx)
        excluded = match_nodes(model, self.exclude)
        for name, why in table.refused.items():
            changes.skip(name, why)
        choices = [c for c in table.choices if excluded.isdisjoint(c.covers)]
        chosen = self._choose(model, table, choices, ctx)
        known = self._tradeoff(model, table, choices, chosen)
        for step in self._steps(chosen, self.reconstruct):
            changes.extend(step.apply(model, ctx))
            model.revision += 1
        ctx.report.facts["compression"] = self._facts(model, ctx, table, chosen, known)
        return changes

    def _table(self, model: Model, ctx: Context) -> Sensitivities:
        """The sensitivities: from the file if it is there, else measured, and kept in it."""
        path = Path(self.sensitivities) if self.sensitivities else None
        options = (
            f"methods {' '.join(sorted(self.methods))}, multiple {self.multiple}, least"
            f" {self.least}, measured {self.measured}, seed {ctx.seed}"
        )
        if path is not None and path.exists():
            return Sensitivities.load(path, model.digest(), options)
        found = measure(
            model,
            ctx,
            [METHODS[name].split(self.multiple, self.least) for name in self.methods],
            options=options,
            rng=ctx.rng(self),
            samples=self.measured,
        )
        if path is not None:
            found.save(path)
        return found

    def _choose(
        self, model: Model, table: Sensitivities, choices: list[Choice], ctx: Context
    ) -> dict[str, Candidate]:
        if not any(choice.candidates for choice in choices):
            why = "all layers that could be are excluded"
            if not any(choice.candidates for choice in table.choices):
                none = "it has no layers with constant weights"
                why = next(iter(table.refused.values()), none)
            raise OnnxqError("nothing in the model can be compressed", where=model.path, fix=why)
        if self.budget == "latency":
            return self._in_time(model, table, choices, ctx)
        budget = Budget(self.budget, self.share)
        if self.budget == "macs":
            return select(choices, table.macs, budget, self.search)
        return select(choices, table.bytes, budget, self.search, reserve=_new_biases(model))

    def _in_time(
        self, model: Model, table: Sensitivities, choices: list[Choice], ctx: Context
    ) -> dict[str, Candidate]:
        """The most multiply-accumulates at which the model takes no longer than it may."""
        plain = Session(model.to_proto(), threads=ctx.threads)
        feed = next(iter(ctx.spread(plain, 1)))
        low, high = least_share(choices, table.macs, "macs"), 1.0
        with ctx.progress.task("time", None):
            found = select(choices, table.macs, Budget("macs", low), self.search)
            fastest = self._timed(model, found, plain, feed, ctx)
            if fastest > self.share:
                raise OnnxqError(
                    f"latency: a share of {self.share:g} cannot be met",
                    fix=f"{fastest:.2f} can, as measured here",
                )
            while high - low > _NEAR:
                middle = (low + high) / 2
                chosen = select(choices, table.macs, Budget("macs", middle), self.search)
                if self._timed(model, chosen, plain, feed, ctx) <= self.share:
                    low, found = middle, chosen
                else:
                    high = middle
        return found

    def _timed(
        self,
        model: Model,
        chosen: Mapping[str, Candidate],
        plain: Session,
        feed: Mapping[str, Any],
        ctx: Context,
    ) -> float:
        """Time of the model with that shape, over its time as it is."""
        trial = model.clone()
        for step in self._steps(chosen, "none"):
            step.apply(trial, Context())
        pair = [plain, Session(trial.to_proto(), threads=ctx.threads)]
        before, after = latency.runs(pair, feed, seconds=1.0, least=20)
        return float(np.median(after) / np.median(before))

    def _steps(
        self, chosen: Mapping[str, Candidate], reconstruct: Literal["all", "split", "none"]
    ) -> list[LowRank]:
        """The passes that make what was chosen; all of them if nothing was."""
        steps = []
        for name in self.methods:
            ratios = tuple((c.layer, c.ratio) for c in chosen.values() if c.method == name)
            if ratios or not chosen:
                steps.append(
                    METHODS[name](
                        ratio=1.0,
                        ratios=ratios,
                        multiple=self.multiple,
                        least=self.least,
                        reconstruct=reconstruct,
                        samples=self.samples,
                        patches=self.patches,
                        memory_mb=self.memory_mb,
                    )
                )
        return steps

    def _tradeoff(
        self,
        model: Model,
        table: Sensitivities,
        choices: list[Choice],
        chosen: Mapping[str, Candidate],
    ) -> Tradeoff:
        """What other budgets would have cost."""
        if self.budget == "bytes":
            reserve = _new_biases(model)
            return tradeoff(choices, table.bytes, "bytes", chosen, self.search, reserve=reserve)
        return tradeoff(choices, table.macs, "macs", chosen, self.search)

    def _facts(
        self,
        model: Model,
        ctx: Context,
        table: Sensitivities,
        chosen: Mapping[str, Candidate],
        known: Tradeoff,
    ) -> dict[str, Any]:
        """What came of it, as plain JSON types."""
        shapes = tensor_shapes(model, next(iter(ctx.samples(model))))
        macs = sum(c.macs or 0 for c in layer_costs(model, shapes))
        whole = {choice.name: choice for choice in table.choices}
        return {
            "budget": {"of": self.budget, "share": self.share},
            "macs": {"before": table.macs, "after": macs},
            "bytes": {"before": table.bytes, "after": model.nbytes},
            "layers": [
                {
                    "name": name,
                    "method": c.method,
                    "ratio": c.ratio,
                    "rank_or_channels": c.rank_or_channels,
                    "error": c.error,
                    "effect": whole[name].effect,
                    "macs": {"before": whole[name].macs, "after": c.macs},
                    "bytes": {"before": whole[name].bytes, "after": c.bytes},
                }
                for name, c in chosen.items()
            ],
            "tradeoff": known.to_dict(),
            "refused": dict(table.refused),
        }


def _new_biases(model: Model) -> int:
    """Bytes of the biases that layers get which have none."""
    return sum(
        layer.output_channels * layer.weight.itemsize
        for layer in model.layers()
        if takes_bias(layer) and layer.bias is None
    )
