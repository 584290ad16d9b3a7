"""Recipes: which passes run, in which order, with which options, as TOML.

::

    name = "careful"                       # optional, as are the next two
    description = "for small detectors"
    target = "ort-cpu"

    [[pass]]
    name = "clean"

    [[pass]]
    name = "calibrate"
    weights = "int8/channel"
    exclude = ["Softmax", "head.*"]

The options of a pass are the fields of its dataclass.  TOML has no null: an option that may be None
takes "none" for it, unless it takes any text.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import tomllib
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from onnxq import passes
from onnxq.errors import RecipeError, TargetError, UnsupportedError, did_you_mean
from onnxq.files import LARGEST_TOML, parse_toml, read_limited
from onnxq.pass_manager import After, Pass, PassManager
from onnxq.targets import TARGETS

__all__ = ["RECIPES", "Option", "Recipe", "dumps", "load", "loads", "options_of", "pass_class"]


def _text(name: str, description: str, *steps: str) -> str:
    """A recipe as TOML; a step is the name of a pass, then lines of options."""
    head = f'name = "{name}"\ndescription = "{description}"\n'
    for step in steps:
        title, _, options = step.partition("\n")
        head += f'\n[[pass]]\nname = "{title}"\n' + (f"{options}\n" if options else "")
    return head


_RECIPES = (
    _text(
        "default",
        "int8 near the accuracy of float: least-error ranges, rounding by output error.",
        "clean",
        "space-to-depth",
        "fold-batch-norm",
        "fold-dead-channels",
        "gate-equalization",
        "calibrate",
        "residual-input",
        "reduce-range",
        "gptq",
        "insert-qdq",
    ),
    _text(
        "accurate",
        "For weights of few bits, or the last tenth: AdaRound, layer after layer.",
        "clean",
        "space-to-depth",
        "fold-batch-norm",
        "fold-dead-channels",
        "noise-equalization",
        "gate-equalization\nlevels = 12.0",
        "calibrate",
        "residual-input",
        "reduce-range",
        "adaround",
        "insert-qdq",
    ),
    _text(
        "per-tensor",
        "For targets with one scale per weight: channels are evened out first.",
        "clean",
        "space-to-depth",
        'fold-batch-norm\nstandalone = "conv"',
        "fold-dead-channels",
        'cross-layer-equalization\nbalance = "both"',
        "gate-equalization\nlevels = 40.0",
        'calibrate\nweights = "int8/tensor"',
        "residual-input",
        "reduce-range",
        "gptq",
        "insert-qdq",
    ),
    _text(
        "data-free",
        "Without samples: equalize, absorb, ranges from batch normalization, correct.",
        "clean",
        "space-to-depth",
        'fold-batch-norm\nstandalone = "conv"',
        "fold-dead-channels",
        'cross-layer-equalization\nbalance = "both"',
        "high-bias-absorption",
        "gate-equalization",
        'calibrate\nranges = "batch-norm"',
        "reduce-range",
        "bias-correction",
        "insert-qdq",
    ),
    _text(
        "weight-only",
        "Weights in integers, activations in float: small files, for MatMul and Gemm.",
        "clean",
        "fold-batch-norm",
        "fold-dead-channels",
        'calibrate\nweights = "int4/block=32"\nactivations = "float"',
        "gptq",
        "insert-qdq",
    ),
    _text(
        "weight-only-nearest",
        "Weights in integers, activations in float, without samples: rounded to nearest.",
        "clean",
        "fold-batch-norm",
        "fold-dead-channels",
        'calibrate\nweights = "int4/block=32"\nactivations = "float"',
        "insert-qdq",
    ),
    _text(
        "minmax",
        "The plain scheme, for comparison: ranges from least to greatest, nearest rounding.",
        "clean",
        "fold-batch-norm",
        'calibrate\nmethod = "minmax"',
        "reduce-range",
        "insert-qdq",
    ),
)
# name -> TOML
RECIPES = {tomllib.loads(text)["name"]: text for text in _RECIPES}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Passes with their options, ready to run.

    Args:
        name: What to call it.
        description: What it is good for.
        target: Name of the target that it is made for; None leaves the choice to the caller.
        passes: What runs, in order.
    """

    name: str = ""
    description: str = ""
    target: str | None = None
    passes: tuple[Pass, ...]

    def manager(self, after: After | None = None) -> PassManager:
        """A pass manager that runs the passes.

        Args:
            after: Called as `after(pass, model, changes)` after each pass.
        """
        return PassManager(*self.passes, after=after)


