"""Files that hold samples: finding them, and reading arrays and pictures one at a time."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from onnxq.errors import CalibrationError, UnreadableError
from onnxq.files import check_regular
from onnxq.limits import memory

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["KINDS", "Stored", "find", "read_npy", "read_npz", "read_pb", "read_picture", "spread"]

Kind = Literal[".npz", ".npy", ".pb", "pictures"]

_PICTURES = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
# Suffix -> what the file holds; .pb files count by folder.
KINDS: dict[str, Kind] = {".npz": ".npz", ".npy": ".npy"}
KINDS |= dict.fromkeys(_PICTURES, "pictures")
# Pillow goes by content, not by name, and some of its readers start other programs: only these.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# An archive that claims to hold more is taken for a mistake or an attack.
LARGEST_NPZ = 8 << 30  # bytes
_MOST_ARRAYS = 1_000  # of an archive: inputs of a model
_LONGEST_HEADER = 10_000  # bytes, as numpy has it
# What the readers of numpy, zipfile and Pillow raise on damaged files.
_DAMAGE = (
    *(OSError, ValueError, EOFError, LookupError, SyntaxError, RuntimeError, NotImplementedError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


# ---------------------------------------------------------------------- finding


def find(path: Path, *, pictures: bool) -> tuple[Kind, list[Path]]:
    """The files of samples in a folder and the folders in it, in natural order.

    Links to files are followed, links to folders are not; hidden files are left out.

    Args:
        path: The folder.
        pictures: Whether pictures are wanted where there are other files, too.

    Returns:
        What the samples are, and one path for each: a file, or the folder of its ``input_*.pb``.

    Raises:
        CalibrationError: There is no sample, or it is not clear which files are samples.
    """
    found: dict[Kind, list[Path]] = {}
    names: list[str] = []
    for folder, below, files in os.walk(path, onerror=_raise):
        below[:] = [b for b in below if not b.startswith(".")]
        visible = [f for f in files if not f.startswith(".")]
        names += visible
        if any(map(_is_input, visible)):
            found.setdefault(".pb", []).append(Path(folder))
        for name in visible:
            if kind := KINDS.get(os.path.splitext(name)[1].lower()):
                found.setdefault(kind, []).append(Path(folder, name))
    if pictures and "pictures" in found:
        found = {"pictures": found["pictures"]}
    if len(found) > 1:
        holds = " and ".join(f"{len(f)} {k}" for k, f in sorted(found.items()))
        raise CalibrationError(
            f"the folder holds samples of several kinds: {holds}",
            where=path,
            fix="keep one kind in it; pictures are taken where preprocessing is given",
        )
    for kind, paths in found.items():
        return kind, sorted(paths, key=lambda p: natural(p.relative_to(path)))
    counts = Counter(os.path.splitext(n)[1].lower() or n for n in names).most_common(5)
    holds = "holds only " + ", ".join(f"{n} {s}" for s, n in counts) if counts else "is empty"
    raise CalibrationError(
        f"the folder {holds}", where=path, fix="put .npz, .npy, pictures or test_data_set_* there"
    )


def natural(path: Path) -> tuple[Any, ...]:
    """A sort key by which 9.npz comes before 10.npz."""
    stem = path.with_suffix("") if path.suffix else path  # so that a.npy comes before a2.npy
    split = (re.split(r"(\d+)", part.lower()) for part in stem.parts)
    parts = (tuple(int(t) if i % 2 else t for i, t in enumerate(tokens)) for tokens in split)
    return tuple(parts), str(path)


def spread(items: Sequence[Path], limit: int | None) -> list[Path]:
    """At most so many of the items, evenly spread: sorted by class, each class keeps its share."""
    n = len(items)
    if limit is None or limit >= n:
        return list(items)
    return [items[i * n // limit] for i in range(limit)]


def _is_input(name: str) -> bool:
    return re.fullmatch(r"input_\d+\.pb", name) is not None


def _raise(error: OSError) -> None:
    raise CalibrationError(
        f"the folder cannot be read: {error.strerror}", where=error.filename
    ) from error


@contextmanager
def _reading(where: object) -> Iterator[None]:
    """Turn what a damaged file raises into one line."""
    try:
        yield
    except _DAMAGE as error:
        says = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableError(
            f"the file cannot be read: {says}", where=where, fix="copy or save it again"
        ) from error


# ---------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Stored:
    """An array in a .npy file or a .npz archive, of which only the header has been read.

    Args:
        path: The file.
        member: Its name in the archive; None for a .npy file.
        shape: Sizes of the array.
        dtype: Its element type.
        fortran: Whether the first axis varies fastest.
        offset: Where the values start, in bytes.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    def read(self) -> np.ndarray:
        """The whole array: mapped from a .npy file, read from an archive."""
        order: Literal["F", "C"] = "F" if self.fortran else "C"
        if 0 in self.shape:  # cannot be mapped
            return np.empty(self.shape, self.dtype)
        if self.member is not None and math.prod(self.shape) * self.dtype.itemsize > memory():
            raise CalibrationError(
                "the array is larger than memory", where=self.where, fix="save it as .npy"
            )
        with _reading(self.where):
            if self.member is None:
                mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)
                return np.asarray(mapped)
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                file.read(self.offset)
                return self._values(file, self.shape, order)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """So many entries of the first axis at a time, from the first on; the rest is left out.

        Memory stays at one block, but for an archive's arrays in Fortran order.
        """
        count = self.shape[0] // rows
        if self.member is None or self.fortran:
            whole = self.read()
            yield from (whole[i * rows : (i + 1) * rows] for i in range(count))
            return
        with _reading(self.where):
            archive = zipfile.ZipFile(self.path)
        with archive:
            with _reading(self.where):
                file = archive.open(self.member)
                file.read(self.offset)
            for _ in range(count):
                with _reading(self.where):
                    block = self._values(file, (rows, *self.shape[1:]), "C")
                yield block

    @property
    def where(self) -> str:
        """The file, and the array in it."""
        return _where(self.path, self.member)

    def _values(
        self, file: IO[bytes], shape: tuple[int, ...], order: Literal["F", "C"]
    ) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        data = file.read(size)
        if len(data) < size:
            raise EOFError("it is cut off")
        return np.frombuffer(data, self.dtype).reshape(shape, order=order)


