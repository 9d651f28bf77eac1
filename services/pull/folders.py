"""A model folder that lies on this machine, or in the hub's cache: which files make the model, and
how they come into the home."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

from llmos.kernel.errors import BadInput
from llmos.services.pull.progress import Progress
from llmos.services.pull.staging import MIB, check_room

COPY_BYTES = 4 * MIB

# What belongs to a model. Never a pickle or code: both could run when they are loaded.
WANTED = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "LICENSE*", "README.md",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")

# A safetensors header is refused above this size by the format's own library.
MAX_HEADER_BYTES = 100_000_000


def model_files(names: list[str]) -> list[str]:
    """Those of a folder's files that a model needs: at the top, and weights in one form only."""
    from fnmatch import fnmatch

    found = [n for n in names if "/" not in n and any(fnmatch(n, w) for w in WANTED)]
    ours = [
        n for n in found
        if n == "model.safetensors" or fnmatch(n, "model-*-of-*.safetensors")
    ]  # fmt: skip
    if ours:  # not the same weights once more, as their authors' own code has them
        found = [n for n in found if not n.endswith(".safetensors") or n in ours]
    return sorted(found)


def kind_of(names: list[str], where: str) -> str:
    """What kind of model these files make. Raises BadInput where they make none."""
    weights = [n for n in names if n.endswith(".safetensors")]
    if "adapter_config.json" in names and "adapter_model.safetensors" in names:
        return "adapter"
    if {"config.json", "generator.safetensors", "discriminator.safetensors"} <= set(names):
        return "gan"
    if "config.json" not in names:
        raise BadInput(f"{where} is no model: it has no config.json",
                       "a folder that `save_pretrained` wrote has one")  # fmt: skip
    if not weights:
        raise no_safetensors(where, names)
    if not {"tokenizer.json", "tokenizer_config.json"} & set(names):
        raise BadInput(f"{where} has no tokenizer", "save it with `tokenizer.save_pretrained`")
    return "causal-lm"


def no_safetensors(where: str, names: list[str]) -> BadInput:
    from fnmatch import fnmatch

    pickles = [n for n in names if any(fnmatch(n, p) for p in PICKLES)]
    if pickles:
        return BadInput(
            f"{where} has its weights as {pickles[0]} only, which can run code when it is loaded",
            "convert it with `save_pretrained` where you trust it, and pull that folder",
        )
    return BadInput(f"{where} has no .safetensors file")


def check_safetensors(path: Path) -> None:
    """Raise BadInput when a file is not as long as its own header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise BadInput(f"{path} is no safetensors file, or is cut off", "fetch it again")
        try:
            header = json.loads(file.read(length))
            ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise BadInput(f"{path} has a broken header", "fetch it again") from None
    told = 8 + length + max(ends, default=0)
    if size != told:
        raise BadInput(
            f"{path} has {size:,} bytes where its header says {told:,}",
            "fetch it again",
        )


def copy_folder(source: Path, target: Path, progress: Progress) -> tuple[str, str]:
    """Copy a model into the empty folder `target` -> its kind, and a checksum of all files.

    What is copied is read back: a bad disk or memory shows here, and not in the answers.
    """
    everything = [p.name for p in source.iterdir() if p.is_file()]
    names = model_files(everything)
    kind = kind_of([*names, *(n for n in everything if n not in names)], str(source))
    total = sum((source / n).stat().st_size for n in names)
    check_room(target, total, source.name)
    for name in names:
        if name.endswith(".safetensors"):
            check_safetensors(source / name)
    progress.begin(f"copying {source}", 2 * total)
    whole = hashlib.sha256()
    for name in names:
        digest = copy_file(source / name, target / name, progress)
        if digest_of(target / name, progress) != digest:
            raise BadInput(f"the copy of {source / name} is not what was read", "is the disk well?")
        whole.update(f"{digest}  {name}\n".encode())
    return kind, whole.hexdigest()


def copy_file(source: Path, target: Path, progress: Progress) -> str:
    """-> the SHA-256 of what was read."""
    found = hashlib.sha256()
    with source.open("rb") as file, target.open("wb") as out:
        while piece := file.read(COPY_BYTES):
            found.update(piece)
            out.write(piece)
            progress.add(len(piece))
        out.flush()
        os.fsync(out.fileno())
        # Else the read that checks it would come from memory.
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return found.hexdigest()


def digest_of(path: Path, progress: Progress) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(COPY_BYTES):
            found.update(piece)
            progress.add(len(piece))
    return found.hexdigest()


def folder_digest(folder: Path, progress: Progress) -> str:
    """The checksum that `copy_folder` would return."""
    whole = hashlib.sha256()
    for name in model_files([p.name for p in folder.iterdir() if p.is_file()]):
        whole.update(f"{digest_of(folder / name, progress)}  {name}\n".encode())
    return whole.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name where that is possible: no room is taken twice."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(real, target)