def load(source: str | os.PathLike[str]) -> Recipe:
    """A recipe by its name in `RECIPES`, or from a TOML file.

    Raises:
        RecipeError: No such recipe or file, or a mistake in it; says where, and what was meant.
    """
    if isinstance(source, str) and source in RECIPES:
        return loads(RECIPES[source], where=f"recipe {source}")
    path = Path(source)
    try:
        text = read_limited(path, LARGEST_TOML).decode("utf-8-sig")
    except FileNotFoundError as error:
        if isinstance(source, str) and path.suffix != ".toml":
            known = f"recipes are {', '.join(RECIPES)}, or give a .toml file"
            hint = did_you_mean(source, RECIPES, known)
            raise RecipeError(f"no recipe {source!r}", fix=hint) from error
        raise RecipeError("no such file", where=path, fix="check the path") from error
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise RecipeError("is not UTF-8 text", where=path) from error
    return loads(text, where=path)


def loads(text: str, *, where: object = "recipe") -> Recipe:
    """A recipe from TOML text.

    Args:
        text: The TOML.
        where: What to call it in errors, such as its path.

    Raises:
        RecipeError: A mistake in it; says where, and what was meant.
    """
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise RecipeError(f"not TOML: {error}", where=where) from error
    keys = ("name", "description", "target", "pass")
    for key in table:
        if key not in keys:
            raise RecipeError(f"no key {key!r}", where=where, fix=_hint(key, keys, "keys are"))
    for key in keys[:3]:
        if not isinstance(table.get(key, ""), str):
            raise RecipeError(f"{key}: wanted text, got {_shown(table[key])}", where=where)
    target = table.get("target")
    if target is not None and target not in TARGETS:
        hint = _hint(target, TARGETS, "targets are")
        raise RecipeError(f"no target {target!r}", where=where, fix=hint)
    steps = table.get("pass")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) for s in steps):
        raise RecipeError("names no passes", where=where, fix="write [[pass]] for each of them")
    return Recipe(
        name=table.get("name", ""),
        description=table.get("description", ""),
        target=target,
        passes=tuple(_step(step, i, where) for i, step in enumerate(steps, 1)),
    )


def dumps(recipe: Recipe) -> str:
    """The recipe as TOML, every option written out: it means the same when defaults change.

    Raises:
        RecipeError: A pass that `onnxq.passes` does not name, or an option that TOML cannot say.
    """
    lines = [
        f"{key} = {_toml(value, key)}"
        for key in ("name", "description", "target")
        if (value := getattr(recipe, key))
    ]
    for index, step in enumerate(recipe.passes, 1):
        place = f"pass {index} ({step.name})"
        kind = pass_class(step.name, where=place)
        if type(step) is not kind:
            raise RecipeError(f"{type(step).__name__} is not the pass of that name", where=place)
        lines += ["", "[[pass]]", f"name = {_toml(step.name, place)}"]
        for option in options_of(kind):
            value = getattr(step, option.name)
            if value is None and option.default is None:
                continue  # reading finds the default
            if value is None and _taken("none", option.kind) is None:
                value = "none"
            lines.append(f"{option.name} = {_toml(value, f'{option.name} of {place}')}")
    return "\n".join(lines).lstrip("\n") + "\n"


def pass_class(name: str, *, where: object = None) -> type[Pass]:
    """The pass of a name.

    Args:
        name: Its name, a key of `onnxq.passes.PASSES`.
        where: Where the name stands, for the error.

    Raises:
        RecipeError: No pass has that name.
    """
    if name not in passes.PASSES:
        hint = _hint(name, passes.PASSES, "passes are")
        raise RecipeError(f"no pass {name!r}", where=where, fix=hint)
    module, _, attribute = passes.PASSES[name].partition(":")
    kind: type[Pass] = getattr(importlib.import_module(module), attribute)
    return kind


