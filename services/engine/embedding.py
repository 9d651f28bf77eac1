"""A guest that wants no text but vectors: what the model makes of each input."""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos.kernel.errors import BadArgument
from llmos.services.engine.loaded import Loaded
from llmos.services.engine.session import Served, Text
from llmos.services.programs.base import Guest


class EmbedSession(Served):
    """Its inputs are computed one after the other; each gives one vector."""

    kind = "embedding"

    def __init__(self, guest: Guest, args: Any, loaded: Loaded, adapter: Any = None) -> None:
        super().__init__(guest, args, loaded, adapter)
        # Of the input that is being computed.
        self._sum: Tensor = torch.zeros(())
        self._last: Tensor = torch.zeros(())
        self._seen = 0

    def start(self) -> None:
        """Raises BadInput, BadArgument when the model cannot take its inputs."""
        inputs = [self._input(one) for one in _inputs(self.args.input)]
        for ids in inputs:
            self.check(ids, room=0)
        self.prompt_tokens = sum(map(len, inputs))
        # Those that an engine before this one has told are not told again.
        told = {r.get("index") for r in self.guest.records if r["kind"] == "embedding"}
        self.texts = [Text(i, ids) for i, ids in enumerate(inputs) if i not in told]

    @property
    def shares_prefix(self) -> bool:
        return False  # every token's state is in the mean

    def add(self, text: Text, states: Tensor) -> None:
        """Hidden states (tokens, width) of the next piece of the input."""
        if text.computed == 0:
            self._sum, self._seen = torch.zeros(()), 0
        self._sum = self._sum + states.double().sum(0)
        self._last, self._seen = states[-1], self._seen + len(states)

    def vector(self) -> bytes:
        """The input's vector, float32 little-endian."""
        mean = self.args.pooling == "mean"
        found = self._sum / self._seen if mean else self._last.double()
        if self.args.normalize:
            found = found / found.norm().clamp_min(1e-12)
        return found.to(torch.float32).cpu().numpy().astype("<f4").tobytes()

    def end(self, text: Text) -> bool:
        """An input is done -> whether it was the last."""
        self.texts.remove(text)
        return not self.texts

    def statistics(self) -> dict[str, Any]:
        return {"prompt_tokens": self.prompt_tokens}

    def _input(self, one: Any) -> list[int]:
        return list(one) if isinstance(one, list) else self.encode(one)


def _inputs(given: Any) -> list[Any]:
    """One text, a list of texts, a list of ids, or a list of lists of ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(one, str) for one in given):
            return given
        if all(type(one) is int for one in given):
            return [given]
        if all(isinstance(o, list) and o and all(type(i) is int for i in o) for o in given):
            return given
    raise BadArgument("the input is a text, a list of texts, or lists of token ids")
