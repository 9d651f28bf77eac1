"""/v1/chat/completions."""

from __future__ import annotations

import time

from llmos.services.gateway.answers import Answer, Gathered, Record, chat_logprobs, usage
from llmos.services.gateway.asked import Asked
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.run import Runner, Whose
from llmos.services.gateway.sse import DONE, Events, event
from llmos.services.gateway.toolcalls import calls_of, may_be_calls

ENDPOINT = "/v1/chat/completions"


async def whole(runner: Runner, asked: Asked, whose: Whose) -> Record:
    """The answer to a request that does not stream. Raises ApiError, LlmosError."""
    head = _head("chat.completion", asked)
    found = await runner.gather(asked, {}, whose, ENDPOINT)
    return {
        **head,
        "choices": [_choice(answer, asked) for answer in found.answers],
        "usage": usage([found.result]),
        "service_tier": asked.tier if asked.tier == "flex" else "default",
    }


async def stream(runner: Runner, asked: Asked, whose: Whose) -> Events:
    """The events of a request that streams."""
    head = _head("chat.completion.chunk", asked)
    if asked.include_usage:
        head["usage"] = None
    found = Gathered(asked.n)
    begun: set[int] = set()
    sent = [0] * asked.n  # characters of each answer; what may be a call of a tool is held back
    entries: list[list[Record]] = [[] for _ in found.answers]
    async for batch in runner.batches(asked, {}, found, whose, ENDPOINT):
        events = []
        for record in batch:
            answer = found.add(record)
            if answer is None:
                continue
            if answer.index not in begun:
                begun.add(answer.index)
                events.append(_chunk(head, answer, {"role": "assistant", "content": ""}))
            entries[answer.index] += record.get("logprobs") or ()
            if asked.tools and may_be_calls(answer.text):
                continue
            piece, told = answer.text[sent[answer.index] :], entries[answer.index]
            if piece or told:
                logprobs = chat_logprobs(told) if asked.logprobs is not None else None
                events.append(_chunk(head, answer, {"content": piece}, logprobs))
                sent[answer.index], entries[answer.index] = len(answer.text), []
        if events:
            yield b"".join(events)
    events = []
    for answer in found.answers:
        if answer.index not in begun:
            events.append(_chunk(head, answer, {"role": "assistant", "content": ""}))
        events += _last(head, answer, asked, answer.text[sent[answer.index] :])
    if asked.include_usage:
        events.append(event({**head, "choices": [], "usage": usage([found.result])}))
    yield b"".join([*events, DONE])


def _head(kind: str, asked: Asked) -> Record:
    return {
        "id": new_id("chatcmpl"),
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": None,
    }


def _choice(answer: Answer, asked: Asked) -> Record:
    message: Record = {"role": "assistant", "content": answer.text, "refusal": None}
    finish_reason = answer.finish_reason
    calls = calls_of(answer.text, asked.tools)
    if calls:
        message |= {"content": None, "tool_calls": calls}
        finish_reason = "tool_calls"
    return {
        "index": answer.index,
        "message": message,
        "logprobs": chat_logprobs(answer.entries) if asked.logprobs is not None else None,
        "finish_reason": finish_reason,
    }


def _last(head: Record, answer: Answer, asked: Asked, held: str) -> list[bytes]:
    """The end of an answer: what was held back, as text or as calls, and why it ended."""
    calls = calls_of(answer.text, asked.tools) if held else []
    if calls:
        deltas = [{"index": n, **call} for n, call in enumerate(calls)]
        return [
            _chunk(head, answer, {"tool_calls": deltas}),
            _chunk(head, answer, {}, finish_reason="tool_calls"),
        ]
    rest = [_chunk(head, answer, {"content": held})] if held else []
    return [*rest, _chunk(head, answer, {}, finish_reason=answer.finish_reason)]


def _chunk(
    head: Record,
    answer: Answer,
    delta: Record,
    logprobs: Record | None = None,
    finish_reason: str | None = None,
) -> bytes:
    choice = {
        "index": answer.index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
    return event({**head, "choices": [choice]})
