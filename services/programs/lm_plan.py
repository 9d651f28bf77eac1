# ruff: noqa: TID253  (imported lazily, by workers only)
"""Predict what a training of a language model needs, and find what is wrong with its input.

Nothing is trained, tokenized or allocated: files are read in part, shapes are on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.data.base import Dialogue, Document, read_text, text_files
from llmos.services.data.tokenizer import plain_text
from llmos.services.model import footprint
from llmos.services.model.families import Shape, build_config
from llmos.services.model.load import (
    check_weights,
    code_is_allowed,
    load_config,
    load_tokenizer,
    resolve_dtype,
    weight_files,
)
from llmos.services.optim.optimizers import check_name
from llmos.services.programs.base import Footprint, planned_device
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_weights import add_adapter, checkpoint_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmos.services.programs.finetune import Finetune
    from llmos.services.programs.pretrain import Pretrain

# So many characters are looked at; what is wrong further on is found when the data is read.
SAMPLE_CHARACTERS = 4_000_000

# Tokens of an example when nobody says how many, if the model takes so many.
USUAL_CONTEXT = 256


def plan_pretrain(args: Pretrain.Args) -> Footprint:
    """Without data nothing is said about it. Raises BadInput, BadArgument."""
    _check_training(args)
    vocab_size = len(load_tokenizer(args.tokenizer)) if args.tokenizer else args.vocab_size
    shape = Shape(vocab_size, args.context, args.width, args.layers, args.heads, args.dropout)

    def make(config: PreTrainedConfig) -> PreTrainedModel:
        return _make(config, args)

    config = build_config(args.arch, shape)
    return footprint.training_footprint(make, config, _step(args))


def with_context(args: Finetune.Args, config: PreTrainedConfig) -> Finetune.Args:
    """The arguments with a context that the model has. Raises BadArgument."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not args.context:
        return replace(args, context=min(USUAL_CONTEXT, limit or USUAL_CONTEXT))
    if limit and args.context > limit:
        raise BadArgument(
            f"the model has {limit} positions, --context is {args.context}",
            f"choose a --context of at most {limit}",
        )
    return args


def plan_finetune(args: Finetune.Args) -> Footprint:
    """Without data nothing is said about it. Raises BadInput, BadArgument."""
    if args.adapter_only and args.method != "lora":
        raise BadArgument("--adapter-only goes with --method lora", "every weight is trained")
    _check_training(args)
    check_weights(args.model)
    config = load_config(args.model)
    load_tokenizer(args.model)
    args = with_context(args, config)
    if args.method == "full":
        return footprint.training_footprint(lambda c: _make(c, args), config, _step(args))

    def make(smaller: PreTrainedConfig) -> torch.nn.Module:
        return add_adapter(
            _make(smaller, args),
            args.lora_rank,
            args.lora_alpha,
            args.lora_dropout,
            args.lora_targets,
        )

    return footprint.training_footprint(make, config, _step(args), _mapped(Path(args.model)))


def _make(config: PreTrainedConfig, args: TrainingArgs) -> PreTrainedModel:
    # Whatever they are stored in: the weights of a training are float32.
    made = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=code_is_allowed()
    )  # type: ignore[no-untyped-call]
    model: PreTrainedModel = made
    checkpoint_gradients(model, args.gradient_checkpointing)
    return model


def _step(args: TrainingArgs) -> footprint.TrainingShape:
    return footprint.TrainingShape(
        batch=args.batch,
        context=args.context,
        dtype=resolve_dtype(args.dtype),
        optimizer=args.optimizer,
        # All that a gang adds: its gradients stay from step to step, as if they were added up.
        accumulate=max(args.accumulate, 1 if args.devices == 1 else 2),
        grad_clip=args.grad_clip,
        device=planned_device(),
        copy=planned_device() == "cpu" and not args.save_in_place,
    )


def _mapped(folder: Path) -> str:
    """The file that frozen weights stay mapped from: one that is stored in float32."""
    if footprint.stored_dtype(folder) is not torch.float32:
        return ""
    return str(weight_files(folder)[0])


def _check_training(args: Pretrain.Args | Finetune.Args) -> None:
    check_name(args.optimizer)
    if not args.data:
        return
    data = Path(args.data)
    characters, whole, pairs = _sample(read_text(data))
    for file, _ in text_files(data):
        # The sample may end before the last file: at least open each.
        with file.open("rb"):
            pass
    # A token is at least one byte, a character at most four of them.
    if whole and not pairs and characters * 4 < args.context + 1:
        raise BadInput(
            f"{data} is too short: {characters} characters, a block has {args.context} tokens",
            "give more text, or a shorter --context",
        )


def _sample(records: Iterator[Document | Dialogue]) -> tuple[int, bool, bool]:
    """(characters seen, whether that is all, whether these are dialogues)."""
    characters, pairs = 0, False
    for record in records:
        characters += len(plain_text(record))
        pairs = isinstance(record, Dialogue)
        if characters > SAMPLE_CHARACTERS:
            return characters, False, pairs
    return characters, True, pairs
