"""Scratch folders, and files and folders that appear whole or not at all.

What is written goes into a scratch folder beside its destination, and is renamed from there.  A
process that is killed leaves its scratch folder behind; while it lives, it holds a lock on it.  So
whoever makes the next one removes those that nobody holds, after what they had begun to put into
place is put right.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onnxq.errors import OnnxqError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing swept
    fcntl = None  # type: ignore[assignment]

__all__ = ["Scratch", "alone", "claim", "put_folder", "retire", "synced", "whole_file"]

_PREFIX = ".onnxq-scratch-"
_NAME = re.compile(re.escape(_PREFIX) + "[a-z0-9_]{8}")
# In a scratch folder: notes of files beside it, and the folder that makes way for another.
_CLAIMED, _RETIRED, _OLD = ".claimed", ".retired", ".old"


class Scratch:
    """A new folder that this process alone uses; it goes when it is closed, or with the process.

    Args:
        folder: Where to make it; None: where temporary files lie.

    Raises:
        OSError: It cannot be made.
        OnnxqError: Nor where temporary files lie.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._make(Path(tempfile.gettempdir()) if folder is None else folder)
        except OSError as error:
            if folder is not None:
                raise
            raise OnnxqError(
                f"no temporary file can be written: {error.strerror}",
                where=error.filename,
                fix="point TMPDIR to a folder with room",
            ) from error

    def _make(self, parent: Path) -> None:
        _sweep(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._lock = _locked(self.path, wait=True)
            if self.path.is_dir():  # not swept before it was locked
                break
            _unlock(self._lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        with suppress(OSError):
            _forgo(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        _unlock(self._lock)
        self._lock = None

    def lasts(self, owner: object) -> None:
        """Remove the folder when the owner is no more."""
        weakref.finalize(owner, self.close)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write a file at, renamed into place at the end; after an error nothing is.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    with Scratch(path.parent) as scratch:
        part = scratch / path.name
        yield part
        synced(part)
        os.replace(part, path)


def synced(path: Path) -> None:
    """Have a file on the disk before a rename makes it the one that counts."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def claim(scratch: Path, part: Path, path: Path) -> bool:
    """Make an empty file at a path that is free, for what a file in a scratch folder refers to.

    Args:
        scratch: The scratch folder.
        part: The file in it. If it never leaves, what was claimed goes with the folder.
        path: What to claim.

    Returns:
        False if the path is taken.
    """
    if path.exists():
        return False
    part.touch()
    note = _noted(scratch / _CLAIMED, part, path)
    try:
        with path.open("xb"):
            return True
    except FileExistsError:
        note.unlink()
        return False


def retire(scratch: Path, part: Path, path: Path) -> None:
    """Remove a file with the scratch folder, if `part` has left it by then."""
    _noted(scratch / _RETIRED, part, path)


def _noted(notes: Path, part: Path, path: Path) -> Path:
    notes.mkdir(exist_ok=True)
    note = notes / path.name
    note.write_text(part.name, encoding="utf-8")
    return note


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Have a folder to oneself, among all that ask for it so; where it can be locked."""
    lock = _locked(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def put_folder(scratch: Path, built: Path, target: Path, *, force: bool) -> None:
    """Rename a folder into place; with `force`, what is there makes way.

    Where the system cannot exchange two folders in one step, there is a moment without either; who
    sweeps after a process that was killed in it puts the old one back.

    Raises:
        OSError: It cannot be done; what was there is as it was.
    """
    if not target.exists():
        try:
            return os.rename(built, target)
        except OSError as error:  # another has put one there meanwhile
            if not force or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    if not force:
        target.rmdir()
        os.rename(built, target)
    elif not _exchange(built, target):
        old = scratch / _OLD / target.name
        old.parent.mkdir()
        os.rename(target, old)
        try:
            os.rename(built, target)
        except BaseException:
            os.rename(old, target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    name = "renamex_np" if sys.platform == "darwin" else "renameat2"
    call = getattr(libc, name, None)
    if call is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, which macOS calls RENAME_SWAP
    if sys.platform == "darwin":
        done = call(*paths, swap)
    else:
        done = call(here, paths[0], here, paths[1], swap)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # a file system that does not know it
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


def _sweep(folder: Path) -> None:
    """Remove the scratch folders that processes left behind when they were killed."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:  # not to be listed: nothing to sweep
        for entry in entries:
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _sweep_one(folder, Path(entry.path))


def _sweep_one(folder: Path, stale: Path) -> None:
    """Remove a scratch folder if it is one's own, and no process holds it."""
    try:
        if stale.stat().st_uid != os.geteuid():
            return
        lock = _locked(stale, wait=False)
    except OSError:  # another has just swept it, or it is held
        return
    if lock is None:
        return
    try:
        with suppress(OSError):  # what cannot be removed is left to the next
            _forgo(stale)
            for old in _listed(stale / _OLD):
                if not (folder / old.name).exists():
                    os.rename(old, folder / old.name)
            shutil.rmtree(stale)
    finally:
        _unlock(lock)


def _forgo(scratch: Path) -> None:
    """Remove what was claimed for files that are here still, and what others have replaced."""
    for kind, still in ((_CLAIMED, True), (_RETIRED, False)):
        for note in _listed(scratch / kind):
            part = note.read_text(encoding="utf-8")
            if part and (scratch / part).exists() == still:  # empty: killed as it was written
                (scratch.parent / note.name).unlink(missing_ok=True)


def _listed(folder: Path) -> list[Path]:
    return [*folder.iterdir()] if folder.is_dir() else []


def _locked(folder: Path, *, wait: bool) -> int | None:
    """An open descriptor of the folder, locked; None where nothing can be locked.

    Raises:
        BlockingIOError: Another holds it, and `wait` is not given.
        OSError: It is not there any more.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        if wait:
            return None
        raise
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks: then nobody sweeps there either
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
