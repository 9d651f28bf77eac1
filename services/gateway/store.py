"""What the gateway keeps: objects as JSON files, each in a folder with what belongs to it.

    HOME/gateway/files/ID/object.json, content
    HOME/gateway/batches/ID/object.json, output.jsonl, errors.jsonl

Written aside, synced, renamed. What one user's key has made, another's does not find.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from llmos.services.gateway.errors import ApiError, bad, not_found
from llmos.services.gateway.run import Whose

Record = dict[str, Any]

_ID = re.compile(r"[a-z]+[-_][0-9a-f]{24}")
_OBJECT = "object.json"

MOST_LISTED = 100


class Store:
    """One kind of objects. Every one has `id` and `created_at`; `owner` is not shown."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        self._what = what
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, name: str, file: str = _OBJECT) -> Path:
        """A file of an object's. Raises ApiError for what is no id."""
        if not _ID.fullmatch(name):
            raise not_found(self._what, name)
        return self.folder / name / file

    def make(self, found: Record, whose: Whose) -> Record:
        """A new object; from now on it has an owner."""
        self.path(found["id"]).parent.mkdir(mode=0o700)
        found["owner"] = whose.owner
        return self.save(found)

    def save(self, found: Record) -> Record:
        path = self.path(found["id"])
        aside = path.with_name(f".{path.name}")
        with aside.open("w") as file:
            file.write(json.dumps(found, ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        return found

    def load(self, name: str, whose: Whose) -> Record:
        """Raises ApiError (404)."""
        found = self._read(self.path(name))
        if found is None or found["owner"] != whose.owner:
            raise not_found(self._what, name)
        return found

    def every(self) -> list[Record]:
        """All objects, whosever; the newest first."""
        found = [self._read(path) for path in self.folder.glob(f"*/{_OBJECT}")]
        return sorted(
            (f for f in found if f is not None), key=lambda f: (f["created_at"], f["id"]),
            reverse=True,
        )  # fmt: skip

    def of(self, whose: Whose) -> list[Record]:
        return [f for f in self.every() if f["owner"] == whose.owner]

    def delete(self, name: str, whose: Whose) -> None:
        self.load(name, whose)
        shutil.rmtree(self.path(name).parent)

    def _read(self, path: Path) -> Record | None:
        """None for one that is not there, or is being made or deleted at this moment."""
        try:
            found: Record = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return found


def shown(found: Record) -> Record:
    """An object as its owner sees it."""
    return {key: value for key, value in found.items() if key not in ("owner", "private")}


def page(found: list[Record], query: Any, most: int = MOST_LISTED) -> Record:
    """A page of a list, as the API has them: `limit`, `after` (an id), `order`."""
    limit = _limit(query.get("limit"), most)
    order = query.get("order") or "desc"
    if order not in ("asc", "desc"):
        raise bad("order", f"Invalid value for 'order': expected 'asc' or 'desc', got {order!r}.")
    if order == "asc":
        found = found[::-1]
    after = query.get("after")
    if after:
        at = next((n for n, one in enumerate(found) if one["id"] == after), None)
        if at is None:
            raise bad("after", f"There is no {after!r} in this list.")
        found = found[at + 1 :]
    shown_ = [shown(one) for one in found[:limit]]
    return {
        "object": "list",
        "data": shown_,
        "first_id": shown_[0]["id"] if shown_ else None,
        "last_id": shown_[-1]["id"] if shown_ else None,
        "has_more": len(found) > limit,
    }


def _limit(word: str | None, most: int) -> int:
    if word is None:
        return 20
    if not word.isdecimal() or not 1 <= int(word) <= most:
        raise bad("limit", f"Invalid value for 'limit': expected a number from 1 to {most}, got "
                  f"{word!r}.")  # fmt: skip
    return int(word)


def no_room(exc: OSError) -> ApiError:
    """A disk that takes nothing."""
    return ApiError(507, f"The disk of the gateway cannot keep that: {exc.strerror}.",
                    code="insufficient_storage", kind="server_error")  # fmt: skip
