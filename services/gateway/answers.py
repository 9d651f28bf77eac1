"""From the records of a process to the objects of OpenAI's API. Plain values in, plain values out.

docs/reference/stream-records.md has the records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

# JSON has no infinity; vLLM says this for a token that cannot be.
IMPOSSIBLE = -9999.0


@dataclass
class Answer:
    """One text in the making, with what was asked to be told of its tokens."""

    index: int
    text: str = ""
    entries: list[Record] = field(default_factory=list)
    finish_reason: str = "stop"


@dataclass
class Gathered:
    """All that one process has said so far."""

    n: int = 1
    prompt: Record | None = None  # the record of the prompt's tokens, where it was asked for
    result: Record = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [Answer(i) for i in range(self.n)]

    def add(self, record: Record) -> Answer | None:
        """Take a record -> the answer that it belongs to; None for what is no part of one."""
        if record["kind"] == "prompt":
            # A long prompt is told in several.
            before = self.prompt or {"tokens": [], "logprobs": []}
            self.prompt = {key: [*before[key], *record[key]] for key in ("tokens", "logprobs")}
        if record["kind"] != "text":
            return None
        answer = self.answers[int(record.get("index") or 0)]
        answer.text += record["text"]
        answer.entries += record.get("logprobs") or ()
        return answer

    def end(self, result: Record) -> None:
        """The process has ended, with this."""
        self.result = result
        reason = result.get("finish_reason")
        for answer in self.answers:
            answer.finish_reason = finish_reason(reason)
        for choice in result.get("choices") or ():
            if choice["index"] < self.n:
                self.answers[choice["index"]].finish_reason = finish_reason(choice["finish_reason"])


def finish_reason(told: Any) -> str:
    """`interrupted` (somebody has stopped it) has no word of its own there."""
    return "length" if told == "length" else "stop"


def usage(results: list[Record]) -> Record:
    """The tokens of one or more processes."""
    prompt, made = (
        sum(int(r.get(key) or 0) for r in results) for key in ("prompt_tokens", "tokens")
    )
    cached = sum(int(r.get("cached_tokens") or 0) for r in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


# ---- log-probabilities ----


def logprob(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else IMPOSSIBLE


def chat_logprobs(entries: list[Record]) -> Record:
    return {"content": [_chat_entry(e) for e in entries], "refusal": None}


def _chat_entry(entry: Record) -> Record:
    return {**_chat_token(entry), "top_logprobs": [_chat_token(t) for t in entry.get("top") or ()]}


def _chat_token(entry: Record) -> Record:
    text = entry["text"]
    return {"token": text, "logprob": logprob(entry["logprob"]), "bytes": list(text.encode())}


def completion_logprobs(entries: list[Record | None], offset: int, tops: int) -> Record:
    """Four lists, one entry for each token. `offset`: where in the text the first one begins."""
    made: Record = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for entry in entries:
        text = "" if entry is None else entry["text"]
        made["tokens"].append(text)
        made["text_offset"].append(offset)
        offset += len(text)
        # Of the first token of a prompt nothing can be told.
        first = entry is None or entry.get("logprob") is None
        made["token_logprobs"].append(None if first else logprob(entry["logprob"]))  # type: ignore[index]
        made["top_logprobs"].append(None if first else _likeliest(entry, tops))  # type: ignore[arg-type]
    return made


def _likeliest(entry: Record, tops: int) -> dict[str, float]:
    """By text; of two tokens with one text the likelier. The token itself is always there."""
    found: dict[str, float] = {}
    for one in [*(entry.get("top") or ())[:tops], entry]:
        value = logprob(one["logprob"])
        found[one["text"]] = max(value, found.get(one["text"], value))
    return found


def prompt_entries(record: Record, text: str | None) -> list[Record | None]:
    """The entries of a prompt. Its first token has no log-probability; where the text is known, so
    is that token's."""
    entries: list[Record | None] = list(record.get("logprobs") or ())
    if entries and entries[0] is None and text is not None:
        rest = "".join(e["text"] for e in entries[1:] if e)
        if text.endswith(rest):
            entries[0] = {"text": text.removesuffix(rest), "logprob": None}
    return entries


def prompt_text(asked: Record, record: Record | None) -> str:
    """What `echo` shows of a prompt: itself, or the texts of its ids."""
    if "prompt" in asked:
        return str(asked["prompt"])
    entries = (record or {}).get("logprobs") or ()
    return "".join(e["text"] for e in entries if e)
