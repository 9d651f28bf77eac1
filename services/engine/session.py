"""One guest of an engine: its prompt, its answer, its limits.

A session says which ids to compute next, takes each new token, and tells what text it gives and
whether the answer ends with it. It computes nothing itself and emits nothing.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from jinja2 import TemplateError

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.engine.cache import GuestCache
from llmos.services.engine.model import LoadedModel
from llmos.services.engine.sampling import Sampler
from llmos.services.engine.text import StopStrings, TextStream
from llmos.services.programs.base import Guest


@dataclass
class Answer:
    """A text in the making."""

    ids: list[int]  # of the prompt, then of the answer
    prompt_tokens: int
    stream: TextStream
    stops: StopStrings
    began_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    decode_s: float = 0.0  # device time of the tokens after the first
    tokens: int = 0
    text: str = ""

    def rest(self) -> str:
        """What was held back, now that nothing follows (a stop string may still begin in it)."""
        shown = self.stops.push(self.stream.flush())
        return shown if self.stops.hit else shown + self.stops.flush()

    def statistics(self, finish_reason: str) -> dict[str, Any]:
        """What `wait` and a chat's "turn" record show."""
        rate = (self.tokens - 1) / self.decode_s if self.decode_s else 0.0
        return {
            "tokens": self.tokens,
            "finish_reason": finish_reason,
            "first_token_s": self.first_token_s,
            "tokens_per_s": rate,
            "prompt_tokens": self.prompt_tokens,
        }


class Session:
    """The part that `infer` and `chat` share: one answer after another over one cache."""

    def __init__(self, guest: Guest, args: Any, loaded: LoadedModel) -> None:
        self.guest = guest
        self.args = args
        self.loaded = loaded
        self.cache = GuestCache()
        self.answer: Answer | None = None
        # Without a seed the pid gives one: a restarted guest must make the same text again.
        seed = guest.pid if args.seed is None else args.seed
        self.sampler = Sampler(args.temperature, args.top_k, args.top_p, seed)
        self.last_served = 0  # the step in which it last got a token
        self._pending: list[int] = []

    @property
    def runnable(self) -> bool:
        return self.answer is not None and not self.guest.parked

    @property
    def prompt_is_computed(self) -> bool:
        return not self._pending

    def take(self, most: int) -> list[int]:
        """The next ids to compute: one token, or a piece of the prompt."""
        taken, self._pending = self._pending[:most], self._pending[most:]
        return taken

    def begin(self, ids: list[int]) -> None:
        """Start an answer to the text whose ids are `ids`. Raises BadInput when it cannot be."""
        self._check(ids)
        self._pending = self.cache.rewind_to(ids)
        stream = TextStream(self.loaded.tokenizer, ids)
        self.answer = Answer(list(ids), len(ids), stream, StopStrings(self.args.stop))

    def accept(self, token: int, spent_s: float) -> tuple[str, str]:
        """Take the next token; -> (its text, why the answer ends with it or an empty string)."""
        answer = self.answer
        assert answer is not None
        answer.tokens += 1
        answer.ids.append(token)
        if answer.first_token_s is None:
            answer.first_token_s = time.perf_counter() - answer.began_s
        else:
            answer.decode_s += spent_s
        self._pending = [token]
        piece = answer.stops.push(answer.stream.push(token))
        reason = self._finish_reason(token, answer)
        if reason and not answer.stops.hit:
            piece += answer.rest()
        answer.text += piece
        return piece, reason

    def replay(self, token: int) -> str:
        """Take a token that an earlier engine has made and sent -> why the answer ends with it."""
        self.sampler.skip()
        return self.accept(token, 0.0)[1]

    def resume(self) -> None:
        """After replays: what is to be computed now is all that the cache does not have."""
        if self.answer is not None:
            self.answer.first_token_s = None  # of the next one: the replayed took no time
            self._pending = self.cache.rewind_to(self.answer.ids)

    def interrupt(self) -> str:
        """No more tokens for this answer; -> the text that was held back."""
        assert self.answer is not None
        rest = self.answer.rest()
        self.answer.text += rest
        return rest

    def end(self, finish_reason: str) -> dict[str, Any]:
        """The answer is whole; -> its statistics."""
        assert self.answer is not None
        statistics = self.answer.statistics(finish_reason)
        self.answer = None
        return statistics

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text; a text without any begins with the tokenizer's first token."""
        tokenizer = self.loaded.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
        if not ids and special and tokenizer.bos_token_id is not None:
            return [tokenizer.bos_token_id]
        return ids

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation in the model's own template, up to where it answers."""
        try:
            text = self.loaded.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as exc:
            raise BadInput(
                f"the model's chat template refuses this conversation: {exc}",
                "leave the system prompt out, or use `run --raw`",
            ) from None
        return self.encode(text, special=False)

    def _finish_reason(self, token: int, answer: Answer) -> str:
        if answer.stops.hit or token in self.loaded.stop_ids:
            return "stop"
        limit = self.loaded.context_tokens
        if answer.tokens >= self.args.max_tokens or (
            limit is not None and len(answer.ids) >= limit
        ):
            return "length"
        return ""

    def _check(self, ids: list[int]) -> None:
        limit = self.loaded.context_tokens
        if not ids:
            raise BadInput("the prompt is empty", "write something for the model to continue")
        if limit is not None and len(ids) >= limit:
            raise BadInput(
                f"the prompt has {len(ids)} tokens; the model's context holds {limit}, and one "
                "must be left for the answer",
                "shorten the prompt, or take a model with a longer context",
            )
        if max(ids) >= self.loaded.vocabulary:
            raise BadInput(
                f"the tokenizer gives id {max(ids)}, the model knows {self.loaded.vocabulary} ids",
                "the tokenizer in the model's folder belongs to another model",
            )


