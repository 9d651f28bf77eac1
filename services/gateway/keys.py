"""API keys: only their hashes lie in the home (`HOME/gateway/keys.json`, written by `llmos key`).

A key is 256 random bits, so one round of SHA-256 is hash enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import dataclass
from pathlib import Path

FILE = "keys.json"


@dataclass(frozen=True)
class Key:
    id: str
    name: str
    user: str  # whose processes its requests are
    sha256: str


class Keys:
    """The keys of the file as it is now; it is read again when it has changed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._version: tuple[int, int, int] | None = None
        self._keys: list[Key] = []

    def all(self) -> list[Key]:
        try:
            found = os.stat(self._path)
            version = (found.st_ino, found.st_mtime_ns, found.st_size)
        except FileNotFoundError:
            version = None
        if version != self._version:
            self._keys = self._read() if version is not None else []
            self._version = version
        return self._keys

    def find(self, presented: str) -> Key | None:
        """The key that was presented. Takes as long for a wrong one as for a right one."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for key in self.all():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _read(self) -> list[Key]:
        # A file that is no list of keys lets nobody in.
        told = json.loads(self._path.read_text())
        names = ("id", "name", "user", "sha256")
        return [Key(**{n: str(row[n]) for n in names}) for row in told["keys"]]
