"""Read a GGUF file: its keys, and where its tensors lie. Knows no model.

The layout (version 2 and 3, little-endian): magic, version, number of tensors, number of keys; the
keys; name, shape, type and offset of each tensor; aligned, the data. The reader of the `gguf`
package takes 2 s for a vocabulary of 50,000 tokens, and trusts the file: here every length is
compared with what is left of the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np

from llmos.kernel.errors import BadInput

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where the key general.alignment does not say otherwise

MOST_DIMENSIONS = 4

# By the number of a value's type: how it is packed. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. `shape` is as numpy has it: the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    type: str  # as ggml calls it: F32, BF16, Q4_1
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Of one row (the last dimension), which is made of whole blocks."""
        return self.nbytes // max(1, prod(self.shape[:-1]))

    @property
    def quantized(self) -> bool:
        return self.type not in ("F64", "F32", "F16", "BF16")


class GgufFile:
    """An open file; the data stay mapped until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise BadInput(f"{path} is not a GGUF file: it begins with other bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            why = getattr(exc, "strerror", None) or exc
            raise BadInput(f"{path} cannot be read: {why}") from None
        self.keys: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        try:
            self._read(_Reader(self._map, path))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._map.close()

    def key(self, name: str, default: Any = None) -> Any:
        """The value of a key. Raises BadInput when there is none and no default."""
        if name in self.keys:
            return self.keys[name]
        if default is None:
            raise BadInput(f"{self.path} has no key {name}: nobody can tell what model it is")
        return default

    def rows(self, tensor: Tensor, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows of a tensor as they are stored: a copy, uint8 [rows, row_bytes]."""
        count = tensor.nbytes // tensor.row_bytes
        stored = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        # Fancy indexing copies: nothing keeps a reference to the map, which can then be closed.
        chosen: np.ndarray[Any, Any] = stored.reshape(count, tensor.row_bytes)[indices]
        return chosen

    def types(self) -> str:
        """The types of its tensors, the most frequent in bytes first: "Q4_1, Q8_0, F32"."""
        total: dict[str, int] = {}
        for tensor in self.tensors.values():
            total[tensor.type] = total.get(tensor.type, 0) + tensor.nbytes
        return ", ".join(sorted(total, key=lambda name: -total[name]))

    def _read(self, reader: _Reader) -> None:
        reader.skip(len(MAGIC))
        version = reader.number("I")
        if version not in VERSIONS:
            raise BadInput(
                f"{self.path} is GGUF version {version}; versions 2 and 3 (little-endian) are read",
                "download a newer file of the model",
            )
        tensor_count, key_count = reader.number("Q"), reader.number("Q")
        for _ in range(key_count):
            name = reader.string()
            self.keys[name] = reader.value(reader.number("I"))
        infos = [self._info(reader) for _ in range(tensor_count)]
        alignment = int(self.keys.get("general.alignment", ALIGNMENT))
        if alignment < 1:
            raise reader.damaged()
        begin = -(-reader.at // alignment) * alignment
        for name, shape, number, offset in infos:
            type_, nbytes = _size(self.path, name, shape, number)
            if begin + offset + nbytes > len(self._map):
                raise BadInput(
                    f"{self.path} is cut off: {name} goes beyond its end", "download it again"
                )
            self.tensors[name] = Tensor(name, shape, type_, begin + offset, nbytes)

    def _info(self, reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = reader.string(), reader.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise reader.damaged()
        shape = tuple(reader.number("Q") for _ in range(dimensions))
        return name, shape[::-1], reader.number("I"), reader.number("Q")


def _size(path: Path, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
    """-> the type's name, and how many bytes a tensor of it takes. Raises BadInput."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise BadInput(
            f"{path}: {name} is of ggml type {number}, which the installed gguf does not know",
            "`pip install -U gguf` may know it",
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block or not all(shape):
        raise BadInput(f"{path} is damaged: {name} has the shape {shape}", "download it again")
    return kind.name, prod(shape) // block * block_bytes


class _Reader:
    """A place in the header that moves forward. Every read is checked against the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._end = data, path, len(data)
        self.at = 0

    def damaged(self) -> BadInput:
        return BadInput(
            f"{self._path} is cut off or damaged at byte {self.at} of {self._end}",
            "download it again",
        )

    def skip(self, count: int) -> int:
        """Move on -> where that began."""
        if count > self._end - self.at:
            raise self.damaged()
        began, self.at = self.at, self.at + count
        return began

    def number(self, form: str) -> Any:
        packed = struct.Struct("<" + form)
        return packed.unpack_from(self._data, self.skip(packed.size))[0]

    def string(self) -> str:
        length = self.number("Q")
        began = self.skip(length)
        # A token of a damaged vocabulary; it is caught where tokens are looked at.
        return self._data[began : began + length].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged()
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            packed = struct.Struct(f"<{_SCALARS[inner]}")
            if count > (self._end - self.at) // packed.size:
                raise self.damaged()
            began = self.skip(count * packed.size)
            return list(struct.unpack_from(f"<{count}{_SCALARS[inner]}", self._data, began))
        if inner not in (_STRING, _ARRAY) or count > (self._end - self.at) // 8:
            raise self.damaged()
        return [self.value(inner) for _ in range(count)]
