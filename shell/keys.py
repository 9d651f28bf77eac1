"""The API keys of the gateway: `HOME/gateway/keys.json`, which its server reads.

Only hashes are kept. Whoever owns the home makes keys; no kernel need run.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import json
import os
import pwd
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, HomeUnusable, NoSuchThing, NotAllowed
from llmos.shell.home import Home

Record = dict[str, Any]


def folder_of(home: Home) -> Path:
    """The gateway's folder, made if need be. Raises HomeUnusable."""
    folder = home.path / "gateway"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise HomeUnusable(f"{folder} cannot be made: {exc.strerror}") from None
    return folder


def write(path: Path, text: str) -> None:
    """Whole or not at all, for its owner only. Raises HomeUnusable."""
    aside = path.with_name(f".{path.name}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError as exc:
        raise HomeUnusable(f"{path} cannot be written: {exc.strerror}") from None


def listed(home: Home) -> list[Record]:
    """Every key: id, name, user, created_at and its hash."""
    path = home.path / "gateway" / "keys.json"
    try:
        return list(json.loads(path.read_text())["keys"])
    except FileNotFoundError:
        return []
    except PermissionError:
        raise NotAllowed(f"{path} is for whose kernel this is") from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise HomeUnusable(f"{path} is no list of keys: {exc!r}", "move it away") from None


def new(home: Home, name: str, user: str = "") -> tuple[Record, str]:
    """A new key -> what is kept of it, and the key itself, which is not. Raises BadArgument,
    NotAllowed, NoSuchThing."""
    user = _user(user)
    key = f"sk-llmos-{secrets.token_urlsafe(32)}"
    with _held(home) as keys:
        if any(k["name"] == name for k in keys):
            raise BadArgument(f"there is a key {name!r} already", "`llmos key rm` deletes it")
        made = {
            "id": f"key_{secrets.token_hex(6)}",
            "name": name,
            "user": user,
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "created_at": time.time(),
        }
        keys.append(made)
    return made, key


def remove(home: Home, word: str) -> Record:
    """Delete a key by name or id. Raises NoSuchThing."""
    with _held(home) as keys:
        for key in keys:
            if word in (key["name"], key["id"]):
                keys.remove(key)
                return key
    raise NoSuchThing(f"there is no key {word!r}", "`llmos key` lists them")


def _user(user: str) -> str:
    own = getpass.getuser() if os.getuid() else "root"
    if not user or user == own:
        return own
    if os.getuid() != 0:
        raise NotAllowed(
            f"a key for {user} is made by root",
            "only a kernel of root's serves several users (`llmos boot --group NAME`)",
        )
    try:
        return pwd.getpwnam(user).pw_name
    except KeyError:
        raise NoSuchThing(f"there is no user {user!r}", "`getent passwd` lists them") from None


@contextlib.contextmanager
def _held(home: Home) -> Iterator[list[Record]]:
    """The keys, to be changed by nobody else meanwhile; written at the end."""
    folder = folder_of(home)
    with open(folder / "keys.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = listed(home)
        yield keys
        write(folder / "keys.json", json.dumps({"keys": keys}, indent=1) + "\n")
