"""What a source of data is, and how the source for a path is found.

It does not know any file format: formats are classes behind the entry point group
`llmos.sources`, ours and a plugin's alike.

    class CsvText(Source):
        kind = "text"

        @classmethod
        def accepts(cls, path: Path) -> bool:
            return path.suffix == ".csv"

        @classmethod
        def read(cls, path: Path) -> Iterator[Document | Dialogue]:
            ...
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmos.kernel.errors import BadInput

GROUP = "llmos.sources"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A piece of text. `ends` is False where the next piece continues the same document."""

    text: str
    ends: bool = True


@dataclass(frozen=True)
class Dialogue:
    """Turns of a conversation as (role, content); roles are system, user, assistant."""

    turns: tuple[tuple[str, str], ...]


class Source:
    """Base of all sources.

    `kind` says what `read` gives: "text": an iterator of Document or Dialogue;
    "images": an array (images, channels, height, width) of uint8 or float32.
    `accepts` looks at the name only, and must be quick. `read` raises BadInput.
    """

    kind: ClassVar[str]

    @classmethod
    def accepts(cls, path: Path) -> bool:
        raise NotImplementedError

    @classmethod
    def read(cls, path: Path) -> Any:
        raise NotImplementedError


@functools.cache
def sources(kind: str) -> tuple[type[Source], ...]:
    """Every installed source of a kind, in the order of their names.

    One that cannot be imported is reported in the log: it must not take the others with it.
    """
    found: list[type[Source]] = []
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        try:
            source: type[Source] = entry.load()
        except Exception as exc:  # noqa: BLE001  (a plugin's code raises what it likes)
            log.warning("the source %s cannot be loaded: %s", entry.value, exc)
            continue
        if source.kind == kind:
            found.append(source)
    return tuple(found)


def source_for(path: Path, kind: str) -> type[Source]:
    """The source that reads this file or folder. Raises BadInput."""
    for source in sources(kind):
        if source.accepts(path):
            return source
    raise BadInput(
        f"{path} is not {'text' if kind == 'text' else 'a set of images'} that can be read",
        {
            "text": "give .txt or .jsonl files (each also .gz), or a folder of them",
            "images": "give an idx file (also .gz), a folder of PNG or JPEG files, or .npz",
        }.get(kind, ""),
    )


def check_exists(path: Path) -> None:
    """Raise BadInput when `path` is not there or cannot be read."""
    if not path.exists():
        raise BadInput(f"no such file or folder: {path}", "check the path")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise BadInput(f"no permission to read {path}", "check the owner and mode with `ls -l`")


def text_files(path: Path) -> list[tuple[Path, type[Source]]]:
    """The text files at `path` with the source of each, in a fixed order. Raises BadInput.

    In a folder, files that no source accepts are left out; hidden ones too.
    """
    check_exists(path)
    if path.is_file():
        return [(path, source_for(path, "text"))]
    known = sources("text")
    found = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            found += [(file, s) for s in known if s.accepts(file)][:1]
    if not found:
        raise BadInput(
            f"no text files in {path}", "put .txt or .jsonl files (each also .gz) into it"
        )
    return found


def read_text(path: Path) -> Iterator[Document | Dialogue]:
    """Everything at `path`, file after file. Raises BadInput, also while it is read."""
    empty = True
    for file, source in text_files(path):
        check_exists(file)
        for record in source.read(file):
            empty = False
            yield record
    if empty:
        raise BadInput(f"{path} is empty", "give a file with text in it")
