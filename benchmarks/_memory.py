"""Memory of this process and of the machine; the standard library is all that it needs."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def peak() -> int:
    """The most bytes of memory that this process has had.

    The kernel counts what the parent had before this program was loaded in ru_maxrss, too.
    """
    if os.path.exists("/proc/self/status"):
        return 1024 * int(_proc("/proc/self/status")["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def available() -> float:
    """Bytes of memory that can be used."""
    if os.path.exists("/proc/meminfo"):
        return 1024.0 * int(_proc("/proc/meminfo")["MemAvailable"].split()[0])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _proc(path: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
