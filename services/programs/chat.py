"""Chat: a conversation with a language model. The text is made by `engine`; here is the schema.

A session begins without a prompt and waits. Messages (`Send`): {"prompt": TEXT} is the user's
turn; {"stop": true} ends the answer that is being made and keeps the session; {"set": {...}}
changes max_tokens, temperature, top_k, top_p, seed, stop or system. After each answer comes a
record of kind "turn" {tokens, finish_reason, first_token_s, tokens_per_s}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.services.programs.base import Footprint, Program, arg


class Chat(Program):
    name = "chat"
    summary = "Talk with a language model; the conversation stays in memory between turns"
    examples = ("llmos chat MODEL", 'llmos chat MODEL --system "Answer in one line"')
    group = "inference"
    default_class = "interactive"
    engine = "engine"
    engine_args = ("model", "dtype", "keep_alive_s", "trust_remote_code")
    on_interrupt = "kill"

    @dataclass(frozen=True)
    class Args:
        model: str = arg(
            help="registry name, folder or hub name", metavar="MODEL", positional=True, model=True
        )
        system: str = arg("", help="what the model is told before the conversation")
        max_tokens: int = arg(512, help="tokens of one answer at most", minimum=1)
        temperature: float = arg(0.8, help="0 takes the likeliest token (greedy)", minimum=0)
        top_k: int = arg(40, help="draw from the K likeliest tokens; 0: from all", minimum=0)
        top_p: float = arg(
            0.95,
            help="draw from the likeliest tokens that hold this probability",
            minimum=0,
            maximum=1,
        )
        seed: int | None = arg(None, help="the same seed gives the same text; default: the pid")
        stop: list[str] = arg(  # noqa: RUF009  (each gets a list of its own)
            [], help="end an answer before this text (repeatable)", metavar="TEXT"
        )
        dtype: str = arg(
            "auto", help="number format of the weights", choices=("auto", "float32", "bfloat16")
        )
        keep_alive_s: float = arg(
            300.0, help="keep the model loaded so long after its last use; -1: for ever", minimum=-1
        )
        trust_remote_code: bool = arg(
            False, help="run code that lies in the model's folder, for this run"
        )

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        from llmos.services.model.load import allow_code
        from llmos.services.programs.engine_plan import plan_guest

        allow_code(args.trust_remote_code)
        # A conversation grows to the context length whatever one answer may have.
        return plan_guest(args.model, args.dtype, None)
