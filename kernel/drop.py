"""In a child of root's zygote: become the user who submitted, for good, before any path is touched.

All three ids of both kinds are set, the groups are those of the system's database, and whether
there is a way back is tried, not assumed. Until it runs another program, other processes of the
same user can neither read its memory nor trace it: it began as a copy of root's zygote.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmos.kernel.wire import unpack

_PR_SET_DUMPABLE = 4


def read_private(order: dict[str, Any]) -> dict[str, Any]:
    """The order with the part of it that the zygote was not told. Still as root: its file is."""
    path = order.get("private")
    if path is None:
        return order
    body = Path(path).read_bytes()
    os.unlink(path)
    return {**order, **unpack(body[4:])}


def become(user: Mapping[str, Any] | None) -> None:
    """Drop to `user` (uid, gid, groups, name, home). Raises PermissionError when that fails."""
    if user is None:
        return
    uid, gid = int(user["uid"]), int(user["gid"])
    if uid == 0:
        raise PermissionError("root is nobody to drop to")
    os.setgroups(user["groups"])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise PermissionError(f"could not become uid {uid}, gid {gid}")
    if set(os.getgroups()) != set(user["groups"]):
        raise PermissionError(f"could not take the groups of uid {uid}")
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        pass
    else:
        raise PermissionError(f"uid {uid} could become root again")
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise PermissionError("its memory cannot be kept from other processes")
    os.umask(0o077)
    os.environ.update(environment(user))


def environment(user: Mapping[str, Any] | None) -> dict[str, str]:
    """What tells programs whose they are."""
    if user is None:
        return {}
    return {"HOME": user["home"], "USER": user["name"], "LOGNAME": user["name"]}
