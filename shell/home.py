"""The llmos home: one folder with the socket, the log, the cached manifest, the registry.

Knows where things lie and whether the folder can be used; starts nothing.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.kernel.errors import HomeUnusable

# sizeof(sun_path) is 108 on Linux, with a zero byte at the end.
MAX_SOCKET_PATH_BYTES = 107
# The longest path that a kernel makes in its home (kernel/home.py checks the same).
_LONGEST_INSIDE_BYTES = len("/w/w12345678-12345678/sock")


@dataclass(frozen=True, slots=True)
class Home:
    """The folder named by LLMOS_HOME, or ~/.llmos."""

    path: Path

    @classmethod
    def find(cls, path: str | os.PathLike[str] | None = None) -> Home:
        chosen = os.fspath(path) if path is not None else os.environ.get("LLMOS_HOME", "")
        return cls(Path(os.path.abspath(os.path.expanduser(chosen or "~/.llmos"))))

    @property
    def socket(self) -> Path:
        return self.path / "kernel.sock"

    @property
    def log(self) -> Path:
        return self.path / "kernel.log"

    @property
    def history(self) -> Path:
        return self.path / "history"

    @property
    def chats(self) -> Path:
        """Conversations that were saved."""
        return self.path / "chats"

    @property
    def chat_history(self) -> Path:
        """What was typed into chats."""
        return self.path / "chat_history"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest that the last kernel left here; None when there is none to read."""
        try:
            made = json.loads((self.path / "manifest.json").read_bytes())
        except (OSError, ValueError):
            return None  # absent or half written: a kernel will make it again
        return made if isinstance(made, dict) and "programs" in made else None


def check_socket_path(home: Home) -> None:
    """HomeUnusable when the sockets in this home would have longer paths than are allowed."""
    length, most = len(os.fsencode(home.path)), MAX_SOCKET_PATH_BYTES - _LONGEST_INSIDE_BYTES
    if length > most:
        raise HomeUnusable(
            f"the path of the home is too long for unix sockets "
            f"({length} bytes, at most {most}): {home.path}",
            "choose a shorter folder with LLMOS_HOME, such as /tmp/llmos",
        )


def prepare(home: Home, group: str = "") -> list[str]:
    """Make the home usable for a kernel: there, ours, private, writable. Raises HomeUnusable.

    One that serves a `group` opens it as far as that needs, itself.

    Returns a line for each thing that was changed and that the user may want to know.
    """
    check_socket_path(home)
    try:
        home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.path.stat()
    except (FileExistsError, NotADirectoryError):
        raise HomeUnusable(f"the home {home.path} is not a folder") from None
    except OSError as exc:
        raise HomeUnusable(f"the home {home.path} cannot be made: {exc.strerror}") from None
    if found.st_uid != os.getuid():
        raise HomeUnusable(f"the home {home.path} belongs to another user (uid {found.st_uid})")
    # Before the mode is touched: a folder that we cannot write is left as it is.
    _check_writable(home)
    if stat.S_IMODE(found.st_mode) & 0o077 and not group:
        home.path.chmod(0o700)
        return [f"{home.path} was open to other users; it is private (0700) now"]
    return []


def _check_writable(home: Home) -> None:
    # Permission bits lie (root, read-only mounts, quotas): only writing tells.
    try:
        # Not `tempfile`: its imports take longer than all the rest of a command's start.
        probe = home.path / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as exc:
        raise HomeUnusable(f"the home {home.path} cannot be written: {exc.strerror}") from None
