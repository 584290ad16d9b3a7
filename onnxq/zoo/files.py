"""Files of the zoo: they are what they should be, or are fetched, or it is said what is missing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import quote

from onnxq.errors import OnnxqError
from onnxq.progress import Progress
from onnxq.zoo.catalog import Data, Entry
from onnxq.zoo.download import download, file_sha256

__all__ = ["LIST", "SCRIPTS", "cache_folder", "check", "digest", "fetch", "made"]

# The checksums of a folder's files, by which a server says what there is to fetch.
LIST = "SHA256SUMS"
# The scripts of the folder, as the expected scores were measured with.
SCRIPTS = {
    "calib.py": "3402b8db9586874afd0249025cc07f74907ad2e585333475076b5065b3822e0c",
    "eval.py": "1b8f459199bceff1af49ff2ae05e4cb7608620bd299596147468e5159e255e4b",
}


def cache_folder() -> Path:
    """Where the zoo is kept that is downloaded: below XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "onnxq" / "zoo"


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the list of its files.

    The list is what `LC_ALL=C sha256sum *` writes, folders left out.

    Raises:
        OnnxqError: It cannot be read.
    """
    try:
        if not path.is_dir():
            return file_sha256(path)
        return hashlib.sha256(_listed(path).encode()).hexdigest()
    except OSError as error:
        raise OnnxqError(f"cannot be read: {error.strerror}", where=path) from error


def check(entry: Entry, folder: Path, *parts: Data) -> Path:
    """The float model, known by its checksum to be the entry's; data are checked alike.

    Args:
        entry: The entry.
        folder: The folder of the zoo.
        *parts: Its data that are needed.

    Raises:
        OnnxqError: Something is missing or differs; says what to fetch from where.
    """
    source = folder / entry.model.file
    origin = f"{entry.model.repository} : {entry.model.path}"
    _check(source, entry.model.sha256, f"the model was made from {origin}")
    for part in parts:
        _check(folder / part.path, part.sha256, f"it holds {part.what}, from {part.source}")
        script = folder / part.command[0]
        if not script.is_file():
            raise _missing(script, "the folder of the zoo brings it")
    return source


def fetch(entry: Entry, folder: Path, address: str, progress: Progress, *parts: Data) -> None:
    """Download into a folder what it lacks of an entry; files that are there are left alone.

    Args:
        entry: The entry.
        folder: The folder of the zoo.
        address: Of a copy of such a folder, by HTTP.
        progress: Where progress is shown.
        *parts: Its data that are needed.

    Raises:
        OnnxqError: The server has not what it should, or the folder cannot be written.
    """
    base = address.rstrip("/")
    wanted = {entry.model.file: entry.model.sha256}
    for part in parts:
        wanted |= SCRIPTS  # all: they import one another
        path = folder / part.path
        if path.exists() and digest(path) == part.sha256:
            continue
        if path.suffix:  # a file
            wanted[part.path] = part.sha256
            continue
        listed = path / LIST
        if not listed.exists() or digest(listed) != part.sha256:
            download(f"{base}/{quote(part.path)}/{LIST}", listed, part.sha256, progress)
        for line in listed.read_text(encoding="utf-8").splitlines():
            sha, _, name = line.partition("  ")
            wanted[f"{part.path}/{name}"] = sha
    for name, sha in wanted.items():
        if not (folder / name).exists():
            download(f"{base}/{quote(name)}", folder / name, sha, progress)


def made(folder: Path) -> Path:
    """A folder for results, made if need be.

    Raises:
        OnnxqError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxqError(
            f"cannot be made: {error.strerror}", where=folder, fix="name another folder with --to"
        ) from error
    return folder


def _check(path: Path, sha256: str, origin: str) -> None:
    if not path.exists():
        raise _missing(path, origin)
    if (found := digest(path)) != sha256:
        raise OnnxqError(
            f"its checksum is {found[:12]}..., not {sha256[:12]}... as it should",
            where=path,
            fix=f"{origin}; fetch it again",
        )


def _missing(path: Path, origin: str) -> OnnxqError:
    return OnnxqError(
        "is missing", where=path, fix=f"{origin}; put it there, or take --download URL"
    )


def _listed(folder: Path) -> str:
    names = sorted(
        f.name for f in folder.iterdir() if f.is_file() and f.name[0] != "." and f.name != LIST
    )
    return "".join(f"{digest(folder / name)}  {name}\n" for name in names)
