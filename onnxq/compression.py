"""Compression to a budget: fewer multiply-accumulates, bytes or milliseconds, in float or int8."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from onnxq import api, recipe
from onnxq.errors import RecipeError, did_you_mean
from onnxq.model import Model
from onnxq.pass_manager import Pass
from onnxq.passes.channel_pruning import ChannelPruning
from onnxq.passes.compress import METHODS, Compress
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.selection import Search

__all__ = ["compress"]


def compress(
    source: str | os.PathLike[str] | Model,
    destination: str | os.PathLike[str] | None = None,
    calib: Any = None,
    *,
    macs: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    method: str = "auto",
    search: Search = "optimal",
    multiple: int = 8,
    least: int = 1,
    exclude: Sequence[str] = (),
    sensitivities: str | os.PathLike[str] | None = None,
    then_quantize: bool = False,
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    report: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Make a model smaller, with the least error of its outputs for what is saved.

    Args:
        source: The float model; never changed.
        destination: Where the new model is written, whole or not at all; None: nowhere.
        calib: Calibration samples in any form that `Calibration` takes.
        macs: Share of the multiply-accumulates that may be left, in (0, 1].
        bytes: In its place the share of the bytes of the float weights.
        latency: In its place the share of the time that onnxruntime takes here, measured.
        method: spatial-svd, weight-svd, or auto for the best of these layer by layer; or
            channel-pruning.
        search: How layers are chosen: optimal or greedy.
        multiple: Ranks are multiples of this.
        least: Least rank.
        exclude: Globs on names and operator types of layers that are left whole.
        sensitivities: A JSON file in which what was learned of the layers is kept for other
            budgets.
        then_quantize: Whether to quantize the result to int8, too, as the recipe `default` does.
        limit: Use at most so many samples.
        preprocess: Preset or TOML file that turns pictures into inputs.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        report: A file for the report as a page (HTML).
        resume: A folder where finished layers are kept, and taken up again.
        seed: Seed of every random choice.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Returns:
        The new model, and the report: `report.facts["compression"]` has the layers, and, where
        layers were split, under `tradeoff` what other budgets would cost: `of` macs or bytes the
        share `kept` and the expected `error` of the outputs, relative to their power; `chosen` is
        what was taken, `points` what could have been, with all methods and with each alone.

    Raises:
        OnnxqError: Anything that the user can mend; a budget that cannot be met says what can.
    """
    budgets = {"macs": macs, "bytes": bytes, "latency": latency}
    given = {of: share for of, share in budgets.items() if share is not None}
    if len(given) != 1:
        raise RecipeError(
            f"wanted one budget, got {' and '.join(given) or 'none'}", fix="give macs, for example"
        )
    known = ["auto", *METHODS, ChannelPruning.name]
    if method not in known:
        hint = did_you_mean(method, known, f"methods are {', '.join(known)}")
        raise RecipeError(f"no method {method!r}", fix=hint)
    of, share = given.popitem()
    shared: dict[str, Any] = {"budget": of, "share": share, "multiple": multiple, "least": least}
    shared["exclude"] = tuple(exclude)
    if method == ChannelPruning.name:
        if of == "latency":
            raise RecipeError("channel-pruning takes no budget of time", fix="give macs or bytes")
        if sensitivities is not None:
            raise RecipeError("channel-pruning keeps no sensitivities", fix="leave the file out")
        step: Pass = ChannelPruning(**shared)
    else:
        step = Compress(
            methods=tuple(METHODS) if method == "auto" else (method,),
            search=search,
            sensitivities="" if sensitivities is None else os.fspath(sensitivities),
            **shared,
        )
    api.check_outputs([sensitivities], models=[source], others=[calib])
    return api.run(
        _recipe(step, quantize=then_quantize),
        source,
        destination,
        calib,
        limit=limit,
        preprocess=preprocess,
        strict=strict,
        report=report,
        resume=resume,
        seed=seed,
        threads=threads,
        progress=progress,
    )


def _recipe(step: Pass, *, quantize: bool) -> Recipe:
    """The default recipe with a pass in front of those that see to integers, or without these."""
    steps = recipe.load("default").passes
    first = next(i for i, s in enumerate(steps) if s.name == "gate-equalization")
    passes: tuple[Pass, ...] = (*steps[:first], step, *(steps[first:] if quantize else ()))
    return Recipe(name="compress", passes=passes)
