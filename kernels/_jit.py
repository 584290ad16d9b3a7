"""How kernels are compiled: the one place that decides.

Every kernel is compiled by Numba at its first call and kept on the disk, so that the next process
loads it within milliseconds. The switches:

- ``nogil``: kernels run beside one another and beside onnxruntime in a few ordinary threads;
- ``error_model="numpy"``: dividing by zero gives inf, and loops that divide vectorize;
- the cache, off when the environment variable ``ONNXQ_NUMBA_CACHE`` is 0, or where no folder can be
  written. Numba's ``NUMBA_CACHE_DIR`` moves it, ``NUMBA_DISABLE_JIT=1`` runs kernels as Python;
- no fast math, but for kernels that ask for sums in any order;
- no threads, but for kernels that ask for them: starting them costs more than most kernels take.

Two rules that Numba imposes. The cache notices an edit of the file that holds a kernel, not of
another file: **a kernel calls only kernels of its own file**. Compiled code must not be loaded by
many processes while one of them writes it: compile in the parent before workers start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import numba
import numpy as np
from numba.core import event

__all__ = ["announced", "kernel", "read_only"]

_F = TypeVar("_F", bound=Callable[..., Any])
_CACHE = os.environ.get("ONNXQ_NUMBA_CACHE", "1") != "0"

# sums may be reordered into vectors; NaN, infinity and comparisons keep their meaning
_ANY_ORDER = {"reassoc", "nsz", "contract"}

_kernels: list[Any] = []


@overload
def kernel(function: _F, /) -> _F: ...
@overload
def kernel(*, any_order: bool = False, parallel: bool = False) -> Callable[[_F], _F]: ...
def kernel(function: Any = None, /, *, any_order: bool = False, parallel: bool = False) -> Any:
    """Compile a function of arrays and numbers, as the module's docstring says.

    Args:
        function: What to compile.
        any_order: Whether floating-point sums may be added in any order, the same on every run of
            one machine. Never where a comparison decides about a float.
        parallel: Whether ``numba.prange`` runs on several threads.
    """

    def compiled(function: Any) -> Any:
        flags = {
            "nogil": True,
            "error_model": "numpy",
            "parallel": parallel,
            "fastmath": _ANY_ORDER if any_order else False,
        }
        try:
            dispatcher = numba.njit(cache=_CACHE, **flags)(function)
        except RuntimeError:  # no folder for the cache can be written
            dispatcher = numba.njit(**flags)(function)
        _kernels.append(dispatcher)
        return dispatcher

    return compiled if function is None else compiled(function)


def read_only(array: np.ndarray) -> np.ndarray:
    """A view for a kernel that only reads.

    To Numba, arrays that may and that must not be written are of two types, and a kernel would be
    compiled for each.
    """
    view = array.view()
    view.flags.writeable = False
    return view


@contextmanager
def announced(say: Callable[[str], None]) -> Iterator[None]:
    """Tell the user, once, if kernels are compiled within: that takes seconds."""
    with event.install_listener("numba:compile", _Announcer(say)):
        yield


class _Announcer(event.Listener):
    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.said = False

    def on_start(self, event: event.Event) -> None:
        compiling = event.data["dispatcher"]
        if self.said or not any(k is compiling for k in _kernels):
            return
        self.said = True
        kept = compiling.stats.cache_path is not None
        when = "once for this installation" if kept else "at every run, as no cache keeps them"
        self.say(f"compiling kernels, {when}...")

    def on_end(self, event: event.Event) -> None:
        pass
