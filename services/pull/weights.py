"""Write the tensors of a GGUF file as safetensors, a few rows at a time.

Without torch: the format is a header and the bytes, and bfloat16 is the upper half of a float32.
A model of any size takes some hundred megabytes of memory to convert.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmos.kernel.errors import BadInput
from llmos.services.pull.gguf_file import GgufFile, Tensor
from llmos.services.pull.gguf_model import names_of, row_order

# Larger models are written into several files, as their authors do it.
SHARD_BYTES = 5 * 10**9

# So many numbers are converted at once: in 32 bits they are 16 MiB.
NUMBERS_AT_ONCE = 1 << 22

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}


@dataclass(frozen=True)
class Shard:
    """One file, and the tensors in it: their name in the model, where they come from."""

    name: str
    tensors: tuple[tuple[str, Tensor], ...]


def choose_dtype(file: GgufFile) -> str:
    """The type that holds the weights as they are; quantized ones are rounded to bfloat16, whose
    error is far below that of the quantization."""
    matrices = [t for t in file.tensors.values() if len(t.shape) > 1]
    types = {t.type for t in matrices}
    if types <= {"F32", "F64"}:
        return "float32"
    return "float16" if types <= {"F16"} else "bfloat16"


def size_of(file: GgufFile, dtype: str) -> int:
    """Bytes that `write_weights` is going to write, but for the headers."""
    return DTYPES[dtype][1] * sum(prod(file.tensors[name].shape) for name in names_of(file))


def write_weights(
    file: GgufFile, folder: Path, dtype: str, wrote: Callable[[int], None] = lambda n: None
) -> None:
    """`wrote` is told of every piece, in bytes. Raises BadInput for values that are no numbers."""
    shards = _plan(file, dtype, SHARD_BYTES)
    for shard in shards:
        with (folder / shard.name).open("wb") as out:
            _write_header(out, shard, dtype)
            for _, tensor in shard.tensors:
                for piece in _pieces(file, tensor, dtype):
                    out.write(piece)
                    wrote(len(piece))
    if len(shards) > 1:
        where = {name: s.name for s in shards for name, _ in s.tensors}
        index = {"metadata": {"total_size": size_of(file, dtype)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _plan(file: GgufFile, dtype: str, shard_bytes: int) -> list[Shard]:
    names, size = names_of(file), DTYPES[dtype][1]
    parts: list[list[tuple[str, Tensor]]] = [[]]
    filled = 0
    for old, new in names.items():
        tensor = file.tensors[old]
        nbytes = size * prod(tensor.shape)
        if parts[-1] and filled + nbytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append((new, tensor))
        filled += nbytes
    if len(parts) == 1:
        return [Shard("model.safetensors", tuple(parts[0]))]
    return [
        Shard(f"model-{n:05d}-of-{len(parts):05d}.safetensors", tuple(part))
        for n, part in enumerate(parts, 1)
    ]


def _write_header(out: BinaryIO, shard: Shard, dtype: str) -> None:
    kind, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in shard.tensors:
        end = at + size * prod(tensor.shape)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    out.write(len(text).to_bytes(8, "little") + text)


def _pieces(file: GgufFile, tensor: Tensor, dtype: str) -> Iterator[bytes]:
    order = row_order(file, tensor)
    at_once = max(1, NUMBERS_AT_ONCE // tensor.shape[-1])
    for at in range(0, len(order), at_once):
        numbers = numbers_of(file, tensor, order[at : at + at_once])
        yield packed(numbers, dtype)


def numbers_of(file: GgufFile, tensor: Tensor, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Some rows as float32 [rows, columns]. Raises BadInput."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = file.rows(tensor, rows)
    if tensor.type == "F64":
        numbers = stored.view(np.float64).astype(np.float32)
    else:
        try:
            numbers = dequantize(stored, GGMLQuantizationType[tensor.type])
        except NotImplementedError:
            raise BadInput(
                f"{file.path.name}: {tensor.name} is {tensor.type}, which gguf cannot unpack",
                "pull another file of the model, such as Q8_0 or F16",
            ) from None
    if not np.isfinite(numbers).all():
        raise BadInput(
            f"{file.path.name} is damaged: {tensor.name} has values that are no numbers",
            "download it again",
        )
    return np.ascontiguousarray(numbers, np.float32)


def packed(numbers: np.ndarray[Any, Any], dtype: str) -> bytes:
    """float32 -> the bytes of a type, rounded to the nearest (ties to even)."""
    if dtype == "bfloat16":
        bits = numbers.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype("<u2").tobytes()
    return numbers.astype("<f2" if dtype == "float16" else "<f4").tobytes()
