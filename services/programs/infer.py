"""Infer: one prompt, one continuation. The text is made by `engine`; here is only the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.services.engine.arguments import ENGINE_ARGS, MOST_LOGPROBS, Generation
from llmos.services.programs.base import Footprint, Program, arg


class Infer(Program):
    name = "infer"
    summary = "Continue a prompt with a language model; the text streams as it is made"
    examples = (
        'llmos run stories15M "Once upon a time"',
        'llmos run MODEL "PROMPT" --max-tokens 100 --temperature 0',
        'llmos run MODEL "PROMPT" --seed 7 --top-p 0.9 --stop "\\n\\n"',
    )
    group = "inference"
    default_class = "interactive"
    engine = "engine"
    engine_args = ENGINE_ARGS
    on_interrupt = "kill"

    @dataclass(frozen=True)
    class Args(Generation):
        prompt: str = arg(
            "", help="the text to continue", metavar="PROMPT", positional=True, plan_without=True
        )
        messages: Any = arg(
            None, help='instead of a prompt, a conversation: [{"role": "user", "content": ...}]'
        )
        prompt_ids: Any = arg(None, help="instead of a prompt, its token ids: [1, 15043, ...]")
        tools: Any = arg(None, help="what the model may call, for its chat template")
        n: int = arg(1, help="so many answers to one prompt", minimum=1, maximum=128)
        beams: int = arg(
            1, help="beam search with so many beams, instead of drawing", minimum=1, maximum=64
        )
        length_penalty: float = arg(
            1.0, help="beam search: a score is divided by length ** this; above 0 favours long ones"
        )
        prompt_logprobs: int | None = arg(
            None,
            help="tell the log-probability of each token of the prompt, and the N likeliest",
            metavar="N",
            minimum=0,
            maximum=MOST_LOGPROBS,
        )
        schema: Any = arg(None, help="make JSON of this JSON schema; true: any JSON object")
        regex: str = arg("", help="make text that matches this regular expression")
        choice: list[str] = arg([], help="make one of these texts (repeatable)", metavar="TEXT")
        raw: bool = arg(False, help="give the prompt as it is, without the model's chat template")

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        from llmos.services.engine.plan import plan_guest
        from llmos.services.model.load import allow_code

        allow_code(args.trust_remote_code)
        # A token of the prompt is a byte of it at least.
        tokens = len(args.prompt.encode()) + args.max_tokens
        return plan_guest(args.model, args.dtype, tokens)
