"""A guest of an engine that died, in the next one: its stream says how far it had come.

The records of a stream (docs/reference/stream-records.md) are everything that a session was given
and has sent. Tokens that were sent are the prefix of what follows; they are computed again as a
prompt is, many at a time, and the generator passes over their numbers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.engine.session import ChatSession, InferSession, Session


@dataclass
class Replayed:
    """How the last answer stands. `stopped`: its user has stopped it, and it has not been ended
    yet."""

    stopped: bool = False
    rest_is_sent: bool = False  # the text that was held back when it was stopped


def replay(session: Session, records: list[dict[str, Any]]) -> Replayed:
    """Do again what the records say, without a model."""
    now = Replayed()
    for record in records:
        match record:
            case {"kind": "input", "message": dict(message)} if isinstance(session, ChatSession):
                now.stopped = _take(session, message) or now.stopped
            case {"kind": "begin"} if isinstance(session, ChatSession):
                _begin_turn(session)
                now = Replayed()
            case {"kind": "prompt"} if isinstance(session, InferSession):
                session.prompt_is_told = True
            case {"kind": "text", "tokens": list(tokens)} if session.is_answering:
                for token in tokens:
                    session.replay(int(record.get("index", 0)), int(token))
                now.rest_is_sent = now.stopped and not tokens
            case {"kind": "turn", "finish_reason": str(why)} if session.is_answering:
                if why == "interrupted":
                    session.interrupt()
                session.end(session.answers[0], why)
                now = Replayed()
    return now


def _take(session: ChatSession, message: dict[str, Any]) -> bool:
    """-> whether it stops the answer."""
    match message:
        case {"prompt": str(prompt)}:
            session.turns.append(prompt)
        case {"stop": True}:
            return session.is_answering
        case {"set": dict(values)}:
            with contextlib.suppress(BadArgument):  # its user has been told
                session.change(values)
        case {"history": list(messages)} if not session.is_answering:
            with contextlib.suppress(BadArgument):
                session.remember(messages)
    return False


def _begin_turn(session: ChatSession) -> None:
    """The turn that was answered next: the first in the queue that can be begun."""
    while session.turns and not session.is_answering:
        try:
            session.start_turn(session.turns.popleft())
        except BadInput:
            continue  # its user has been told
