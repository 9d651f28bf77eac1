"""Read text files: plain text and JSON lines, each also compressed with gzip.

It does not know tokens or models.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from llmos.kernel.errors import BadInput
from llmos.services.data.base import Dialogue, Document, Source

# Text is handed on in pieces of about this size, so that a file larger than memory can be read.
PIECE_BYTES = 1 << 20

# Names of the two sides of a pair, in the order in which they are looked for.
PAIRS = (
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)


class TextSource(Source):
    """A plain text file: one document."""

    kind: ClassVar[str] = "text"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return _plain_name(path).endswith(".txt")

    @classmethod
    def read(cls, path: Path) -> Iterator[Document | Dialogue]:
        """Pieces of the text, cut at the ends of lines. Raises BadInput."""
        held = ""
        for text in _decoded(path):
            whole, newline, rest = (held + text).rpartition("\n")
            if newline:
                yield Document(whole + newline, ends=False)
            held = rest if newline else held + text
        yield Document(held)


class JsonlSource(Source):
    """JSON lines: rows with a text, or with a prompt and its answer."""

    kind: ClassVar[str] = "text"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return _plain_name(path).endswith(".jsonl")

    @classmethod
    def read(cls, path: Path) -> Iterator[Document | Dialogue]:
        """One record a row; empty lines are left out. Raises BadInput with the line's number."""
        held, number = "", 0
        for text in _decoded(path):
            *lines, held = (held + text).split("\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield _record(line, path, number)
        if held.strip():
            yield _record(held, path, number + 1)


def _plain_name(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(".gz")


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in pieces; the place of a wrong byte is counted in the plain text."""
    held, offset, seen = b"", 0, 0
    try:
        with _open(path) as file:
            while data := file.read(PIECE_BYTES):
                seen += len(data)
                held += data
                text, used = _decode(held, offset, path, final=False)
                held, offset = held[used:], offset + used
                # A byte order mark is a mark, not text.
                yield text.removeprefix("\ufeff") if offset == used else text
    except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
        raise BadInput(
            f"{path} is not a complete gzip file: {exc}", "copy or compress the file again"
        ) from None
    except PermissionError:
        raise BadInput(f"no permission to read {path}", "check its mode with `ls -l`") from None
    _decode(held, offset, path, final=True)
    if not seen:
        raise BadInput(f"{path} is empty", "give a file with text in it")


def _decode(data: bytes, offset: int, path: Path, *, final: bool) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as exc:
        raise BadInput(
            f"{path} is not UTF-8: byte {offset + exc.start} is 0x{data[exc.start]:02x}",
            "convert it first, for example: iconv -f latin1 -t utf-8 OLD > NEW",
        ) from None


def _record(line: str, path: Path, number: int) -> Document | Dialogue:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise BadInput(
            f"{path}, line {number} is not JSON: {exc}", "each line is one object"
        ) from None
    if isinstance(row, str):
        return Document(row)
    if not isinstance(row, dict):
        raise BadInput(f"{path}, line {number}: a row is an object, not {type(row).__name__}")
    if "messages" in row:
        return Dialogue(_turns(row["messages"], path, number))
    for ask, reply in PAIRS:
        if isinstance(row.get(ask), str) and isinstance(row.get(reply), str):
            extra = row.get("input") if ask == "instruction" else None
            prompt = f"{row[ask]}\n{extra}" if isinstance(extra, str) and extra else row[ask]
            return Dialogue((("user", prompt), ("assistant", row[reply])))
    return Document(_only_text(row, path, number))


def _turns(messages: Any, path: Path, number: int) -> tuple[tuple[str, str], ...]:
    turns = []
    for message in messages if isinstance(messages, list) else [None]:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise BadInput(
                f"{path}, line {number}: messages is a list of objects with role and content",
                "role is system, user or assistant; content is a string",
            )
        turns.append((role, content))
    if not any(role == "assistant" for role, _ in turns):
        raise BadInput(f"{path}, line {number}: messages has no turn of the assistant")
    return tuple(turns)


def _only_text(row: dict[str, Any], path: Path, number: int) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return str(row[strings[0]])
    raise BadInput(
        f"{path}, line {number} has {len(strings) or 'no'} string fields "
        f"({', '.join(list(row)[:8]) or 'none'}), and none is called text",
        "name the field `text`, or give pairs as prompt/answer or messages",
    )
