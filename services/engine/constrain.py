from __future__ import annotations

from typing import Any


class Constraint:
    done = False

    @classmethod
    def of(cls, tokenizer: Any, args: Any, stop_ids: Any, vocabulary: int) -> Constraint | None:
        return None

    def forbid(self, scores: Any) -> None: ...

    def accept(self, token: int) -> None: ...
