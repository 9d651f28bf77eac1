"""The program that trains a causal language model from scratch on text. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmos.services.programs.base import Context, Footprint, arg
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_program import TrainingProgram


class Pretrain(TrainingProgram):
    name: ClassVar[str] = "pretrain"
    summary: ClassVar[str] = "Train a language model from scratch on text"
    examples: ClassVar[tuple[str, ...]] = (
        "llmos pretrain shakespeare.txt --out bard",
        "llmos pretrain corpus/ --out small --arch lstm --steps 2000 -d",
        "llmos pretrain notes.jsonl.gz --out notes --time-limit-s 600 --width 384",
    )

    @dataclass(frozen=True, kw_only=True)
    class Args(TrainingArgs):
        data: str = arg(
            help="text: .txt or .jsonl, each also .gz; a file or a folder of them",
            positional=True,
            path=True,
            plan_without=True,
        )
        arch: str = arg(
            "transformer",
            help="architecture of the model",
            choices=("rnn", "lstm", "gru", "transformer"),
        )
        steps: int = arg(1000, help="steps of training", minimum=1, shape=False)
        width: int = arg(256, help="width of the model", minimum=1)
        layers: int = arg(4, help="layers of the model", minimum=1)
        heads: int = arg(4, help="attention heads (transformer)", minimum=1)
        vocab_size: int = arg(
            2048, help="tokens of the tokenizer that is trained", minimum=260, maximum=1_000_000
        )
        tokenizer: str = arg("", help="take the tokenizer of this model instead", model=True)
        lr: float = arg(2e-3, help="highest learning rate", minimum=0, shape=False)
        dropout: float = arg(0.0, help="dropout of the model", minimum=0, maximum=0.99)

    @classmethod
    def plan(cls, args: Args) -> Footprint:
        from llmos.services.programs.lm_plan import plan_pretrain

        return plan_pretrain(args)

    def load(self, ctx: Context) -> None:
        from llmos.services.programs.lm_start import start_pretrain

        self.session = start_pretrain(ctx, self.args)
