"""What a check of a home finds, and what was done about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# As fsck(8) has them.
CLEAN, REPAIRED, LEFT, NOT_CHECKED = 0, 1, 4, 8


@dataclass(slots=True)
class Problem:
    path: str  # inside the home
    what: str
    repair: str  # what repairs it, or was done; empty: nothing does
    repaired: bool = False


@dataclass(slots=True)
class Report:
    """The problems so far. With `repair` each is repaired as soon as it is found."""

    repair: bool
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def found(
        self, path: object, what: str, repair: str, fix: Callable[[], object] | None = None
    ) -> None:
        problem = Problem(str(path), what, repair if fix else "")
        self.problems.append(problem)
        if not self.repair or fix is None:
            return
        try:
            fix()
            problem.repaired = True
        except OSError as exc:
            problem.what += f"; it could not be repaired: {exc.strerror or exc}"

    @property
    def status(self) -> int:
        if not self.problems:
            return CLEAN
        return REPAIRED if all(p.repaired for p in self.problems) else LEFT

    def to_json(self, home: str) -> dict[str, Any]:
        return {
            "home": home,
            "status": self.status,
            "problems": [
                {"path": p.path, "what": p.what, "repair": p.repair or None,
                 "repaired": p.repaired} for p in self.problems
            ],
            "notes": self.notes,
        }  # fmt: skip
