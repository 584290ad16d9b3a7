"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError
from onnxq.scratch import Scratch, put_folder

__all__ = ["check_folder", "whole_folder"]


def check_folder(folder: Path, *, force: bool, reads: Iterable[Any]) -> None:
    """Refuse a folder that cannot be made or replaced, before any work is done.

    Args:
        folder: What is to be made.
        force: Whether one that is not empty may be replaced.
        reads: Inputs, which must not lie in it; what is no path does not matter.

    Raises:
        OnnxqError: Names the folder, and why not.
    """
    try:
        target = Path(os.path.realpath(folder))
        if not target.parent.is_dir():
            raise OnnxqError("no such folder", where=folder.parent, fix="create it first")
        if target.exists() and not target.is_dir():
            raise OnnxqError("is a file, not a folder", where=folder, fix="name a folder")
        if target.is_dir():
            if any(target.iterdir()) and not force:
                raise OnnxqError(
                    "the folder is not empty", where=folder, fix="name another, or take --force"
                )
            paths = [Path(r) for r in reads if isinstance(r, (str, os.PathLike))]
            if any(Path(os.path.realpath(p)).is_relative_to(target) for p in (*paths, Path.cwd())):
                raise OnnxqError(
                    "an input or the current folder lies in it, and it would be replaced",
                    where=folder,
                    fix="name another folder",
                )
        if not os.access(target.parent, os.W_OK):
            raise OnnxqError(
                "the folder cannot be written to", where=target.parent, fix="take another one"
            )
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OnnxqError(
            f"cannot be written: {error.strerror}", where=folder, fix="name another folder"
        ) from error


@contextmanager
def whole_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """A new folder to fill beside its destination, renamed into place at the end.

    A link to a folder stays one. Without `force` only a folder that is empty still is replaced.

    Raises:
        OnnxqError: It cannot be written; what was there is as it was.
    """
    target = Path(os.path.realpath(folder))
    try:
        with Scratch(target.parent) as scratch:
            built = scratch / "new"
            built.mkdir()
            yield built
            put_folder(scratch, built, target, force=force)
    except OSError as error:
        raise OnnxqError(
            f"cannot be written: {error.strerror or error}",
            where=folder,
            fix="check the folder's permissions and the space on the disk",
        ) from error