# ---------------------------------------------------------------------- passes and their options


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    Args:
        name: Its name.
        kind: Its type.
        default: Its default.
        required: Whether it has no default.
    """

    name: str
    kind: Any
    default: Any
    required: bool

    @property
    def takes(self) -> str:
        """What may be given, in words."""
        return _wanted(self.kind)

    @property
    def default_text(self) -> str:
        """The default as TOML; empty if there is none."""
        if self.required:
            return ""
        return "none" if self.default is None else _toml(self.default, self.name)


def options_of(kind: type[Pass]) -> list[Option]:
    """The options of a pass, in the order of its fields."""
    kinds = typing.get_type_hints(kind)
    none = dataclasses.MISSING
    return [
        Option(f.name, kinds[f.name], f.default, f.default is none and f.default_factory is none)
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]  # each pass is a dataclass
    ]


def _step(table: dict[str, Any], index: int, where: object) -> Pass:
    given = dict(table)
    name = given.pop("name", None)
    if not isinstance(name, str):
        got = "nothing" if name is None else _shown(name)
        raise RecipeError(
            f"name: wanted the name of a pass, got {got}", where=f"pass {index} of {where}"
        )
    place = f"pass {index} ({name}) of {where}"
    kind = pass_class(name, where=place)
    options = {o.name: o for o in options_of(kind)}
    for key in given:
        if key not in options:
            hint = _hint(key, options, "options are") if options else "it takes none"
            raise RecipeError(f"{name} has no option {key!r}", where=place, fix=hint)
    for option in options.values():
        if option.required and option.name not in given:
            raise RecipeError(f"{option.name} is missing", where=place)
    values = {key: _value(options[key], value, place) for key, value in given.items()}
    try:
        return kind(**values)
    except (RecipeError, TargetError, UnsupportedError) as error:
        inner = place if error.where is None else f"{error.where}, {place}"
        raise type(error)(error.what, where=inner, fix=error.fix) from error


def _value(option: Option, value: Any, place: str) -> Any:
    result = _taken(value, option.kind)
    if result is not _NOT:
        return result
    raise RecipeError(
        f"{option.name}: wanted {_wanted(option.kind)}, got {_shown(value)}",
        where=place,
        fix=did_you_mean(value, _choices(option.kind), None),
    )


_NOT = object()  # what an option does not take


def _taken(value: Any, kind: Any) -> Any:
    """What an option of this type makes of a TOML value; `_NOT` if it does not take it."""
    args = typing.get_args(kind)
    if _is_union(kind):
        # None last: "none" is text where any text will do
        found = (_taken(value, a) for a in sorted(args, key=lambda a: a is types.NoneType))
        return next((f for f in found if f is not _NOT), _NOT)
    if kind is types.NoneType:
        return None if value == "none" else _NOT
    if typing.get_origin(kind) is Literal:
        return value if any(type(value) is type(a) and value == a for a in args) else _NOT
    if typing.get_origin(kind) is tuple:
        return _taken_tuple(value, args)
    if kind is float and type(value) is int:
        return float(value) if abs(value) <= 2**1023 else _NOT
    return value if type(value) is kind else _NOT  # so True is no integer


def _taken_tuple(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list):
        return _NOT
    kinds = args[:1] * len(value) if args[1:] == (...,) else args
    if len(kinds) != len(value):
        return _NOT
    items = tuple(_taken(v, k) for v, k in zip(value, kinds, strict=True))
    return _NOT if any(i is _NOT for i in items) else items


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _choices(kind: Any) -> tuple[Any, ...]:
    """The literals that a type names, within unions and tuples too."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return tuple(c for a in typing.get_args(kind) for c in _choices(a))


def _wanted(kind: Any) -> str:
    args = typing.get_args(kind)
    if _is_union(kind):
        return " or ".join(map(_wanted, args))
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, args))}"
    if typing.get_origin(kind) is tuple and args[1:] == (...,):
        return f"a list, each {_wanted(args[0])}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {', '.join(map(_wanted, args))}"
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(kind, "none" if kind is types.NoneType else f"a {kind}")


# ---------------------------------------------------------------------- text


def _toml(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(v, where) for v in value)}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML wants one more control character escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise RecipeError(f"TOML cannot say {_shown(value)}", where=where)


def _hint(given: str, known: Collection[str], otherwise: str) -> str:
    return did_you_mean(given, known, f"{otherwise} {', '.join(known)}")


def _shown(value: Any) -> str:
    """A value in an error, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
