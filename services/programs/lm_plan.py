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

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.data.base import Dialogue, Document, read_text, text_files
from llmos.services.data.tokenizer import plain_text
from llmos.services.model import footprint
from llmos.services.model.families import Shape, build_config
from llmos.services.model.load import (
    check_weights,
    load_config,
    load_tokenizer,
    resolve_dtype,
    weight_files,
)
from llmos.services.optim.optimizers import check_name
from llmos.services.programs.base import Footprint
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_weights import add_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmos.services.programs.finetune import Finetune
    from llmos.services.programs.pretrain import Pretrain

# So many characters are looked at; what is wrong further on is found when the data is read.
SAMPLE_CHARACTERS = 4_000_000

# Tokens of an example when nobody says how many, if the model takes so many.
USUAL_CONTEXT = 256


def plan_pretrain(args: Pretrain.Args) -> Footprint:
    """Raises BadInput, BadArgument."""
    _check_training(args, Path(args.data))
    vocab_size = len(load_tokenizer(args.tokenizer)) if args.tokenizer else args.vocab_size
    shape = Shape(vocab_size, args.context, args.width, args.layers, args.heads, args.dropout)
    config = build_config(args.arch, shape)
    model = footprint.on_meta(config)
    return footprint.training_footprint(model, config, _step(args))


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
    """Raises BadInput, BadArgument."""
    _check_training(args, Path(args.data))
    check_weights(args.model)
    config = load_config(args.model)
    load_tokenizer(args.model)
    args = with_context(args, config)
    model = footprint.on_meta(config)
    if args.method == "full":
        return footprint.training_footprint(model, config, _step(args))
    with torch.device("meta"):
        adapted = add_adapter(
            model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets
        )
    return footprint.training_footprint(adapted, config, _step(args), _mapped(Path(args.model)))


def _step(args: TrainingArgs) -> footprint.TrainingShape:
    value_bytes = resolve_dtype(args.dtype).itemsize
    return footprint.TrainingShape(args.batch, args.context, value_bytes, args.optimizer)


def _mapped(folder: Path) -> str:
    """The file that frozen weights stay mapped from: one that is stored in float32."""
    if footprint.stored_dtype(folder) is not torch.float32:
        return ""
    return str(weight_files(folder)[0])


def _check_training(args: TrainingArgs, data: Path) -> None:
    check_name(args.optimizer)
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
