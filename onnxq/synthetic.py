"""Calibration samples made up for a model, where there are no data."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import input_map
from onnxq.errors import CalibrationError, ModelError
from onnxq.feeds import Feed
from onnxq.input_map import (
    InputMap,
    Maps,
    best_match,
    most_plausible,
    of_preprocess,
    picture_maps,
    sound_maps,
)
from onnxq.model import Layer, Model, consumers
from onnxq.natural import Pictures, sound
from onnxq.norm_matching import Moments, MomentSession, NormTargets, herd
from onnxq.ops import is_movement
from onnxq.pictures import Preprocess
from onnxq.progress import Progress, Silent
from onnxq.runtime import Session
from onnxq.signature import TensorSpec

__all__ = ["Synthetic", "synthesize"]

Kind = Literal["picture", "sound", "other"]
_Rows = dict[str, list[np.ndarray]]

# Samples made for each that is taken, where BatchNormalization tells which ones are typical, and
# how many more than twice as many as are taken are too many.
POOL, MOST = 6, 256
# Tensors behind BatchNormalization by which the map of the inputs is chosen, from the input on.
FIRST = 3
# Inputs of a one-dimensional convolution that are shorter than this are no sounds.
SOUND_LENGTH = 256
# Values of an input that is made up, at most: a colour picture of 6,600 x 6,600.
LARGEST = 1 << 27
# Sizes tried where the model leaves them open, until it runs.
SIZES: dict[Kind, tuple[int, ...]] = {
    "picture": (224, 256, 320, 192, 128, 64, 32, 416, 512, 640),
    "sound": (16000, 8000, 4096, 2048, 1024, 576, 512, 400, 256),
    "other": (128, 64, 32, 16, 8, 4, 2, 1),
}
# The same for sounds of a model that hands a state on: it takes one frame after the other, Silero
# 512 values with 64 of the frame before.
FRAMES = (576, 512, 480, 400, 320, 256, 640, 1024, 1536)
# Frames of a recording, after which the state begins anew.
RECORDING = 32
# What states are called.
_STATE = re.compile(r"state|hidden|cell|memory|^[hc](_|\d|n?$)", re.IGNORECASE)
# What an input passes through, besides data movement, before an operator tells what it is.
_PASSED = frozenset({"Cast", "Sub", "Add", "Mul", "Div", "Concat"})


@dataclass(frozen=True, eq=False)
class Synthetic(Sequence[Feed]):
    """Samples made up for a model, one feed per run; `Calibration` takes it as its source.

    Args:
        notes: What was assumed, one sentence each.
        sources: What makes each input.
        samples: What they are made of; pictures in 8 bits.
    """

    notes: tuple[str, ...]
    sources: tuple[_Source, ...] = field(repr=False)
    samples: tuple[_Rows, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        """A feed; a slice gives samples again."""
        if isinstance(index, slice):
            return replace(self, samples=self.samples[index])
        return _feed(self.sources, self.samples[index])


@dataclass(frozen=True, eq=False)
class _Source:
    """What makes one input.

    Args:
        spec: The input, all sizes known.
        rows: What a sample of a number consists of, along axis 0.
        note: What was assumed.
        map: What makes an input of a row.
        maps: The maps that come into question, as long as it is not decided.
    """

    spec: TensorSpec
    rows: Callable[[int], list[np.ndarray]]
    note: str
    map: InputMap | None = None
    maps: Maps | None = None

    def array(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The input."""
        parts = rows if self.map is None else [self.map.apply(r) for r in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def synthesize(
    model: Model,
    *,
    count: int = 32,
    seed: int = 0,
    preprocess: str | os.PathLike[str] | Preprocess | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Synthetic:
    """Make up calibration samples.

    Inputs that look like pictures get scenes with the statistics of photographs, those that look
    like sounds voices and noises, indices the range of the table that they index, others normally
    distributed numbers.  Where the model has BatchNormalization, or had it before it was folded,
    what that knows of the training data tells how pixels were scaled, and which samples of a larger
    pool are typical together.

    Args:
        model: The model, normalizations folded or not, but not equalized yet.
        count: How many samples.
        seed: Seed of every random choice.
        preprocess: What turns pictures into inputs: a preset, a TOML file or a `Preprocess`; None:
            found out from the model, or assumed.
        threads: How many samples run at a time; 0 for as many as there are cores.
        progress: Where progress is shown.

    Raises:
        CalibrationError: The shape of an input is unknown, or the model runs with no sample.
        RecipeError: The preprocessing means nothing.
    """
    if type(count) is not int or count < 1:
        raise CalibrationError(f"count: wanted at least 1 sample, got {count!r}")
    part = model.clone()
    part.infer()
    given = None if preprocess is None else Preprocess.of(preprocess)
    return _Maker(part, seed, threads, progress or Silent()).make(count, given)


class _Maker:
    """Makes samples for one model."""

    def __init__(self, model: Model, seed: int, threads: int, progress: Progress) -> None:
        self.model = model
        self.seed = seed
        self.threads = threads
        self.progress = progress
        self.pictures = Pictures(seed)
        self.inputs = {t.name: t for t in model.graph.inputs}
        self.session = Session(model.to_proto(), threads=1)
        specs = self.session.inputs
        self.kinds = {s.name: _kind(model, s, self.inputs[s.name]) for s in specs}
        self.states = _states(specs, self.session.outputs, self.kinds)

    def make(self, count: int, preprocess: Preprocess | None) -> Synthetic:
        sources = self._sized(preprocess)
        for index, source in enumerate(sources):
            if source.maps is not None:
                sources[index] = self._mapped(sources, source)
        notes = [f"synthetic samples: {s.spec.name}: {s.note}" for s in sources]
        numbers = list(range(count))
        targets = NormTargets.of(self.model)
        if targets is not None and not self.states:
            numbers, note = self._typical(sources, targets, count)
            notes.append(f"synthetic samples: {note}")
        samples = [_rows(sources, number) for number in numbers]
        if self.states:
            self._hand_on(sources, samples)
        return Synthetic(tuple(notes), tuple(sources), tuple(samples))

    def _hand_on(self, sources: Sequence[_Source], samples: Sequence[_Rows]) -> None:
        """Give each sample the state that the model had after the one before."""
        given: dict[str, np.ndarray] = {}
        for number, sample in enumerate(samples):
            if number % RECORDING:
                sample.update({name: [given[result]] for name, result in self.states.items()})
            given = self.session.run(_feed(sources, sample))

    # ------------------------------------------------------------------ what the inputs are

    def _sized(self, preprocess: Preprocess | None) -> list[_Source]:
        """What makes each input, in sizes that the model runs with."""
        session, kinds = self.session, self.kinds
        if preprocess is not None and "picture" not in kinds.values():
            raise CalibrationError(
                "preprocessing is for pictures, and no input looks like one",
                where="; ".join(map(str, session.inputs)),
                fix="leave it out",
            )
        failure: ModelError | None = None
        for specs in _attempts(session.inputs, kinds, bool(self.states)):
            _check_sizes(specs)
            sources = [self._source(spec, kinds[spec.name], preprocess) for spec in specs]
            try:
                session.run(_feed(sources, _rows(sources, 0)))
            except ModelError as error:
                failure = error
                continue
            return sources
        raise CalibrationError(
            "the model runs with no sample that was made up for it",
            where="; ".join(map(str, session.inputs)),
            fix="give samples",
        ) from failure

    def _source(self, spec: TensorSpec, kind: Kind, preprocess: Preprocess | None) -> _Source:
        if kind == "picture":
            return self._picture(spec, preprocess)
        shape = cast("tuple[int, ...]", spec.shape)
        if kind == "sound":
            rows = partial(self._draw_sounds, spec.name, shape)
            maps = sound_maps(spec)
            return _Source(spec, rows, "", maps.usual[0], maps)
        dtype = np.dtype(np.float32) if spec.dtype is None else spec.dtype
        size = _table(self.model, self.inputs[spec.name])
        if spec.name in self.states:
            draw = partial(_draw_constant, shape, dtype, 0)
            note = "zeros, then what the model puts out for the sample before"
        elif dtype.kind == "f":
            draw, note = partial(_draw_numbers, shape, dtype), "normal numbers, N(0, 1)"
        elif size is None:
            draw, note = partial(_draw_constant, shape, dtype, 1), "ones, as of a mask"
        else:
            draw = partial(_draw_indices, shape, dtype, size)
            note = f"integers of 0..{size - 1}, each as likely"
        return _Source(spec, lambda number: [draw(self._rng(spec.name, number))], note)

    def _rng(self, name: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 2, number, *name.encode()])

    def _draw_sounds(self, name: str, shape: tuple[int, ...], number: int) -> list[np.ndarray]:
        """A sound for each row of the batch, or one frame after the other of recordings."""
        batch, *channels, length = shape
        recording, frame = divmod(number, RECORDING if self.states else 1)
        whole = (1, *channels, length * (RECORDING if self.states else 1))
        rows = [sound(rng, whole) for rng in self._rng(name, recording).spawn(batch)]
        return [row[..., frame * length : (frame + 1) * length] for row in rows]

    def _picture(self, spec: TensorSpec, preprocess: Preprocess | None) -> _Source:
        batch, *rest = cast("tuple[int, ...]", spec.shape)
        channels, height, width = rest if _is_nchw(spec) else (rest[2], *rest[:2])
        boxed = preprocess is not None and preprocess.fit.startswith("letterbox")
        rows = partial(self._draw_pictures, batch, height, width, boxed)
        maps, found, note = None, None, "pictures"
        if preprocess is not None:
            if not boxed:  # pictures have the size of the input at once
                preprocess = replace(preprocess, fit="stretch", crop_pct=1.0)
            preprocess = replace(preprocess, size=(height, width))
            found = of_preprocess(preprocess, spec, "given")
            note = "pictures, preprocessed as given"
        elif spec.dtype == np.uint8:
            raw = Preprocess(scale=1, order="GRAY" if channels == 1 else "RGB")
            found = of_preprocess(raw, spec, "0..255")
            note = "pictures of 0..255"
        else:
            maps = picture_maps(spec, channels)
            found = maps.usual[0]
        return _Source(spec, rows, note, found, maps)

    def _draw_pictures(
        self, batch: int, height: int, width: int, boxed: bool, number: int
    ) -> list[np.ndarray]:
        """Pictures of the size of the input, or of other proportions where they get a frame."""
        rows = []
        for index in range(number * batch, (number + 1) * batch):
            ratio = 1.0
            if boxed:
                ratio = float(np.exp(np.random.default_rng([self.seed, 3, index]).normal(0, 0.4)))
            h, w = round(height * min(1, ratio)), round(width * min(1, 1 / ratio))
            rows.append(self.pictures.draw(index, max(1, h), max(1, w)))
        return rows

    # ------------------------------------------------------------------ how they are scaled

    def _mapped(self, sources: Sequence[_Source], source: _Source) -> _Source:
        """The source with the map of its inputs that the model speaks for."""
        assert source.maps is not None
        maps, what = source.maps, "pictures" if source.maps.centres[1:] else "sounds"
        raws = [_rows(sources, number) for number in range(input_map.MANY)]

        def feeds(found: InputMap, count: int) -> Iterator[Feed]:
            changed = [replace(s, map=found) if s is source else s for s in sources]
            return (_feed(changed, raw) for raw in raws[:count])

        below = _below(self.inputs[source.spec.name])
        first = NormTargets.of(self.model, FIRST, below)
        if first is not None:
            session = MomentSession(self.model, first.names, self.threads)
            with self.progress.task(f"scale of {source.spec.name}", None) as advance:

                def error(found: InputMap, count: int) -> float:
                    return first.divergence(session.run(feeds(found, count), advance))

                best, least = best_match(maps, error)
            note = (
                f"{what}, {best.name}: fits BatchNormalization best (divergence {least:.2f} at the"
                " first tensors)"
            )
            return replace(source, map=best, note=note)
        tensor = _first_result(self.model, self.inputs[source.spec.name])
        if tensor is None or what == "sounds":
            best = maps.usual[0]
            note = f"{what}, assumed to be {best.name}: nothing in the model tells the scale"
            return replace(source, map=best, note=note)
        session = MomentSession(self.model, [tensor], self.threads)
        best, other, _ = most_plausible(maps, lambda m: session.run(feeds(m, input_map.FEW)))
        note = (
            f"{what}, assumed to be {best.name}: the first layer's results are more plausible than"
            f" with {other.name}"
        )
        return replace(source, map=best, note=note)

    # ------------------------------------------------------------------ which are typical

    def _typical(
        self, sources: Sequence[_Source], targets: NormTargets, count: int
    ) -> tuple[list[int], str]:
        """The samples whose moments together are nearest to those of training, and a note."""
        pool = max(2 * count, min(POOL * count, MOST))
        session = MomentSession(self.model, targets.names, self.threads)
        with self.progress.task("typical samples", pool) as advance:
            feeds = (_feed(sources, _rows(sources, number)) for number in range(pool))
            moments = session.run(feeds, advance)
        numbers = herd(targets.features(moments), count)
        taken = Moments(moments.mean[numbers], moments.square[numbers])
        note = (
            f"{count} of {pool} taken for the moments that {len(targets.names)} BatchNormalizations"
            f" know (divergence {targets.divergence(taken):.3f}, of all"
            f" {targets.divergence(moments):.3f})"
        )
        return numbers, note


# ---------------------------------------------------------------------- feeds


def _rows(sources: Sequence[_Source], number: int) -> _Rows:
    return {s.spec.name: s.rows(number) for s in sources}


def _feed(sources: Sequence[_Source], rows: _Rows) -> Feed:
    return {s.spec.name: s.array(rows[s.spec.name]) for s in sources}


def _draw_numbers(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=shape).astype(dtype)


def _draw_indices(
    shape: tuple[int, ...], dtype: np.dtype, size: int, rng: np.random.Generator
) -> np.ndarray:
    return rng.integers(0, size, shape).astype(dtype)


def _draw_constant(
    shape: tuple[int, ...], dtype: np.dtype, value: int, rng: np.random.Generator
) -> np.ndarray:
    return np.full(shape, value, dtype)


# ---------------------------------------------------------------------- what a model says


def _kind(model: Model, spec: TensorSpec, tensor: gs.Tensor) -> Kind:
    """What an input is taken for."""
    shape = spec.shape
    if shape is None or tensor.shape is None or spec.dtype is None:
        raise CalibrationError(
            "no samples can be made up for an input of unknown rank or type",
            where=spec,
            fix="give samples, or export the model with shapes",
        )
    is_float = spec.dtype.kind == "f"
    is_picture = len(shape) == 4 and (_is_nchw(spec) or shape[3] in (1, 3))
    if is_picture and (is_float or spec.dtype == np.uint8):
        return "picture"
    if is_float and len(shape) in (2, 3) and (len(shape) == 2 or shape[1] in (1, 2)):
        last = shape[-1]
        layers = (Layer.of(model, node) for node, _ in _readers(tensor))
        one_axis = any(x is not None and x.op == "Conv" and x.weight.ndim == 3 for x in layers)
        if one_axis and (not isinstance(last, int) or last >= SOUND_LENGTH):
            return "sound"
    return "other"


def _is_nchw(spec: TensorSpec) -> bool:
    """Whether channels come before height and width, as `Preprocess` takes it."""
    return spec.shape is not None and spec.shape[1] in (1, 3)


def _readers(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """The operators that make something of a tensor, past those that only move or scale it.

    Yields:
        Each with the tensor that it reads.
    """
    stack, seen = [tensor], {id(tensor)}
    while stack:
        x = stack.pop()
        for node in consumers(x):
            moved = is_movement(node.op, node.attrs) and node.inputs[0] is x
            if not moved and node.op not in _PASSED:
                yield node, x
                continue
            for y in node.outputs:
                if id(y) not in seen:
                    seen.add(id(y))
                    stack.append(y)


def _below(tensor: gs.Tensor) -> set[str]:
    """The names of all tensors that depend on a tensor."""
    stack, names = [tensor], {str(tensor.name)}
    while stack:
        for node in consumers(stack.pop()):
            fresh = [y for y in node.outputs if y.name not in names]
            names.update(str(y.name) for y in fresh)
            stack.extend(fresh)
    return names


def _table(model: Model, tensor: gs.Tensor) -> int | None:
    """How many values indices may have: rows of a table, or of a one-hot code; None if unknown."""
    sizes = []
    for node, x in _readers(tensor):
        constants = [t for t in node.inputs if isinstance(t, gs.Constant)]
        if node.op == "Gather" and node.inputs[1] is x and node.inputs[0] in constants:
            sizes.append(int(node.inputs[0].shape[node.attrs.get("axis", 0)]))
        elif node.op == "OneHot" and node.inputs[0] is x and node.inputs[1] in constants:
            sizes.append(int(model.array(node.inputs[1]).reshape(-1)[0]))
        elif node.op == "Equal" and constants and constants[0].shape and constants[0].dtype:
            sizes.append(int(model.array(constants[0]).max(initial=0)) + 1)
    return min((s for s in sizes if s > 0), default=None)


def _first_result(model: Model, tensor: gs.Tensor) -> str | None:
    """The result of the first convolution that reads an input; None if there is none."""
    main = {id(node) for node in model.graph.nodes}
    for node, _ in _readers(tensor):
        if id(node) not in main:  # in a subgraph, of which nothing can be fetched
            continue
        layer = Layer.of(model, node)
        if layer is not None and layer.op == "Conv" and layer.y.shape is not None:
            return str(layer.y.name)
    return None


def _states(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], kinds: dict[str, Kind]
) -> dict[str, str]:
    """Inputs called a state, and the output like it, which is the next one."""
    found = {}
    for spec in inputs:
        if kinds[spec.name] == "other" and _STATE.search(spec.name):
            alike, like = (
                [s.name for s in specs if _is_like(s, spec)] for specs in (inputs, outputs)
            )
            like = [name for name in like if _STATE.search(name)] or like
            if len(alike) == len(like):
                found[spec.name] = like[alike.index(spec.name)]
    return found


def _is_like(one: TensorSpec, two: TensorSpec) -> bool:
    """Whether two tensors have the same type, and may have the same shape."""
    if one.dtype != two.dtype or one.shape is None or two.shape is None:
        return False
    fixed = (
        {a, b} for a, b in zip(one.shape, two.shape, strict=False) if {type(a), type(b)} == {int}
    )
    return len(one.shape) == len(two.shape) and all(len(sizes) == 1 for sizes in fixed)


def _check_sizes(specs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        if math.prod(cast("tuple[int, ...]", spec.shape)) > LARGEST:
            raise CalibrationError(
                "the input is too large for samples to be made up", where=spec, fix="give samples"
            )


def _attempts(
    specs: Sequence[TensorSpec], kinds: dict[str, Kind], in_frames: bool
) -> Iterator[list[TensorSpec]]:
    """The inputs with sizes for what they leave open, the likeliest first."""
    sizes: dict[Kind, tuple[int, ...]] = {**SIZES, "sound": FRAMES} if in_frames else SIZES
    is_open = any(not isinstance(d, int) for s in specs for d in (s.shape or ())[1:])
    for attempt in range(max(map(len, sizes.values())) if is_open else 1):
        symbols: dict[str, int] = {}
        sized = []
        for spec in specs:
            ladder = sizes[kinds[spec.name]]
            size = ladder[min(attempt, len(ladder) - 1)]
            shape = []
            for axis, given in enumerate(spec.shape or ()):
                if isinstance(given, int):
                    shape.append(given)
                elif axis == 0 or (given or "").lower().startswith("batch"):
                    shape.append(1 if given is None else symbols.setdefault(given, 1))
                else:
                    shape.append(size if given is None else symbols.setdefault(given, size))
            sized.append(TensorSpec(spec.name, spec.dtype, tuple(shape)))
        yield sized
