"""A guest whose answers are found by beam search: its beams go on together, a token in each
step."""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmos.kernel.errors import BadArgument
from llmos.services.engine.beams import Beams
from llmos.services.engine.loaded import Loaded
from llmos.services.engine.memories import Memories
from llmos.services.engine.session import InferSession, Text
from llmos.services.programs.base import Guest


class BeamSession(InferSession):
    """Nothing of it can be told before the search is over: the best beam may change at any step."""

    kind = "beams"
    in_step = True

    def __init__(self, guest: Guest, args: Any, loaded: Loaded, adapter: Any = None) -> None:
        super().__init__(guest, args, loaded, adapter)
        unfit = {
            "--schema, --regex and --choice": args.schema is not None or args.regex or args.choice,
            "--logprobs": args.logprobs is not None or args.prompt_logprobs is not None,
            "--stop": bool(args.stop),
            "penalties and bias": args.logit_bias is not None or args.repetition_penalty != 1
            or args.presence_penalty or args.frequency_penalty,
        }  # fmt: skip
        wrong = [what for what, given in unfit.items() if given]
        if wrong:
            raise BadArgument(
                f"beam search knows nothing of {wrong[0]}", "leave it out, or --beams"
            )
        if args.n > args.beams:
            raise BadArgument(
                f"{args.beams} beams give no {args.n} answers", "--n is at most --beams"
            )
        self._told: set[int] = set()

    def begin(self, ids: list[int]) -> None:
        super().begin(ids)
        limit, room = self.loaded.context_tokens, self.args.max_tokens
        if limit is not None:
            room = min(room, limit - len(ids))
        ends = frozenset() if self.args.ignore_eos else self.loaded.stop_ids
        self._search = Beams(self.args.beams, self.args.length_penalty, ends, room)

    @property
    def pending(self) -> int:
        missing = len(self.texts[0].ids) - self.texts[0].computed
        return missing if missing > 1 or len(self.texts) == 1 else 0

    def replay(self, index: int, token: int) -> str:
        self._told.add(index)  # by the engine before; all beams begin anew
        return ""

    def resume(self) -> None:
        pass

    def advance(self, logprobs: Tensor, memories: Memories) -> bool:
        """The beams' next tokens, from the scores after each of them -> whether there are some.

        logprobs: (beams, vocabulary), in the order of `texts`. Raises BadInput.
        """
        parents, tokens = self._search.step(logprobs)
        before, self.texts = self.texts, []
        for index, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
            beam = Text(index, [*before[parent].ids, token], tokens=before[parent].tokens + 1)
            memories.fork(before[parent], beam)
            self.texts.append(beam)
        for text in before:
            memories.free(text)
        return not self._search.finished

    def found(self) -> list[dict[str, Any]]:
        """The answers, the best first: what a record says of each."""
        self._results = self._search.result()[: self.args.n]
        made = []
        for index, (ids, _) in enumerate(self._results):
            if index not in self._told:
                text = self.loaded.tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                numbered = {"index": index} if self.numbered else {}
                made.append({"text": text, "tokens": ids, **numbered})
        return made

    def statistics(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "tokens": len(ids),
                "finish_reason": "stop" if ids and ids[-1] in self.loaded.stop_ids else "length",
                "score": score,
            }
            for index, (ids, score) in enumerate(self._results)
        ]
        return {
            **super().statistics(),
            "tokens": sum(len(ids) for ids, _ in self._results),
            "finish_reason": choices[0]["finish_reason"] if choices else "length",
            "choices": choices,
        }
