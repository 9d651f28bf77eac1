"""Be another user for a moment: in a child, as only root can. Skips where that is not possible."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from llmos.kernel.errors import LlmosError, from_wire
from llmos.kernel.wire import Unpacker, pack


@dataclass(frozen=True)
class Two:
    """A group of this machine, and two users who are its members; a third who is not."""

    group: str
    ann: str
    bob: str
    other: str


def two_users() -> Two:
    """Users whom the machine has already: their own group is the same one."""
    if os.getuid() != 0:
        pytest.skip("only root can become other users")
    by_group: dict[int, list[str]] = {}
    for entry in pwd.getpwall():
        if entry.pw_uid and entry.pw_gid:
            by_group.setdefault(entry.pw_gid, []).append(entry.pw_name)
    for gid, names in sorted(by_group.items()):
        others = [e.pw_name for e in pwd.getpwall() if e.pw_uid and e.pw_gid != gid]
        if len(names) >= 2 and others:
            return Two(grp.getgrgid(gid).gr_name, names[0], names[1], others[0])
    pytest.skip("no group of this machine has two users")


def as_user(name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives when `name` does it; raises the LlmosError or PermissionError it raised."""
    entry = pwd.getpwnam(name)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.initgroups(name, entry.pw_gid)
            os.setresgid(*(entry.pw_gid,) * 3)
            os.setresuid(*(entry.pw_uid,) * 3)
            os.write(write, pack(_outcome(work)))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    (outcome,) = Unpacker().feed(data)
    if "error" in outcome:
        raise from_wire(outcome["error"])
    if "refused" in outcome:
        raise PermissionError(outcome["refused"])
    return outcome["ok"]


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"ok": work()}
    except LlmosError as exc:
        return {"error": exc.to_wire()}
    except PermissionError as exc:
        return {"refused": str(exc)}
