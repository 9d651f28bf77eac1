"""Read sets of images into memory: idx files, folders of pictures, npz archives.

It does not know labels or models. Every `read` gives an array (images, channels, height, width).
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from llmos.kernel.errors import BadInput
from llmos.services.data.base import Source, check_exists, source_for

Images = npt.NDArray[Any]

PICTURES = (".png", ".jpg", ".jpeg")

# Types of the idx format by their code (http://yann.lecun.com/exdb/mnist), big-endian.
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_images(path: Path) -> Images:
    """(images, channels, height, width) of uint8 or float32 from `path`. Raises BadInput."""
    check_exists(path)
    images: Images = source_for(path, "images").read(path)
    return images


class IdxSource(Source):
    """The format of MNIST, also gzipped."""

    kind: ClassVar[str] = "images"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        name = path.name.lower().removesuffix(".gz")
        return not path.is_dir() and ("-ubyte" in name or ".idx" in name or "-idx" in name)

    @classmethod
    def read(cls, path: Path) -> Images:
        try:
            with _open(path) as file:
                shape, kind = _idx_header(file, path)
                count = math.prod(shape)
                data = file.read(count * kind.itemsize + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
            raise BadInput(
                f"{path} is not a complete gzip file: {exc}", "download the file again"
            ) from None
        if len(data) != count * kind.itemsize:
            more = len(data) > count * kind.itemsize
            raise BadInput(
                f"{path} is {'longer' if more else 'shorter'} than its header says: {shape}",
                "download the file again",
            )
        return _as_images(np.frombuffer(data, kind).reshape(shape), path)


class PictureFolderSource(Source):
    """A folder of PNG and JPEG files of one size; all gray, or else all as RGB."""

    kind: ClassVar[str] = "images"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.is_dir() or path.suffix.lower() in PICTURES

    @classmethod
    def read(cls, path: Path) -> Images:
        files = [path] if path.is_file() else _pictures(path)
        if not files:
            raise BadInput(f"no PNG or JPEG files in {path}", "put pictures of one size into it")
        pictures = [_picture(file) for file in files]
        mode = "L" if all(p.mode in ("1", "L") for p in pictures) else "RGB"
        for file, picture in zip(files, pictures, strict=True):
            if picture.size != pictures[0].size:
                raise BadInput(
                    f"{file} is {_size(picture)}, {files[0].name} is {_size(pictures[0])}",
                    "bring all pictures to one size first",
                )
        rows = np.stack([np.asarray(p.convert(mode)) for p in pictures])
        return _as_images(rows, path)


class NpzSource(Source):
    """The only, or the first image-like, array of an npz archive."""

    kind: ClassVar[str] = "images"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.suffix.lower() == ".npz"

    @classmethod
    def read(cls, path: Path) -> Images:
        try:
            with np.load(path, allow_pickle=False) as archive:
                for name in archive.files:
                    array = archive[name]
                    if array.ndim in (3, 4) and array.dtype.kind in "buif":
                        return _as_images(array, path)
        except (zipfile.BadZipFile, ValueError, EOFError, OSError, zlib.error) as exc:
            raise BadInput(f"{path} is not an npz archive of numbers: {exc}") from None
        raise BadInput(
            f"{path} has no array of images",
            "it needs one of shape (images, height, width) or with channels",
        )


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _idx_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    head = file.read(4)
    if not head:
        raise BadInput(f"{path} is empty", "download the file again")
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_TYPES:
        raise BadInput(f"{path} is not an idx file: it begins with {head.hex(' ')}")
    sizes = file.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise BadInput(f"{path} ends inside its header", "download the file again")
    return struct.unpack(f">{head[3]}I", sizes), np.dtype(IDX_TYPES[head[2]])


def _pictures(folder: Path) -> list[Path]:
    found = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in PICTURES)
    return [p for p in found if p.is_file() and not p.name.startswith(".")]


def _picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture.copy()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as exc:
        raise BadInput(f"{file} is not a whole picture: {exc}", "remove or replace it") from None


def _size(picture: Image.Image) -> str:
    return f"{picture.size[0]} x {picture.size[1]}"


def _as_images(array: Images, path: Path) -> Images:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) to (N, C, H, W) of uint8 or float32."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise BadInput(
            f"{path} holds an array of shape {array.shape}, not images",
            "images have the shape (images, height, width), with 1 or 3 channels or none",
        )
    kind = np.uint8 if array.dtype.kind in "bu" and array.itemsize == 1 else np.float32
    images = np.ascontiguousarray(array, dtype=kind)
    if kind is np.float32 and not np.isfinite(images).all():
        raise BadInput(f"{path} holds values that are not finite")
    return images
