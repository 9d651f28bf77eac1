"""Infer: one prompt, one continuation. The text is made by `engine`; here is only the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    engine_args = ("model", "dtype", "keep_alive_s", "trust_remote_code")
    on_interrupt = "kill"

    @dataclass(frozen=True)
    class Args:
        model: str = arg(
            help="registry name, folder or hub name", metavar="MODEL", positional=True, model=True
        )
        prompt: str = arg(
            help="the text to continue", metavar="PROMPT", positional=True, plan_without=True
        )
        max_tokens: int = arg(128, help="make at most so many tokens", minimum=1)
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
            [], help="end before this text appears (repeatable)", metavar="TEXT"
        )
        raw: bool = arg(False, help="give the prompt as it is, without the model's chat template")
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
        # A token of the prompt is a byte of it at least.
        tokens = len(args.prompt.encode()) + args.max_tokens
        return plan_guest(args.model, args.dtype, tokens)
