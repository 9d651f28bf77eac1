"""Who may do what: one table for all calls, asked before any of them is handled.

A kernel that was started by a user serves that user alone. One that serves a group (`boot --group`)
is root's: members submit and see, and act on their own processes; root acts on all.
"""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING, Any

from llmos.kernel import protocol as p
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument, NoSuchThing, NotAllowed
from llmos.kernel.log import log
from llmos.kernel.names import user_name
from llmos.kernel.process import CLASSES, Class, Process

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# Calls that anybody may make who may connect; what they show of others is masked where they do it.
OPEN = frozenset({p.Ping, p.Status, p.Ps, p.Mem, p.Explain, p.Programs, p.Submit, p.Call, p.Events})

# Calls about one process, for its user; with a `pid`.
OWN = frozenset(
    {p.Kill, p.Renice, p.Pause, p.Resume, p.Checkpoint, p.Wait, p.Attach, p.Logs, p.Send}
)

# The user who owns nothing, by convention; it need not be in the database of users.
_NOBODY = 65534

# What others than its user do not see of a process: what was said to it, and what it said.
HIDDEN: dict[str, Any] = {
    "args": {}, "cwd": "", "env": {}, "progress": {}, "checkpoint": None, "result": {}, "log": "",
}  # fmt: skip


def group_of(name: str) -> grp.struct_group | None:
    """The group that a kernel serves. Raises NotAllowed without root, NoSuchThing."""
    if not name:
        return None
    if os.getuid() != 0:
        raise NotAllowed(
            "only root can serve a group: workers become the users who submit them",
            "`llmos boot` without --group serves you alone",
        )
    try:
        return grp.getgrnam(name)
    except KeyError:
        raise NoSuchThing(f"there is no group {name!r}", "`getent group` lists them") from None


def check_members_can_run(group: grp.struct_group) -> None:
    """Raise NotAllowed where members of the group cannot read what llmos is installed in.

    Warns where only the standard library is closed to them: what the zygote has loaded is there for
    every worker, and the rest fails when it is imported.
    """
    if not all(_can_read(path, group) for path in (__file__, sysconfig.get_path("purelib"))):
        raise NotAllowed(
            f"members of {group.gr_name} cannot read the environment that llmos is installed in "
            f"({sys.prefix})",
            "workers become the users who submit them: install llmos where everybody may read it, "
            "as in /opt/llmos, or `chmod a+rX` it and the folders above it",
        )
    if not _can_read(os.__file__, group):
        log(
            f"warning: members of {group.gr_name} cannot read Python's own library "
            f"({os.path.dirname(os.__file__)}): a worker of theirs fails at the first module of it "
            "that the zygote has not loaded"
        )


def _can_read(path: str, group: grp.struct_group) -> bool:
    """Whether somebody who is in this group, and nothing else, can read a file.

    Tried, not computed from modes: there are access lists, and mounts that squash root.
    """
    done = subprocess.run(
        ["test", "-r", path],
        user=_NOBODY, group=group.gr_gid, extra_groups=[group.gr_gid], cwd="/", check=False,
    )  # fmt: skip
    return done.returncode == 0


def is_admin(uid: int) -> bool:
    """Root, and whose kernel this is, act on all processes."""
    return uid in (0, os.getuid())


def may_connect(kernel: Kernel, uid: int) -> bool:
    """Of a group's kernel the system has decided: who is no member cannot open the socket."""
    return kernel.group is not None or uid == os.getuid()


def is_own(client: Connection, proc: Process) -> bool:
    return is_admin(client.uid) or proc.uid == client.uid


def check(kernel: Kernel, request: Any, client: Connection) -> None:
    """Raise NotAllowed when this client may not make this call."""
    if is_admin(client.uid) or type(request) in OPEN:
        return
    if type(request) in OWN:
        _check_own(kernel, request, client)
        return
    if isinstance(request, p.Services) and request.action == "ls":
        return
    name = type(request).__name__.lower()
    raise NotAllowed(f"{name} is for root and for whose kernel this is", "ask whoever runs it")


def _check_own(kernel: Kernel, request: Any, client: Connection) -> None:
    unknown = request.pid not in kernel.core.m.procs
    if unknown and isinstance(request, p.Attach | p.Send) and not kernel.adoption.over.is_set():
        return  # an engine that outlived the kernel may know it: they ask again when it has spoken
    proc = kernel.core.m.find(request.pid)
    if proc.uid != client.uid:
        raise NotAllowed(
            f"process {proc.pid} is {user_name(proc.uid)}'s",
            "`llmos ps` shows whose a process is; each acts on his own",
        )
    if isinstance(request, p.Renice):
        cls = CLASSES.get(request.cls or "", proc.cls)
        nice = proc.nice if request.nice is None else request.nice
        if nice < proc.nice or cls < proc.cls or request.deadline_s:
            raise NotAllowed(
                f"only root makes a process more important (it is nice {proc.nice}, "
                f"{proc.cls.word})",
                "as in Unix: a nice that is higher, a class that is less urgent, no deadline",
            )


def check_rank(client: Connection, request: p.Submit, default_class: str) -> None:
    """Raise NotAllowed when a submit asks for more importance than its program has by itself."""
    cls = CLASSES.get(request.cls, CLASSES[default_class])
    if not may_rank(client.uid, default_class, request.nice, cls, request.deadline_s):
        raise NotAllowed(
            "only root gives a process a nice below 0, a class more urgent than its program's, "
            "or a deadline",
            f"submit it as {default_class}, nice 0 to 19",
        )


def may_rank(uid: int, default_class: str, nice: int, cls: Class, deadline: float | None) -> bool:
    """Whether a user may have a process of that importance, of a program with that class."""
    return is_admin(uid) or not (nice < 0 or cls < CLASSES[default_class] or deadline)


def masked(client: Connection, proc: Process, row: dict[str, Any]) -> dict[str, Any]:
    """A row of `ps` as this client may see it."""
    if is_own(client, proc):
        return row
    row |= {key: value for key, value in HIDDEN.items() if key in row}
    return row if proc.live else {**row, "reason": ""}  # how it ended may be in its own words


# ---- whom a worker becomes ----


def drop_to(uid: int) -> dict[str, Any] | None:
    """What a child of the zygote needs to become a user; None: it stays who it is."""
    if uid == os.getuid():
        return None
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise BadArgument(
            f"uid {uid} is in no database of users", "processes run as users that the machine knows"
        ) from None
    return {
        "uid": uid,
        "gid": entry.pw_gid,
        "groups": sorted(os.getgrouplist(entry.pw_name, entry.pw_gid)),
        "name": entry.pw_name,
        "home": entry.pw_dir,
    }
