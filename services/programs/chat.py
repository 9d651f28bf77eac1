"""Chat: a conversation with a language model. The text is made by `engine`; here is the schema.

A session begins without a prompt and waits. Messages (`Send`): {"prompt": TEXT} is the user's
turn; {"stop": true} ends the answer that is being made and keeps the session; {"set": {...}}
changes max_tokens, temperature, top_k, top_p, min_p, the penalties, seed, stop or system;
{"history": [{"role": ..., "content": ...}, ...]} replaces the conversation (record "history");
{"end": true} ends the session with exit status 0. After each answer comes a record of kind "turn",
with what the result of an `infer` has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.services.engine.arguments import ENGINE_ARGS, Generation
from llmos.services.programs.base import Footprint, Program, arg


class Chat(Program):
    name = "chat"
    summary = "Talk with a language model; the conversation stays in memory between turns"
    examples = ("llmos chat MODEL", 'llmos chat MODEL --system "Answer in one line"')
    group = "inference"
    default_class = "interactive"
    engine = "engine"
    engine_args = ENGINE_ARGS
    on_interrupt = "kill"

    @dataclass(frozen=True)
    class Args(Generation):
        system: str = arg("", help="what the model is told before the conversation")
        max_tokens: int = arg(512, help="tokens of one answer at most", minimum=1)

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        from llmos.services.engine.plan import plan_guest
        from llmos.services.model.load import allow_code

        allow_code(args.trust_remote_code)
        # A conversation grows to the context length whatever one answer may have.
        return plan_guest(args.model, args.dtype, None)
