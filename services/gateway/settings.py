"""What the gateway was told: `HOME/gateway/settings.json`, as `llmos serve` wrote it."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadInput

FILE = "settings.json"

MIB = 1024**2


@dataclass(frozen=True)
class Settings:
    """Where to listen, and what is too much. `shell/commands/serve.py` has the flags."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_active: int = 256  # requests that run at once
    max_waiting: int = 1024  # and that wait for one of them to end
    max_body: int = 16 * MIB  # bytes of a request
    max_file: int = 512 * MIB  # bytes of an upload
    timeout_s: float = 600.0  # without a word of the model for so long a request is given up
    stall_s: float = 120.0  # a client that reads nothing for so long is given up
    dtype: str = ""  # in which models compute; empty: the engine chooses
    batch_active: int = 32  # requests of batches that run at once
    cors: tuple[str, ...] = ()  # origins whose pages may ask; "*": all

    @property
    def is_loopback(self) -> bool:
        """Can only this machine reach it?"""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load(folder: Path) -> Settings:
    """Raises BadInput for a file that nobody could have written."""
    path = folder / FILE
    try:
        told: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as exc:
        raise BadInput(f"{path} cannot be read: {exc}", "`llmos serve` writes it anew") from None
    known = {f.name: f for f in dataclasses.fields(Settings)}
    if not isinstance(told, dict) or told.keys() - known.keys():
        raise BadInput(f"{path} has what is no setting", "`llmos serve` writes it anew")
    for name, value in told.items():
        default = known[name].default
        right = (
            list
            if isinstance(default, tuple)
            else (int, float)
            if isinstance(default, float)
            else type(default)
        )
        if not isinstance(value, right) or isinstance(value, bool):
            raise BadInput(f"{path}: {name} cannot be {value!r}", "`llmos serve` writes it anew")
    if "cors" in told:
        told["cors"] = tuple(map(str, told["cors"]))
    return Settings(**told)
