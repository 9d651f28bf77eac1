"""A kernel that clients start again: what `llmos boot --auto-boot` leaves in the home.

A kernel that died leaves its socket, one that was shut down takes it away: so a client that meets
a socket nobody answers on knows that somebody wanted a kernel here.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from llmos.kernel.errors import Busy, LlmosError, NoKernel
from llmos.shell.home import Home

VARIABLE = "LLMOS_AUTO_BOOT"
FILE = "auto-boot.json"


def remember(home: Home, flags: dict[str, Any]) -> None:
    """From now on: clients boot it again with these flags of `boot`."""
    aside = home.path / f".{FILE}"
    aside.write_text(json.dumps(flags))
    aside.replace(home.path / FILE)


def forget(home: Home) -> None:
    (home.path / FILE).unlink(missing_ok=True)


def flags_of(home: Home) -> dict[str, Any] | None:
    """The flags to boot a kernel of this home with that has died; None: nobody is to do it."""
    try:
        if home.path.stat().st_uid != os.getuid() or not home.socket.exists():
            return None  # somebody else's, or shut down on purpose
    except OSError:
        return None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((home.path / FILE).read_text())
        if isinstance(found, dict):
            return found
    return {} if os.environ.get(VARIABLE, "") not in ("", "0") else None


def boot_again(home: Home) -> bool:
    """Boot the kernel, if somebody has said so -> whether one runs now. Raises NoKernel."""
    flags = flags_of(home)
    if flags is None:
        return False
    from llmos.shell.launch import Launch

    try:
        Launch(home, flags.get("devices", ()), flags.get("policy", ""),
               flags.get("batch_share"), flags.get("group", "")).wait()  # fmt: skip
    except Busy:
        pass  # another client was faster
    except LlmosError as exc:
        raise NoKernel(f"the kernel has died, and {exc.message}", exc.hint) from None
    return True
