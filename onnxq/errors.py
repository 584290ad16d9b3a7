"""The errors that users meet: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

__all__ = [
    "CalibrationError",
    "ModelError",
    "OnnxqError",
    "PassError",
    "RecipeError",
    "TargetError",
    "UnreadableError",
    "UnsupportedError",
    "did_you_mean",
    "printable",
]

_T = TypeVar("_T", str, None)
_LONGEST = 1000  # characters of a part of a message


class OnnxqError(Exception):
    """A known error.

    Args:
        what: What is wrong, in plain words.
        where: The file, node, tensor or option concerned.
        fix: What to do about it.

    The command line prints it as ``error: what (where); fix`` and exits with 1.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        text = _cut(what) if self.where is None else f"{_cut(what)} ({_cut(self.where)})"
        text = text if fix is None else f"{text}; {_cut(fix)}"
        super().__init__(printable(" ".join(text.split())))


class ModelError(OnnxqError):
    """A model that cannot be read, is not valid, or holds values that no model should."""


class UnsupportedError(OnnxqError, NotImplementedError):
    """Something valid that onnxq cannot do."""


class RecipeError(OnnxqError, ValueError):
    """A recipe, a format or an option that does not mean anything."""


class CalibrationError(OnnxqError):
    """Samples that cannot be read, or do not fit the model."""


class UnreadableError(CalibrationError):
    """A sample that cannot be read at all, beside which others may be fine."""


class TargetError(OnnxqError):
    """A combination of formats that the target cannot run."""


class PassError(OnnxqError):
    """A pass failed; its cause is chained.

    Args:
        name: The pass that failed.
        done: The names of the passes that ran before it.
        cause: What it raised.
    """

    def __init__(self, name: str, done: tuple[str, ...], cause: Exception) -> None:
        self.name = name
        self.done = done
        super().__init__(
            f"pass {name} failed: {cause}",
            fix=f"passes done before it: {', '.join(done) or 'none'}",
        )


def did_you_mean(given: object, known: Iterable[object], otherwise: _T) -> str | _T:
    """The fix for a name that is not known: the one that looks like it, else `otherwise`."""
    names = [name for name in known if isinstance(name, str)]
    near = difflib.get_close_matches(given, names, 1) if isinstance(given, str) else []
    return f"did you mean {near[0]}?" if near else otherwise


def _cut(text: str) -> str:
    """Text of a length that can be read: names and values come from files that others wrote."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters are spelled out.

    So are surrogates, which stand for the bytes of file names that are not UTF-8.
    """
    if text.isprintable():
        return text
    kept = "\n\t\u00a0"  # which are not printable, but harmless
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )
