"""Run the program `exec` as its worker does, in a process of its own: it is a subreaper.

    python -P run_exec.py '{"command": [...], "work": ..., "save_at": 5, ...}'

Prints what came of it as JSON: reports, done, output by descriptor (hex), saved, seconds of CPU.
The other keys: `cwd`, `memory`, `restore` (a folder), `grace_s`, `signal_at` ([bytes of output,
number]), `environment`. With `save_at` it writes a checkpoint at the first report of that step or
later and ends there, as a stop does; with `go_on` it goes on.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any


class Context:
    def __init__(self, work: Path, environment: dict[str, str]) -> None:
        self.pid, self.home, self.work = 100, work, work
        self.device, self.threads, self.environment = "cpu", 2, environment
        self.output: dict[int, bytes] = {1: b"", 2: b""}
        self.can = 0

    def clock(self) -> float:
        import time

        return time.monotonic()

    def emit(self, kind: str, pid: int | None = None, **values: Any) -> None:
        assert kind == "output"
        self.output[values["fd"]] += values["data"]

    def can_checkpoint(self) -> None:
        self.can += 1


def main() -> None:
    from llmos.drivers.worker import checkpoint
    from llmos.services.programs import exec_session
    from llmos.services.programs.base import Done, Report, Waiting
    from llmos.services.programs.exec import Exec

    order = json.loads(sys.argv[1])
    # What the program writes to its log is not ours to print.
    answer = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    exec_session.GRACE_S = order.get("grace_s", exec_session.GRACE_S)
    work = Path(order["work"])
    ctx = Context(work, order.get("environment", dict(os.environ)))
    args = Exec.Args(
        order["command"], order.get("memory", ""), order.get("cwd", str(work)),
        ctx.environment.get("PATH", ""),
    )  # fmt: skip
    program: Any = Exec(args)
    program.load(ctx)
    if "restore" in order:
        program.restore(Path(order["restore"]))
    found: dict[str, Any] = {"reports": [], "done": None, "saved": []}
    while found["done"] is None:
        outcome = program.step(ctx)
        if isinstance(outcome, Done):
            found["done"] = [outcome.status, outcome.reason, outcome.result]
        elif isinstance(outcome, Report):
            found["reports"].append([outcome.step, outcome.total, outcome.metrics])
            if outcome.step >= order.get("save_at", 1 << 60):
                del order["save_at"]
                found["saved"].append(str(checkpoint.write(work / "saved", 0, program.save)))
                if not order.get("go_on"):
                    break
        elif isinstance(outcome, Waiting):
            wait(outcome)
        at, number = order.get("signal_at", (1 << 60, 0))
        if len(ctx.output[1]) >= at:
            del order["signal_at"]
            os.killpg(0, number)
    program.close()
    found["can"] = ctx.can
    found["output"] = {fd: data.hex() for fd, data in ctx.output.items()}
    found["cpu_s"] = sum(os.times()[:2])
    answer.write(json.dumps(found))
    answer.close()


def wait(waiting: Any) -> None:
    poll = select.poll()
    for fd in waiting.on:
        poll.register(fd, select.POLLIN)
    poll.poll(None if waiting.at_most_s is None else waiting.at_most_s * 1000)


def run_exec(work: Path, *command: str, **order: Any) -> dict[str, Any]:
    """From a test -> what it printed; `output` as bytes by 1 and 2."""
    work.mkdir(exist_ok=True)
    order |= {"command": list(command), "work": str(work)}
    done = subprocess.run(
        [sys.executable, "-P", __file__, json.dumps(order)],
        capture_output=True, text=True, timeout=120, check=True, start_new_session=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    found["output"] = {int(fd): bytes.fromhex(data) for fd, data in found["output"].items()}
    return found


if __name__ == "__main__":
    main()
