"""Conversations that were saved: one JSON file each, in `chats/` of the home.

{"version": 1, "model": "smollm2", "system": "...", "settings": {"temperature": 0.2},
 "messages": [{"role": "user", "content": "..."}, ...], "saved_at": 1790000000.0}
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, BadInput, LlmosError, NoSuchThing
from llmos.shell.home import Home
from llmos.shell.resolve import nearest_hint

VERSION = 1
Messages = list[dict[str, str]]

_NAME = re.compile(r"[^\W_][\w.-]{0,99}")


@dataclass
class SavedChat:
    """What a conversation needs to go on. `settings`: those that were changed."""

    model: str
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    messages: Messages = field(default_factory=list)
    saved_at: float = 0.0


def names(home: Home) -> list[str]:
    """The conversations that were saved, by name."""
    return sorted(p.stem for p in home.chats.glob("*.json") if _NAME.fullmatch(p.stem))


def exists(home: Home, name: str) -> bool:
    return _path(home, name).exists()


def save(home: Home, name: str, chat: SavedChat) -> Path:
    """Write a conversation, in place of one of that name -> its file. Raises BadArgument."""
    path = _path(home, name)
    chat.saved_at = time.time()
    text = json.dumps({"version": VERSION, **asdict(chat)}, ensure_ascii=False, indent=1)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        home.chats.mkdir(mode=0o700, exist_ok=True)
        # Private from its first byte on: it is a person's.
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            f.write(text.encode())
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    except OSError as exc:
        aside.unlink(missing_ok=True)
        raise LlmosError(
            f"the conversation could not be saved: {exc.strerror}", f"its file is {path}"
        ) from None
    return path


def load(home: Home, name: str) -> SavedChat:
    """A conversation. Raises NoSuchThing, and BadInput for a file that is not whole."""
    path = _path(home, name)
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NoSuchThing(
            f"no conversation {name!r} was saved", nearest_hint(name, names(home))
        ) from None
    except OSError as exc:
        raise BadInput(f"the conversation {path} cannot be read: {exc.strerror}") from None
    except ValueError:
        raise _damaged(path, "it is no JSON") from None
    return _checked(path, found)


def _checked(path: Path, found: Any) -> SavedChat:
    if not isinstance(found, dict) or not isinstance(found.get("version"), int):
        raise _damaged(path, "it has no version")
    if found["version"] > VERSION:
        raise BadInput(
            f"the conversation {path} is of version {found['version']}; this llmos reads {VERSION}",
            "a newer llmos has written it",
        )
    chat = SavedChat(
        model=found.get("model", ""),
        system=found.get("system", ""),
        settings=found.get("settings", {}),
        messages=found.get("messages", []),
        saved_at=found.get("saved_at", 0.0),
    )
    kinds = {"model": str, "system": str, "settings": dict, "messages": list}
    for name, kind in kinds.items():
        if not isinstance(getattr(chat, name), kind):
            raise _damaged(path, f"its {name} is of the wrong kind")
    for i, message in enumerate(chat.messages, 1):
        if not (
            isinstance(message, dict)
            and all(isinstance(message.get(key), str) for key in ("role", "content"))
        ):
            raise _damaged(path, f"message {i} has no role or no content")
    return chat


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(f"the conversation {path} is damaged: {why}", "mend the file, or delete it")


def _path(home: Home, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise BadArgument(
            f"{name!r} cannot be the name of a conversation",
            "letters, digits, dots, dashes and underscores, and a letter or digit first",
        )
    return home.chats / f"{name}.json"
