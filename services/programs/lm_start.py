# ruff: noqa: TID253  (imported lazily, by workers only)
"""Make the session of a pretraining or a fine-tuning: tokens, model, optimizer.

It does not know steps or checkpoints.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from llmos.services.data.base import read_text
from llmos.services.data.tokenizer import train_tokenizer
from llmos.services.model.families import Shape, build
from llmos.services.model.load import load_causal_lm, load_config, load_tokenizer
from llmos.services.programs import lm_data, lm_state
from llmos.services.programs.base import Context
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_gang import Gang
from llmos.services.programs.lm_loop import Loop
from llmos.services.programs.lm_plan import with_context
from llmos.services.programs.lm_session import Session
from llmos.services.programs.lm_weights import (
    Adapter,
    Weights,
    Whole,
    add_adapter,
    align,
    checkpoint_gradients,
)

if TYPE_CHECKING:
    from llmos.services.programs.finetune import Finetune
    from llmos.services.programs.pretrain import Pretrain


def start_pretrain(ctx: Context, args: Pretrain.Args) -> Session:
    """A new model on text. Raises BadInput, BadArgument."""
    _set_threads(ctx, args)

    def make_tokenizer() -> PreTrainedTokenizerBase:
        if args.tokenizer:
            return load_tokenizer(args.tokenizer)
        return train_tokenizer(read_text(Path(args.data)), args.vocab_size, args.context)

    def prepare() -> lm_data.Prepared:
        return lm_data.prepare(
            ctx.work,
            args.data,
            args.context,
            make_tokenizer,
            pairs=False,
            val_fraction=args.val_fraction,
            seed=args.seed,
        )

    gang = Gang(ctx)
    with ctx.gate.away():
        data = gang.in_turn(prepare)
    lm_state.seed_all(args.seed)
    model = build(args.arch, shape_of(args, data.tokenizer))
    checkpoint_gradients(model, args.gradient_checkpointing)
    loop = Loop(model, args, ctx, gang)
    gang.part_ways(args.seed)
    made_by = {"program": "pretrain", "from": args.data}
    return Session(ctx, args, Whole(model), loop, data, args.steps, made_by)


def start_finetune(ctx: Context, args: Finetune.Args) -> Session:
    """A model that there is, on more text or on answers. Raises BadInput, BadArgument."""
    _set_threads(ctx, args)
    args = with_context(args, load_config(args.model))

    def prepare() -> lm_data.Prepared:
        # A restored run has its data in tokens already: the file may be gone.
        pairs = not (ctx.work / "data").is_dir() and lm_data.has_pairs(Path(args.data))
        return lm_data.prepare(
            ctx.work,
            args.data,
            args.context,
            lambda: load_tokenizer(args.model),
            pairs=pairs,
            val_fraction=args.val_fraction,
            seed=args.seed,
        )

    gang = Gang(ctx)
    with ctx.gate.away():
        data = gang.in_turn(prepare)
    if data.dropped:
        text = f"{data.dropped} pairs are longer than --context {args.context} and are left out"
        ctx.emit("note", text=text)
    lm_state.seed_all(args.seed)
    model, weights = _trainable(args)
    loop = Loop(model, args, ctx, gang)
    gang.part_ways(args.seed)
    per_step = args.batch * args.accumulate * gang.size
    steps = args.steps or math.ceil(args.epochs * len(data.training) / per_step)
    made_by = {"program": "finetune", "from": args.model, "data": args.data, "method": args.method}
    return Session(ctx, args, weights, loop, data, steps, made_by)


def shape_of(args: Pretrain.Args, tokenizer: PreTrainedTokenizerBase) -> Shape:
    """The shape of a new model for this tokenizer."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Shape(
        len(tokenizer), args.context, args.width, args.layers, args.heads, args.dropout, special
    )


def _trainable(args: Finetune.Args) -> tuple[torch.nn.Module, Weights]:
    model = load_causal_lm(args.model, "float32")
    checkpoint_gradients(model, args.gradient_checkpointing)
    if args.method == "full":
        align(model)
        return model, Whole(model)
    # Frozen weights may stay where they are mapped: their place in the file is always the same.
    adapted = add_adapter(
        model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets
    )
    return adapted, Adapter(adapted, args.model, args.adapter_only)


def _set_threads(ctx: Context, args: TrainingArgs) -> None:
    threads = args.threads or ctx.threads
    torch.set_num_threads(threads)
    # Read once by the tokenizers' thread pool, when it first works.
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
