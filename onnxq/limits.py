"""What this machine can hold."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["memory"]

_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def memory() -> float:
    """Bytes of memory of the machine, or of the container; infinity where that is not known."""
    known = [math.inf]
    if hasattr(os, "sysconf"):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if _CONTAINER.is_file() and (text := _CONTAINER.read_text("ascii").strip()).isdecimal():
        known.append(int(text))
    return min(known)