def read_npy(path: Path) -> Stored:
    """The array of a .npy file.

    Raises:
        UnreadableError: The file is damaged, or holds Python objects.
    """
    with _reading(path):
        size = check_regular(path)
        with open(path, "rb") as file:
            return _header(file, path, None, size)


def read_npz(path: Path, largest: int | None = None) -> dict[str, Stored]:
    """The arrays of a .npz archive by name.

    Args:
        path: The archive.
        largest: Bytes that it may hold, unpacked; None: `LARGEST_NPZ`.

    Raises:
        UnreadableError: The file is damaged, claims to be huge, or holds Python objects.
    """
    arrays = {}
    with _reading(path):
        check_regular(path)
    with _reading(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if largest is None and len(members) > _MOST_ARRAYS:
            raise ValueError(f"it holds {len(members):,} arrays")
        claimed = sum(m.file_size for m in members)
        if claimed > (largest := LARGEST_NPZ if largest is None else largest):
            raise UnreadableError(
                f"the archive claims {claimed / 2**30:.0f} GiB, more than {largest >> 30}",
                where=path,
                fix="save it as .npy, or as one .npz per sample",
            )
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("it is compressed in a way that numpy does not use")
            with archive.open(member) as file:
                name = member.filename.removesuffix(".npy")
                arrays[name] = _header(file, path, member.filename, member.file_size)
    if not arrays:
        raise UnreadableError("the archive holds no arrays", where=path)
    return arrays


def _header(file: IO[bytes], path: Path, member: str | None, size: int) -> Stored:
    where = _where(path, member)
    start = file.read(len(np.lib.format.MAGIC_PREFIX))
    if start != np.lib.format.MAGIC_PREFIX:
        if start[:1] == b"\x80":
            raise _pickled(where)
        what = "an array in numpy's format" if start else "an array: it is empty"
        raise UnreadableError(f"the file does not hold {what}", where=where)
    version = tuple(file.read(2))
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of numpy's format")
    first = version == (1, 0)
    reader = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    length = file.read(2 if first else 4)
    if int.from_bytes(length, "little") > _LONGEST_HEADER:  # numpy would read it first
        raise ValueError("its header is too long")
    header = io.BytesIO(length + file.read(int.from_bytes(length, "little")))
    try:
        shape, fortran, dtype = reader(header)
    except MemoryError as error:  # of Python's parser: brackets or signs in each other
        raise ValueError("its header is nested too deeply") from error
    if dtype.hasobject:
        raise _pickled(where)
    if dtype.itemsize == 0 or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"it has no valid shape: {shape} of {dtype}")
    offset = len(start) + len(version) + header.tell()
    values = math.prod(shape) * dtype.itemsize
    if offset + values > size:
        raise ValueError(f"it is cut off: wanted {values} bytes of values")
    return Stored(path, member, shape, dtype, fortran, offset)


