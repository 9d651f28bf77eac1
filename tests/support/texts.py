"""Small texts and models for tests, made from a seed."""

from __future__ import annotations

import random
from pathlib import Path

NAMES = ("Ann", "Ben", "Lily", "Tom")
VERBS = ("saw", "found", "lost", "made")
THINGS = ("a red ball", "the old dog", "one tiny box", "her blue hat")


def story_lines(count: int, seed: int = 0) -> list[str]:
    """Sentences that a small model learns quickly."""
    draw = random.Random(seed)
    return [
        f"One day {draw.choice(NAMES)} {draw.choice(VERBS)} {draw.choice(THINGS)}."
        for _ in range(count)
    ]


def story_file(path: Path, count: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(story_lines(count, seed)) + "\n")
    return path


def toy_model(folder: Path, architecture: str, width: int = 32, context: int = 64) -> Path:
    """An untrained model with a tokenizer, as an ordinary model folder."""
    import torch

    from llmos.services.data.base import Document
    from llmos.services.data.tokenizer import train_tokenizer
    from llmos.services.model.families import Shape, build

    tokenizer = train_tokenizer([Document("\n".join(story_lines(50)))], 300, context)
    special: dict[str, int | None] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    shape = Shape(len(tokenizer), context, width, layers=2, heads=2, special=special)
    build(architecture, shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