class InferSession(Session):
    """One prompt, one answer."""

    def start(self) -> None:
        """Begin with the prompt. Raises BadInput when the model cannot take it."""
        prompt = self.args.prompt
        if self.loaded.tokenizer.chat_template and not self.args.raw:
            self.begin(self.render([{"role": "user", "content": prompt}]))
        else:
            self.begin(self.encode(prompt))


class ChatSession(Session):
    """A conversation: turns wait in a queue, the cache stays between them.

    With a chat template the whole conversation is rendered for each turn, and only what differs
    from the cache is computed. Without one the text simply goes on: each turn is appended to it.
    """

    def __init__(self, guest: Guest, args: Any, loaded: LoadedModel) -> None:
        super().__init__(guest, args, loaded)
        self.turns: deque[str] = deque()
        self.has_forgotten = False  # did the last turn need room that older ones had?
        self._history: list[dict[str, str]] = []
        self._running: list[int] = []  # without a template: the ids of the text so far

    def start_turn(self, prompt: str) -> None:
        """Begin the answer to a user's turn. Raises BadInput; the turn then never was."""
        if not self.loaded.tokenizer.chat_template:
            self.begin(self._extend_running(prompt))
            return
        self._history.append({"role": "user", "content": prompt})
        try:
            self.begin(self._fit_history())
        except BadInput:
            self._history.pop()
            raise

    def end(self, finish_reason: str) -> dict[str, Any]:
        assert self.answer is not None
        self._history.append({"role": "assistant", "content": self.answer.text})
        self._running = list(self.answer.ids)
        if self._running[-1] in self.loaded.stop_ids:
            self._running.pop()
        return super().end(finish_reason)

    def change(self, values: dict[str, Any]) -> None:
        """Set parameters from the next token on. Raises BadArgument, and then changes none."""
        for name, value in values.items():
            _check_setting(name, value)
        self.args = args = replace(self.args, **values)
        if values.get("seed") is not None:
            self.sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
        sampler = self.sampler
        sampler.temperature, sampler.top_k, sampler.top_p = args.temperature, args.top_k, args.top_p

    def _fit_history(self) -> list[int]:
        """The conversation as ids; its oldest turns go when it has outgrown the context."""
        system = [{"role": "system", "content": self.args.system}] if self.args.system else []
        ids = self.render(system + self._history)
        self.has_forgotten = False
        while not self._fits(ids) and len(self._history) > 2:
            del self._history[:2]
            self.has_forgotten = True
            ids = self.render(system + self._history)
        return ids

    def _extend_running(self, prompt: str) -> list[int]:
        """The running text and the new part; its older half goes when the context is full."""
        first = not self._running
        lead = f"{self.args.system}\n" if first and self.args.system else ""
        new = self.encode(lead + prompt, special=first)
        limit = self.loaded.context_tokens
        self.has_forgotten = False
        if limit is not None and self._running and not self._fits(self._running + new):
            self.has_forgotten = True
            self._running = self._running[-max(1, limit // 2 - len(new)) :]
        return self._running + new

    def _fits(self, ids: list[int]) -> bool:
        """Is there room for an answer: what was asked for, or a quarter of the context?"""
        limit = self.loaded.context_tokens
        return limit is None or len(ids) + min(self.args.max_tokens, limit // 4) <= limit


_SETTINGS: dict[str, tuple[Any, float, float]] = {
    "max_tokens": (int, 1, inf),
    "temperature": (int | float, 0, inf),
    "top_k": (int, 0, inf),
    "top_p": (int | float, 0, 1),
    "seed": (int, -inf, inf),
}


def _check_setting(name: str, value: Any) -> None:
    if name == "system" and isinstance(value, str):
        return
    if name == "stop" and isinstance(value, list) and all(isinstance(s, str) for s in value):
        return
    if name not in _SETTINGS and name not in ("system", "stop"):
        known = ", ".join(sorted({*_SETTINGS, "system", "stop"}))
        raise BadArgument(f"a chat has no setting {name!r}", f"settings: {known}")
    kind, low, high = _SETTINGS.get(name, (type(None), 0, 0))
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        raise BadArgument(f"the setting {name} of a chat cannot be {value!r}")
