"""Downloads that go on where they broke off, and are checked."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from onnxq.errors import OnnxqError
from onnxq.progress import Progress

__all__ = ["download", "file_sha256"]

# Seconds without a byte after which a connection counts as broken off.
TIMEOUT_S = 30.0
# Times in a row that a connection may break off without having brought anything.
ATTEMPTS = 3
_CHUNK = 1 << 16
_AGAIN = "start the command again: it goes on where this broke off"


def download(url: str, path: Path, sha256: str, progress: Progress) -> None:
    """Fetch a file by HTTP and check it; what breaks off is taken up again, also by a later call.

    What has arrived lies in `PATH.part` until it is whole and right.

    Args:
        url: Of http or https.
        path: Where it goes; folders above it are made.
        sha256: What it has to be, in hexadecimal.
        progress: Where progress is shown.

    Raises:
        OnnxqError: The server cannot be reached, has no such file or another one; or the file
            cannot be written.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise OnnxqError("is no address of http or https", where=url, fix="give one")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists()
        _fetch(url, part, progress)
        if (found := file_sha256(part)) != sha256 and resumed:  # begun with another file
            part.unlink()
            _fetch(url, part, progress)
            found = file_sha256(part)
        if found != sha256:
            part.unlink()
            raise OnnxqError(
                f"the server gives another file: its checksum is {found[:12]}..., not"
                f" {sha256[:12]}...",
                where=url,
                fix="take another server",
            )
        os.replace(part, path)
    except (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as e:
        reason = getattr(e, "reason", None) or e
        raise OnnxqError(f"cannot be fetched: {reason}", where=url, fix=_AGAIN) from e
    except OSError as error:
        raise OnnxqError(
            f"cannot be written: {error.strerror}",
            where=part,
            fix="check the folder's permissions and the space on the disk",
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, part: Path, progress: Progress) -> None:
    """Append to a file until it is whole."""
    idle = 0
    with progress.task(f"fetch {url.rpartition('/')[2]}", None) as advance:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if _append(url, part, before, advance):
                    return
            except (http.client.HTTPException, ConnectionError, TimeoutError):
                if idle + 1 == ATTEMPTS:
                    raise
            gained = part.exists() and part.stat().st_size > before
            idle = 0 if gained else idle + 1
            if idle == ATTEMPTS:
                raise ConnectionError("the server breaks off again and again")


def _append(url: str, part: Path, start: int, advance: Callable[[int], None]) -> bool:
    """Ask for what is missing from `start` on; whether that is all now."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            whole = response.status == 200  # no part, as servers may
            length = response.headers.get("Content-Length")
            got = 0
            with part.open("wb" if whole else "ab") as file:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    advance(len(chunk))
                    got += len(chunk)
            return length is None or got == int(length)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416:
                raise
        # nothing is missing behind the end; or the file there is a shorter one, which its
        # checksum will tell
        return True
