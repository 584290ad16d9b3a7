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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

import numba

__all__ = ["kernel", "needs_compilation"]

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


def needs_compilation(*modules: ModuleType) -> bool:
    """Whether a kernel of these modules would have to be compiled at its first call.

    Good enough for a word to the user: a cache that another version of Numba left counts as good.
    """
    names = {module.__name__ for module in modules}
    return any(not _ready(k) for k in _kernels if k.__module__ in names)


def _ready(dispatcher: Any) -> bool:
    if not hasattr(dispatcher, "signatures") or dispatcher.signatures:
        return True  # not compiled at all, as NUMBA_DISABLE_JIT wants, or compiled by this process
    folder = dispatcher.stats.cache_path
    if folder is None:
        return False
    function = dispatcher.py_func
    source = Path(function.__code__.co_filename)
    pattern = f"{source.stem}.{function.__qualname__}-{function.__code__.co_firstlineno}.*.nbi"
    newest = max((f.stat().st_mtime for f in Path(folder).glob(pattern)), default=0.0)
    return newest >= source.stat().st_mtime
