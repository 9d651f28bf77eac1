"""One guest of an engine: its prompt, its answers, its limits.

A session has one answer, or several side by side (`n`, beams), which begin with the same prompt. It
says which ids are to be computed, takes each new token, and tells what text it gives and whether
the answer ends with it. It computes nothing itself and emits nothing.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from jinja2 import TemplateError

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.engine.batch import MOST_PIECE
from llmos.services.engine.constrain import Constraint
from llmos.services.engine.loaded import Loaded
from llmos.services.engine.model import ALL, LAST, NOTHING
from llmos.services.engine.sampling import Choice, Sampler
from llmos.services.engine.text import StopStrings, TextStream
from llmos.services.programs.base import Guest

# Of a prompt whose every token's scores are wanted.
SCORED_PIECE = 64


@dataclass
class Text:
    """Tokens that a model is to see, and what it keeps of them."""

    index: int
    ids: list[int]
    memory: Any = None
    computed: int = 0  # so many of `ids` are in the memory
    tokens: int = 0  # so many of them were made here
    finish_reason: str = ""


@dataclass
class Answer(Text):
    """A text in the making: the prompt, then what the model says."""

    text: str = ""
    sampler: Sampler = field(kw_only=True)
    stream: TextStream = field(kw_only=True)
    stops: StopStrings = field(kw_only=True)

    def rest(self) -> str:
        """What was held back, now that nothing follows (a stop string may still begin in it)."""
        shown = self.stops.push(self.stream.flush())
        return shown if self.stops.hit else shown + self.stops.flush()


@dataclass
class Times:
    """When an exchange began, and how fast it went."""

    began_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    decode_s: float = 0.0  # device time of the steps after the first token
    decoded: int = 0  # tokens that were made in it

    def took(self, tokens: int, spent_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.began_s
        else:
            self.decode_s += spent_s
            self.decoded += tokens


class Served:
    """What the host knows of every guest: its texts, their memory, whose turn it is."""

    kind = "text"  # a step computes one kind
    in_step = False  # all of its texts go on in the same step, or none

    def __init__(self, guest: Guest, args: Any, loaded: Loaded, adapter: Any = None) -> None:
        self.guest = guest
        self.args = args
        self.loaded = loaded
        self.adapter = adapter
        self.texts: list[Any] = []  # those that are not whole yet
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.memory: Any = None  # of a chat, between two turns
        self.kept_ids: list[int] = []  # the tokens that are in it
        self.is_spilled = False  # its blocks are in a file
        self.last_served = 0  # the step in which it last got something

    @property
    def runnable(self) -> bool:
        return bool(self.texts) and not self.guest.parked

    @property
    def pending(self) -> int:
        """Tokens to be computed before the next one can be chosen, if it is not just one each."""
        first = self.texts[0]
        missing = len(first.ids) - first.computed
        return missing if missing > 1 or first.tokens == 0 else 0

    @property
    def exact(self) -> bool:
        """Whether it is computed alone."""
        return False

    @property
    def shares_prefix(self) -> bool:
        """Whether it may use what others have computed."""
        return not self.exact

    @property
    def most_piece(self) -> int:
        """Tokens of a prompt that it has in one step at most."""
        return MOST_PIECE

    def wanted(self, text: Any, last: bool) -> str:
        """Which scores a piece of a text is computed for; `last`: the next token's come with it."""
        return LAST if last else NOTHING

    def check(self, ids: list[int], room: int = 1) -> None:
        """Raise BadInput when the model cannot take these ids, and `room` more."""
        limit = self.loaded.context_tokens
        if not ids:
            raise BadInput("the prompt is empty", "write something for the model to continue")
        if limit is not None and len(ids) + room > limit:
            left = ", and one must be left for the answer" if room else ""
            raise BadInput(
                f"the prompt has {len(ids)} tokens; the model's context holds {limit}{left}",
                "shorten the prompt, or take a model with a longer context",
            )
        if max(ids) >= self.loaded.vocabulary or min(ids) < 0:
            wrong = max(ids) if min(ids) >= 0 else min(ids)
            raise BadInput(
                f"the prompt has the id {wrong}, the model knows {self.loaded.vocabulary} ids",
                "the tokenizer in the model's folder belongs to another model",
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text; a text without any begins with the tokenizer's first token."""
        tokenizer = self.loaded.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
        if not ids and special and tokenizer.bos_token_id is not None:
            return [tokenizer.bos_token_id]
        return ids


class Session(Served):
    """The part that `infer` and `chat` share: one exchange after another."""

    def __init__(self, guest: Guest, args: Any, loaded: Loaded, adapter: Any = None) -> None:
        super().__init__(guest, args, loaded, adapter)
        self.ended: list[Answer] = []  # of this exchange
        self.times = Times()
        # Without a seed the pid gives one: a restarted guest must make the same text again.
        self.seed = guest.pid if args.seed is None else args.seed

    @property
    def answers(self) -> list[Answer]:
        return self.texts

    @property
    def is_answering(self) -> bool:
        return bool(self.answers)

    @property
    def exact(self) -> bool:
        return bool(self.args.exact)

    @property
    def numbered(self) -> bool:
        """Whether its records say which answer they are of."""
        return False

    def begin(self, ids: list[int]) -> None:
        """Start an answer to the text whose ids are `ids`. Raises BadInput when it cannot be."""
        self.check(ids, room=min(1, self.args.max_tokens))
        self.times = Times()
        self.prompt_tokens, self.cached_tokens, self.ended = len(ids), 0, []
        self.texts = [self.new_answer(0, ids)]

    def new_answer(self, index: int, ids: list[int]) -> Answer:
        tokenizer = self.loaded.tokenizer
        stream, stops = TextStream(tokenizer, ids), StopStrings(self.args.stop)
        return Answer(
            index, list(ids), sampler=self.sampler(index, ids), stream=stream, stops=stops
        )

    def sampler(self, index: int, ids: list[int]) -> Sampler:
        """Who chooses the tokens of an answer to `ids`. Raises BadArgument."""
        return Sampler(self.args, self.seed + index, self.loaded.vocabulary, ids)

    def split(self) -> list[Answer]:
        """The prompt is computed: from here on there are as many answers as were asked for
        -> those that are new."""
        return []

    def accept(self, answer: Answer, token: int) -> str:
        """Take the next token of an answer; -> its text. `finish_reason` says whether it ends."""
        answer.sampler.accept(token)
        answer.tokens += 1
        answer.ids.append(token)
        piece = answer.stops.push(answer.stream.push(token))
        answer.finish_reason = self._finish_reason(token, answer)
        if answer.finish_reason and not answer.stops.hit:
            piece += answer.rest()
        answer.text += piece
        return piece

    def replay(self, index: int, token: int) -> str:
        """Take a token that an earlier engine has made and sent -> why the answer ends with it."""
        answer = next((a for a in self.answers if a.index == index), None)
        if answer is None:
            answer = self.new_answer(index, self.answers[0].ids[: self.prompt_tokens])
            self.answers.append(answer)
        self.accept(answer, token)
        return answer.finish_reason

    def resume(self) -> None:
        """After replays: what an exchange has that the dead engine had not told of yet."""

    def interrupt(self) -> str:
        """No more tokens for this answer; -> the text that was held back."""
        answer = self.answers[0]
        rest = answer.rest()
        answer.text += rest
        return rest

    def end(self, answer: Answer, finish_reason: str) -> bool:
        """An answer is whole -> whether it was the last of the exchange."""
        answer.finish_reason = finish_reason
        self.answers.remove(answer)
        self.ended.append(answer)
        return not self.answers

    def statistics(self) -> dict[str, Any]:
        """What `wait` and a chat's "turn" record show, when all answers are whole."""
        times, ended = self.times, sorted(self.ended, key=lambda a: a.index)
        return {
            "tokens": sum(a.tokens for a in ended),
            "finish_reason": ended[0].finish_reason if ended else "stop",
            "first_token_s": times.first_token_s,
            "tokens_per_s": times.decoded / times.decode_s if times.decode_s else 0.0,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "choices": [self.choice(a) for a in ended],
        }

    def choice(self, answer: Answer) -> dict[str, Any]:
        return {
            "index": answer.index,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
        }

    @property
    def chat_template(self) -> Any:
        """How conversations are written: as the adapter was trained, else as the model was."""
        return getattr(self.adapter, "chat_template", "") or self.loaded.tokenizer.chat_template

    def render(self, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
        """The ids of a conversation in its template, up to where the model answers."""
        try:
            text = self.loaded.tokenizer.apply_chat_template(
                messages, chat_template=getattr(self.adapter, "chat_template", "") or None,
                tools=tools, tokenize=False, add_generation_prompt=True,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, KeyError) as exc:
            raise BadInput(
                f"the model's chat template refuses this conversation: {exc}",
                "leave the system prompt out, or use `run --raw`",
            ) from None
        return self.encode(text, special=False)

    def _finish_reason(self, token: int, answer: Answer) -> str:
        if answer.stops.hit or answer.sampler.finished:
            return "stop"
        if token in self.loaded.stop_ids and not self.args.ignore_eos:
            return "stop"
        limit = self.loaded.context_tokens
        if answer.tokens >= self.args.max_tokens or (
            limit is not None and len(answer.ids) >= limit
        ):
            return "length"
        return ""


class InferSession(Session):
    """One prompt, one answer or several."""

    def __init__(self, guest: Guest, args: Any, loaded: Loaded, adapter: Any = None) -> None:
        super().__init__(guest, args, loaded, adapter)
        self.prompt_scores: list[Choice] = []
        self.prompt_is_told = False  # its log-probabilities are in the stream

    def start(self) -> None:
        """Begin with the prompt. Raises BadInput when the model cannot take it."""
        self.begin(self._prompt())

    @property
    def numbered(self) -> bool:
        return bool(self.args.n > 1)

    @property
    def most_piece(self) -> int:
        # The scores of each of its tokens are in memory at once.
        return MOST_PIECE if self.args.prompt_logprobs is None else SCORED_PIECE

    def wanted(self, text: Any, last: bool) -> str:
        if self.args.prompt_logprobs is not None and not self.prompt_is_told and not text.tokens:
            return ALL
        return super().wanted(text, last)

    def resume(self) -> None:
        if self.answers and self.answers[0].tokens:
            have = {a.index for a in (*self.answers, *self.ended)}
            prompt = self.answers[0].ids[: self.prompt_tokens]
            missing = [i for i in range(self.args.n) if i not in have]
            self.answers.extend(self.new_answer(i, prompt) for i in missing)

    def split(self) -> list[Answer]:
        first = self.answers[0]
        new = [self.new_answer(i, first.ids) for i in range(1, self.args.n)]
        self.answers.extend(new)
        return new

    @property
    def shares_prefix(self) -> bool:
        return super().shares_prefix and self.args.prompt_logprobs is None

    def sampler(self, index: int, ids: list[int]) -> Sampler:
        given = self.loaded
        form = Constraint.of(given.tokenizer, self.args, given.stop_ids, given.vocabulary)
        return Sampler(self.args, self.seed + index, given.vocabulary, ids, form)

    def _prompt(self) -> list[int]:
        args = self.args
        given = [
            n for n in ("prompt", "messages", "prompt_ids") if getattr(args, n) not in ("", None)
        ]
        if len(given) > 1:
            raise BadArgument(f"one of {' and '.join(given)} is enough")
        if args.prompt_ids is not None:
            return _ids(args.prompt_ids)
        if args.messages is not None:
            return self._conversation(_messages(args.messages))
        if self.chat_template and not args.raw:
            return self.render([{"role": "user", "content": args.prompt}], args.tools)
        return self.encode(args.prompt)

    def _conversation(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.chat_template:
            return self.render(messages, self.args.tools)
        # Without a template the text of a conversation is what was said, a line each.
        return self.encode("\n".join(str(m.get("content") or "") for m in messages))


class ChatSession(Session):
    """A conversation: turns wait in a queue, what is computed stays between them.

    With a chat template the whole conversation is rendered for each turn, and only what differs
    from before is computed. Without one the text simply goes on: each turn is appended to it.
    """

    def __init__(self, guest: Guest, args: Any, loaded: Loaded, adapter: Any = None) -> None:
        super().__init__(guest, args, loaded, adapter)
        self.turns: deque[str] = deque()
        self.has_forgotten = False  # did the last turn need room that older ones had?
        self.history: list[dict[str, Any]] = []
        self._running: list[int] = []  # without a template: the ids of the text so far
        # That of the last turn: the next one goes on with its generator.
        self._sampler: Sampler | None = None

    def start_turn(self, prompt: str) -> None:
        """Begin the answer to a user's turn. Raises BadInput; the turn then never was."""
        if not self.chat_template:
            ids, forgotten = self._extend_running(prompt)
            self.begin(ids)
        else:
            said = [*self.history, {"role": "user", "content": prompt}]
            ids, kept = self._fit(said)
            self.begin(ids)
            self.history, forgotten = kept, len(kept) < len(said)
        self.has_forgotten = forgotten

    def sampler(self, index: int, ids: list[int]) -> Sampler:
        made = super().sampler(index, ids)
        if self._sampler is not None:
            made.go_on_from(self._sampler)
        self._sampler = made
        return made

    def end(self, answer: Answer, finish_reason: str) -> bool:
        self.history.append({"role": "assistant", "content": answer.text})
        self._running = list(answer.ids)
        if self._running[-1] in self.loaded.stop_ids:
            self._running.pop()
        return super().end(answer, finish_reason)

    def remember(self, messages: Any) -> int:
        """The conversation is this one from now on -> how many turns it has. Raises BadArgument."""
        history = _messages(messages)
        system = [m["content"] for m in history if m["role"] == "system"]
        if system:
            self.args = replace(self.args, system=str(system[0]))
        self.history = [m for m in history if m["role"] != "system"]
        self._running = []
        if self.history and not self.chat_template:
            said = [self.args.system, *(str(m["content"]) for m in self.history)]
            self._running = self.encode("\n".join(filter(None, said)))
        return len(self.history)

    def change(self, values: dict[str, Any]) -> None:
        """Set parameters from the next token on. Raises BadArgument, and then changes none."""
        for name, value in values.items():
            _check_setting(name, value)
        args = replace(self.args, **values)
        if self._sampler is not None:
            self._sampler.change(args)
        self.args = args
        if values.get("seed") is not None:
            self.seed = args.seed
            if self._sampler is not None:
                self._sampler.reseed(args.seed)

    def _fit(self, history: list[dict[str, Any]]) -> tuple[list[int], list[dict[str, Any]]]:
        """A conversation as ids, and what is left of it: its oldest turns go when it has outgrown
        the context."""
        system = [{"role": "system", "content": self.args.system}] if self.args.system else []
        ids = self.render(system + history)
        while not self._fits(ids) and len(history) > 2:
            history = history[2:]
            ids = self.render(system + history)
        return ids, history

    def _extend_running(self, prompt: str) -> tuple[list[int], bool]:
        """The running text and the new part; its older half goes when the context is full -> the
        ids, and whether something went."""
        first = not self._running
        lead = f"{self.args.system}\n" if first and self.args.system else ""
        new = self.encode(lead + prompt, special=first)
        limit = self.loaded.context_tokens
        running, forgotten = self._running, False
        if limit is not None and running and not self._fits(running + new):
            running, forgotten = running[-max(1, limit // 2 - len(new)) :], True
        return running + new, forgotten

    def _fits(self, ids: list[int]) -> bool:
        """Is there room for an answer: what was asked for, or a quarter of the context?"""
        limit = self.loaded.context_tokens
        return limit is None or len(ids) + min(self.args.max_tokens, limit // 4) <= limit


def _ids(given: Any) -> list[int]:
    if isinstance(given, list) and all(type(i) is int for i in given):
        return list(given)
    raise BadArgument("prompt_ids is a list of token ids: [1, 15043, ...]")


def _messages(given: Any) -> list[dict[str, Any]]:
    fine = isinstance(given, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in given
    )
    if not fine:
        raise BadArgument('a conversation is a list of {"role": ..., "content": ...}')
    return [{**m, "content": _text_of(m.get("content"))} for m in given]


def _text_of(content: Any) -> str:
    """What was said: a text, or parts of which only texts can be read."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(p, str) for p in parts):
            return "".join(str(p) for p in parts)
    raise BadArgument("the content of a message is text", "the model reads no pictures or sounds")


_SETTINGS: dict[str, tuple[Any, float, float]] = {
    "max_tokens": (int, 1, inf),
    "temperature": (int | float, 0, inf),
    "top_k": (int, 0, inf),
    "top_p": (int | float, 0, 1),
    "min_p": (int | float, 0, 1),
    "repetition_penalty": (int | float, 0.01, inf),
    "presence_penalty": (int | float, -2, 2),
    "frequency_penalty": (int | float, -2, 2),
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