def _pickled(where: str) -> UnreadableError:
    return UnreadableError(
        "holds pickled Python objects, which are never loaded",
        where=where,
        fix="save plain arrays: np.savez(path, name=array)",
    )


def _where(path: Path, member: str | None) -> str:
    return os.fspath(path) if member is None else f"{member.removesuffix('.npy')!r} in {path}"


def read_pb(folder: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The sample of a folder of onnxruntime's ``input_*.pb`` files.

    Args:
        folder: The folder.
        names: Inputs of the model. Tensors are told by their names where these are the model's,
            by the numbers of their files otherwise.

    Raises:
        UnreadableError: A file is damaged or no tensor.
        CalibrationError: There are more than inputs.
    """
    from google.protobuf.message import DecodeError
    from onnx import TensorProto, numpy_helper

    files = sorted((f for f in folder.iterdir() if _is_input(f.name)), key=natural)
    tensors: list[tuple[str, np.ndarray]] = []
    for file in files:
        try:
            with _reading(file):
                check_regular(file)
                proto = TensorProto.FromString(file.read_bytes())
                if proto.data_location == TensorProto.EXTERNAL:
                    raise ValueError("its data lies in another file")
                tensors.append((proto.name, numpy_helper.to_array(proto)))
        except (DecodeError, TypeError, AssertionError) as error:
            raise UnreadableError("the file does not hold a tensor", where=file) from error
    given = [name for name, _ in tensors]
    if len(set(given)) == len(given) and set(given) <= set(names):
        return dict(tensors)
    if len(tensors) > len(names):
        raise CalibrationError(
            f"wanted input files: {len(names)} at most, got {len(tensors)}", where=folder
        )
    return {name: array for name, (_, array) in zip(names, tensors, strict=False)}


# ---------------------------------------------------------------------- pictures


def read_picture(
    picture: str | os.PathLike[str] | Image.Image, mode: Literal["RGB", "L"], where: str
) -> Image.Image:
    """A picture, upright, in 8 bits per channel.

    Raises:
        UnreadableError: It cannot be read, or is larger than Pillow's limit.
        CalibrationError: Its pixels are floats.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(picture, Image.Image):
                return _eight_bit(ImageOps.exif_transpose(picture), mode, where)
            check_regular(picture)
            with Image.open(picture, formats=_FORMATS) as image:
                return _eight_bit(ImageOps.exif_transpose(image), mode, where)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = f"{Image.MAX_IMAGE_PIXELS or 0:,}"
        raise UnreadableError(
            f"the picture has more than {pixels} pixels", where=where, fix="make it smaller"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, UnidentifiedImageError):
            what = "the file is not a picture that can be read"
        else:
            what = f"the picture cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UnreadableError(what, where=where, fix="remove or replace it") from error


def _eight_bit(image: Image.Image, mode: Literal["RGB", "L"], where: str) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise CalibrationError(
            "pixels are floats of unknown range", where=where, fix="save it with 8 bits, or .npz"
        )
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # the way through which Pillow keeps a transparent palette
    return image.convert(mode)
