"""/v1/completions: texts, or token ids, that a model goes on with."""

from __future__ import annotations

import time

from llmos.services.gateway.answers import (
    Answer,
    Gathered,
    Record,
    completion_logprobs,
    prompt_entries,
    prompt_text,
    usage,
)
from llmos.services.gateway.asked import Asked
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.run import Runner, Whose
from llmos.services.gateway.sse import DONE, Events, event

ENDPOINT = "/v1/completions"


async def whole(runner: Runner, asked: Asked, whose: Whose) -> Record:
    """The answer to a request that does not stream. Raises ApiError, LlmosError."""
    head = _head(asked)
    found = await runner.gather_all(asked, whose, ENDPOINT)
    choices = [
        _choice(asked, number, one, answer)
        for number, one in enumerate(found)
        for answer in one.answers
    ]
    return {**head, "choices": choices, "usage": usage([one.result for one in found])}


async def stream(runner: Runner, asked: Asked, whose: Whose) -> Events:
    """The events of a request that streams."""
    head = _head(asked)
    if asked.include_usage:
        head["usage"] = None
    # Characters of each answer that were sent, with the prompt where it is echoed.
    sent: dict[int, int] = {}
    results: list[Record] = []
    async for number, found, batch in runner.merged(asked, whose, ENDPOINT):
        events = []
        if batch is None:
            results.append(found.result)
            for answer in found.answers:
                index = number * asked.n + answer.index
                if asked.echo and index not in sent:
                    events.append(_echo(head, asked, number, found, index))
                events.append(_chunk(head, index, "", None, answer.finish_reason))
        for record in batch or ():
            new = found.add(record)
            if new is None:
                continue
            index = number * asked.n + new.index
            if asked.echo and index not in sent:
                events.append(_echo(head, asked, number, found, index))
                sent[index] = len(prompt_text(asked.prompts[number], found.prompt))
            entries = record.get("logprobs") or []
            logprobs = None
            if asked.logprobs is not None:
                logprobs = completion_logprobs(entries, sent.get(index, 0), asked.logprobs)
            if record["text"] or entries:
                events.append(_chunk(head, index, record["text"], logprobs))
            sent[index] = sent.get(index, 0) + len(record["text"])
        if events:
            yield b"".join(events)
    last = [event({**head, "choices": [], "usage": usage(results)})] if asked.include_usage else []
    yield b"".join([*last, DONE])


def _head(asked: Asked) -> Record:
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": None,
    }


def _choice(asked: Asked, number: int, found: Gathered, answer: Answer) -> Record:
    text, entries = answer.text, list[Record | None](answer.entries)
    if asked.echo:
        text = prompt_text(asked.prompts[number], found.prompt) + text
        entries = _prompt_entries(asked, number, found) + entries
    logprobs = None
    if asked.logprobs is not None:
        logprobs = completion_logprobs(entries, 0, asked.logprobs)
    return {
        "index": number * asked.n + answer.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
    }


def _echo(head: Record, asked: Asked, number: int, found: Gathered, index: int) -> bytes:
    """The prompt, as the first piece of an answer."""
    text = prompt_text(asked.prompts[number], found.prompt)
    logprobs = None
    if asked.logprobs is not None:
        logprobs = completion_logprobs(_prompt_entries(asked, number, found), 0, asked.logprobs)
    return _chunk(head, index, text, logprobs)


def _prompt_entries(asked: Asked, number: int, found: Gathered) -> list[Record | None]:
    return prompt_entries(found.prompt or {}, asked.prompts[number].get("prompt"))


def _chunk(
    head: Record, index: int, text: str, logprobs: Record | None, finish_reason: str | None = None
) -> bytes:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    return event({**head, "choices": [choice]})
