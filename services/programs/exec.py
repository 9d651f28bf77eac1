"""Exec: any command as a process: a log, an exit status, memory in the books, nice, hold, restart.

Here is its schema; the command is started and watched in `exec_session`, in the worker's own
process group, so that a hold stops all of it. What the command may tell by itself is
`llmos.services.steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.kernel.errors import BadArgument
from llmos.kernel.units import parse_bytes
from llmos.services.programs.base import (
    Context,
    Done,
    Footprint,
    Program,
    Report,
    Segment,
    Waiting,
    arg,
    keep,
    save_every,
)
from llmos.services.programs.exec_command import find_command

if TYPE_CHECKING:
    from llmos.services.programs.exec_session import Session

# Declared for a command of which nobody said what it needs: a small training with torch. What is
# measured corrects it.
DEFAULT_BYTES = 2**30


class Exec(Program):
    name = "exec"
    summary = "Run any command as a process: your own training script above all"
    examples = (
        "llmos exec -- python train.py --epochs 3",
        "llmos exec --memory 6GiB --restart on-failure -d -- python train.py",
        "llmos exec --class idle make -j2",
    )
    group = "programs"
    on_interrupt = "interrupt"
    foreign = True

    @dataclass(frozen=True)
    class Args:
        command: list[str] = arg(
            help="the command and its arguments, to the end of the line", metavar="COMMAND",
            positional=True, command=True,
        )  # fmt: skip
        memory: str = arg(
            "", help="what it needs at most, such as 6GiB; without it 1GiB", metavar="SIZE"
        )
        cwd: str = arg(".", help="the folder it runs in", metavar="DIR", path=True)
        search_path: str = arg(
            "", help="where COMMAND is looked for; without it $PATH", metavar="DIRS", env="PATH"
        )
        save_every: str = save_every()
        keep: int = keep()

    _session: Session

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        find_command(args.command, args.cwd, args.search_path)
        return Footprint((Segment("system", declared_bytes(args.memory)),))

    def load(self, ctx: Context) -> None:
        from llmos.services.programs.exec_session import Session

        self._session = Session(self.args, ctx)

    def step(self, ctx: Context) -> Report | Done | Waiting:
        outcome = self._session.step()
        if self._session.can_save and not self.has_checkpoint:
            self.has_checkpoint = True
            ctx.can_checkpoint()
        return outcome

    def save(self, folder: Path) -> int:
        return self._session.save(folder)

    def restore(self, folder: Path) -> None:
        self._session.resume_from(folder)

    def close(self) -> None:
        if hasattr(self, "_session"):
            self._session.close()


def declared_bytes(memory: str) -> int:
    """What the user declared, in bytes. Raises BadArgument."""
    if not memory:
        return DEFAULT_BYTES
    try:
        found = parse_bytes(memory)
    except BadArgument as exc:
        raise BadArgument(f"--memory: {exc.message}", exc.hint) from None
    if not found:
        raise BadArgument(f"--memory {memory}: a command needs some", "write it as 6GiB")
    return found
