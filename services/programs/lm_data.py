# ruff: noqa: TID253  (imported lazily, by workers only)
"""Bring the data of a training into tokens, once in the life of a process.

The result lies in the work folder of the process: a restored run maps the very same arrays,
also when the files that they came from have changed since.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmos.kernel.errors import BadInput
from llmos.services.data import packing
from llmos.services.data import tokenizer as tokens
from llmos.services.data.base import Dialogue, read_text
from llmos.services.model.load import load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """Data as a training uses it."""

    tokenizer: PreTrainedTokenizerBase
    training: packing.Subset
    validation: packing.Subset
    digest: str
    dropped: int = 0


def prepare(
    work: Path,
    data: str,
    context: int,
    make_tokenizer: Callable[[], PreTrainedTokenizerBase],
    *,
    pairs: bool,
    val_fraction: float,
    seed: int,
) -> Prepared:
    """Tokenize `data`, or map what an earlier worker of this process has tokenized.

    With `pairs`, dialogues are learnt as questions with answers; otherwise everything is
    running text. Raises BadInput.
    """
    folder = work / "data"
    if not folder.is_dir():
        aside = work / "data.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _tokenize(aside, Path(data), context, make_tokenizer(), pairs=pairs)
        os.rename(aside, folder)
    info = json.loads((folder / "info.json").read_text())
    tokenizer = load_tokenizer(folder / "tokenizer")
    whole, arrays = _open(folder, info, context, tokenizer)
    _check_enough(whole, info, data, context, val_fraction)
    training, validation = packing.split(whole, val_fraction, seed)
    return Prepared(tokenizer, training, validation, packing.digest(*arrays), info["dropped"])


def has_pairs(data: Path) -> bool:
    """Whether the first record of the data is a dialogue. Raises BadInput."""
    return isinstance(next(read_text(data)), Dialogue)


def _tokenize(
    folder: Path,
    data: Path,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: bool,
) -> None:
    info: dict[str, Any] = {"pairs": pairs, "dropped": 0}
    if pairs:
        tokens.ensure_chat_template(tokenizer)
        row, learn, starts, info["dropped"] = tokens.tokenize_dialogues(
            read_text(data), tokenizer, context
        )
        packing.save_arrays(folder, tokens=row, learn=learn, starts=starts)
    else:
        packing.save_arrays(folder, tokens=tokens.tokenize_text(read_text(data), tokenizer))
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "info.json").write_text(json.dumps(info))


def _open(
    folder: Path, info: dict[str, Any], context: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[packing.Examples, list[packing.Tokens]]:
    row = packing.map_array(folder / "tokens.npy")
    if not info["pairs"]:
        return packing.Blocks(row, context), [row]
    learn = packing.map_array(folder / "learn.npy")
    starts = np.array(packing.map_array(folder / "starts.npy"))
    pad = tokenizer.pad_token_id
    whole = packing.Dialogues(row, learn, starts, tokenizer.eos_token_id if pad is None else pad)
    return whole, [row, learn, starts]


def _check_enough(
    whole: packing.Examples, info: dict[str, Any], data: str, context: int, val_fraction: float
) -> None:
    need = 2 if val_fraction > 0 else 1
    if len(whole) >= need:
        return
    if info["pairs"]:
        raise BadInput(
            f"{data} has {len(whole)} pairs that fit into {context} tokens "
            f"({info['dropped']} are longer), and {need} are needed",
            "give more pairs, or a longer --context",
        )
    raise BadInput(
        f"{data} is too short: {len(whole)} blocks of {context} tokens, and {need} are needed",
        "give more text, or a shorter --context",
    )
