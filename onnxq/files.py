"""Files that others wrote: no pipes, which never end, and nothing larger than makes sense."""

from __future__ import annotations

import errno
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

__all__ = ["LARGEST_TOML", "check_regular", "parse_toml", "read_limited"]

LARGEST_TOML = 1 << 20  # bytes
_DEEPEST_KEY = 100  # dots: Python's parser takes time by their square


def check_regular(path: str | os.PathLike[str]) -> int:
    """The bytes of a file; a folder passes, since opening it says what it is.

    Raises:
        OSError: There is none, or it is a pipe or device, which may never end.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or device, not a file", os.fspath(path))
    return found.st_size


def read_limited(path: str | os.PathLike[str], largest: int) -> bytes:
    """The content of a file.

    Args:
        path: The file.
        largest: Bytes that it may have, a multiple of 1 MiB.

    Raises:
        OSError: It cannot be read, is a pipe or device, or larger than that.
    """
    if check_regular(path) <= largest:
        with Path(path).open("rb") as file:
            data = file.read(largest + 1)
        if len(data) <= largest:
            return data
    raise OSError(errno.EFBIG, f"it is larger than {largest >> 20} MiB", os.fspath(path))


def parse_toml(text: str) -> dict[str, Any]:
    """What TOML says.

    Raises:
        ValueError: It is none, or nested too deeply; says where.
    """
    for line in text.splitlines():
        if any(part.count(".") > _DEEPEST_KEY for part in line.split("=")[:-1] or [line]):
            raise ValueError(f"a key of more than {_DEEPEST_KEY} parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
