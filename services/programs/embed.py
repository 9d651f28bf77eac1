"""Embed: vectors of texts, by a language model. They are made by `engine`; here is only the
schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.services.engine.arguments import ENGINE_ARGS, Served
from llmos.services.programs.base import Footprint, Program, arg


class Embed(Program):
    name = "embed"
    summary = "Make vectors of texts with a language model"
    examples = ("llmos embed MODEL --input '\"one text\"'", "llmos embed MODEL --input @texts.json")
    group = "inference"
    default_class = "interactive"
    engine = "engine"
    engine_args = ENGINE_ARGS
    on_interrupt = "kill"

    @dataclass(frozen=True)
    class Args(Served):
        input: Any = arg(None, help='a text, a list of texts, or of lists of token ids: ["a", "b"]')
        pooling: str = arg(
            "mean", help="of the last layer's states: their mean, or the last one",
            choices=("mean", "last"),
        )  # fmt: skip
        normalize: bool = arg(True, help="make each vector of length 1")

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        from llmos.services.engine.plan import plan_guest
        from llmos.services.model.load import allow_code

        allow_code(args.trust_remote_code)
        return plan_guest(args.model, args.dtype, None)
