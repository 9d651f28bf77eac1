"""What `pretrain` and `finetune` have in common as programs. No torch at import.

It does not know how either makes its model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmos.services.programs.base import Context, Done, Idle, Keep, Program, Report

if TYPE_CHECKING:
    from torch import Tensor

    from llmos.services.programs.lm_session import Session


class TrainingProgram(Program):
    """A program whose work is a Session; subclasses make it in `load`."""

    group: ClassVar[str] = "training"
    has_checkpoint = True
    preload: ClassVar[tuple[str, ...]] = (
        "llmos.services.programs.lm_start",
        "llmos.services.programs.lm_plan",
    )
    session: Session

    def step(self, ctx: Context) -> Report | Done | Idle:
        return self.session.step()

    def shrink(self, ctx: Context, level: str) -> bool:
        return level == "caches" or self.session.shrink()

    def save(self, folder: Path) -> None:
        self.session.save(folder)

    def capture(self, keep: Keep) -> Callable[[Path], None]:
        return self.session.capture(keep)

    def restore(self, folder: Path) -> None:
        self.session.restore(folder)

    def tensors(self) -> Iterable[Tensor]:
        return self.session.loop.tensors()
