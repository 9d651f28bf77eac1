"""The program that goes on training a model on text or on answers. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmos.services.programs.base import Context, Footprint, arg
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_program import TrainingProgram


class Finetune(TrainingProgram):
    name: ClassVar[str] = "finetune"
    summary: ClassVar[str] = "Go on training a model, on text or on prompts with answers"
    examples: ClassVar[tuple[str, ...]] = (
        "llmos finetune bard questions.jsonl --out bard-answers",
        "llmos finetune stories15M stories.txt --out mine --method lora --lora-rank 16",
        "llmos finetune stories15M stories.txt --out mine --method lora --adapter-only",
    )

    @dataclass(frozen=True, kw_only=True)
    class Args(TrainingArgs):
        model: str = arg(help="the model to go on from", positional=True, model=True)
        data: str = arg(
            help="text (.txt, .jsonl), or .jsonl rows with prompt and answer, or messages; "
            "each also .gz",
            positional=True,
            path=True,
            plan_without=True,
        )
        trust_remote_code: bool = arg(
            False, help="run code that lies in the model's folder, for this run"
        )
        method: str = arg(
            "full", help="train every weight, or a LoRA adapter", choices=("full", "lora")
        )
        lora_rank: int = arg(8, help="rank of the adapter", minimum=1)
        lora_alpha: int = arg(16, help="scale of the adapter", minimum=0)
        lora_dropout: float = arg(0.0, help="dropout of the adapter", minimum=0, maximum=0.99)
        lora_targets: list[str] = arg([], help="linear layers it changes (default: all)")
        adapter_only: bool = arg(
            False, help="make the LoRA adapter alone, without a merged model", shape=False
        )
        epochs: float = arg(3.0, help="times the data is seen", minimum=0.001, shape=False)
        steps: int = arg(0, help="steps of training, in place of epochs", minimum=0, shape=False)
        lr: float = arg(5e-4, help="highest learning rate", minimum=0, shape=False)
        batch: int = arg(8, help="examples in a micro-batch", minimum=1)
        context: int = arg(
            0, help="tokens in an example (0: 256, or as many as the model takes)", minimum=0
        )

    @classmethod
    def plan(cls, args: Args) -> Footprint:
        from llmos.services.model.load import allow_code
        from llmos.services.programs.lm_plan import plan_finetune

        allow_code(args.trust_remote_code)
        return plan_finetune(args)

    def load(self, ctx: Context) -> None:
        from llmos.services.model.load import allow_code
        from llmos.services.programs.lm_start import start_finetune

        allow_code(self.args.trust_remote_code)
        self.session = start_finetune(ctx, self.args)
