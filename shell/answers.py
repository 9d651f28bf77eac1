"""What `run --json` prints: the answers and what they cost; as one object, or line by line."""

from __future__ import annotations

import json
from typing import Any

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.view import View


class JsonView(View):
    """Takes the place of the view of a process: notes go to stderr, the rest is data."""

    def __init__(self, ctx: Context, label: str, *, lines: bool, args: Record) -> None:
        """`lines`: print each record as it comes, as JSON in a line of its own."""
        super().__init__(ctx, label)
        self._lines = lines
        self._args = args
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[Any]] = {}
        self._prompt: Record | None = None

    def show(self, record: Record) -> None:
        match record["kind"]:
            case "text":
                self._take(record)
            case "prompt":
                self._prompt = {key: record.get(key) for key in ("tokens", "logprobs")}
            case "note":
                self.note(str(record["text"]))
        if self._lines:
            self._print(record)

    def _take(self, record: Record) -> None:
        index = int(record.get("index") or 0)
        self._texts.setdefault(index, []).append(str(record["text"]))
        if record.get("logprobs") is not None:
            self._logprobs.setdefault(index, []).extend(record["logprobs"])

    def finish(self, pid: int, result: Record) -> None:
        """The last word, when the process has ended well."""
        answer = self._answer(pid, result)
        if self._lines:
            self._print({"kind": "result", **answer})
        else:
            self._ctx.json(answer)

    def _answer(self, pid: int, result: Record) -> Record:
        tokens, prompt = int(result.get("tokens") or 0), int(result.get("prompt_tokens") or 0)
        choices = [self._choice(c) for c in self._choices(result)]
        return {
            "pid": pid,
            "model": self._args.get("model"),
            "text": choices[0]["text"],
            "finish_reason": choices[0]["finish_reason"],
            "tokens": tokens,
            "logprobs": choices[0]["logprobs"],
            "choices": choices,
            "prompt": self._prompt,
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": tokens,
                "total_tokens": prompt + tokens,
                "cached_tokens": int(result.get("cached_tokens") or 0),
            },
            "first_token_s": result.get("first_token_s"),
            "tokens_per_s": result.get("tokens_per_s"),
        }

    def _choices(self, result: Record) -> list[Record]:
        told = {int(c["index"]): c for c in result.get("choices") or ()}
        told = told or {0: result}
        return [{**told.get(i, {}), "index": i} for i in sorted({*told, *self._texts})]

    def _choice(self, told: Record) -> Record:
        index = told["index"]
        return {
            "index": index,
            "text": "".join(self._texts.get(index, ())),
            "finish_reason": told.get("finish_reason"),
            "tokens": told.get("tokens"),
            "score": told.get("score"),
            "logprobs": self._logprobs.get(index),
        }

    def _print(self, record: Record) -> None:
        print(json.dumps(record, default=str), flush=True)
