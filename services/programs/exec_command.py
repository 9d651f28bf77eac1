"""Find the command that somebody means, and make the environment it runs in.

Knows no process: the first is asked at submit already, so that a wrong word is refused there.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.programs.base import Context

# The variable by which services/steps.py finds the worker.
STEPS = "LLMOS_STEPS"


def find_command(command: list[str], cwd: str, search_path: str) -> str:
    """The file to execute, as a shell in `cwd` would find it. Raises BadArgument, BadInput."""
    if not command or not command[0]:
        raise BadArgument("exec needs a COMMAND: what to run", "llmos exec -- python train.py")
    if any("\0" in word for word in command):
        raise BadArgument("the command has a zero byte in it")
    if not os.path.isdir(cwd):
        raise BadInput(f"there is no folder {cwd} to run in", "choose another --cwd")
    name = command[0]
    if "/" in name:
        path = os.path.join(cwd, name)
        problem = _problem(path)
        if problem is not None:
            raise BadInput(f"{name} {problem[0]}", problem[1] or f"it was looked for at {path}")
        return path
    return _in_search_path(name, cwd, search_path)


def _in_search_path(name: str, cwd: str, search_path: str) -> str:
    unusable = ""
    for folder in search_path.split(os.pathsep):
        path = os.path.join(cwd, folder, name)  # an empty entry is the folder it runs in
        if _problem(path) is None:
            return path
        if os.path.isfile(path):
            unusable = unusable or path
    if unusable:
        raise BadInput(f"{unusable} is not executable", f"`chmod +x {unusable}`")
    here = os.path.isfile(os.path.join(cwd, name))
    raise BadInput(
        f"there is no command {name!r} in the PATH",
        f"did you mean ./{name}, or `python {name}`?" if here else "a path begins with / or ./",
    )


def _problem(path: str) -> tuple[str, str] | None:
    """What keeps a file from being executed, and what to do; None when nothing does."""
    if os.path.isdir(path):
        return "is a folder, not a command", ""
    if not os.path.exists(path):
        return "does not exist", ""
    if not os.access(path, os.X_OK):
        name = os.path.basename(path)
        return "is not executable", f"`chmod +x {name}`, or run its interpreter: `python {name}`"
    return None


def environment(ctx: Context, steps_socket: Path) -> dict[str, str]:
    """What whoever submitted it has, and where and on what it runs."""
    made = dict(ctx.environment)
    made.setdefault("OMP_NUM_THREADS", str(ctx.threads))
    # What a script prints is to be seen when it prints it, though it goes through a pipe.
    made.setdefault("PYTHONUNBUFFERED", "1")
    # A spinning OpenMP thread starves its neighbours; the driver has chosen this for workers.
    if "GOMP_SPINCOUNT" in os.environ:
        made.setdefault("GOMP_SPINCOUNT", os.environ["GOMP_SPINCOUNT"])
    # By this the driver finds who has left the tree of a worker that was killed.
    if "LLMOS_WORKER" in os.environ:
        made["LLMOS_WORKER"] = os.environ["LLMOS_WORKER"]
    device = ctx.device
    if device.startswith("cuda"):
        made["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2] or "0"
        device = "cuda:0"  # the only one that it sees
    return made | {
        "LLMOS_PID": str(ctx.pid),
        "LLMOS_HOME": str(ctx.home),
        "LLMOS_DEVICE": device,
        STEPS: str(steps_socket),
    }
