"""Keys and values of a guest's text in a file, while its blocks are needed elsewhere or its engine
is gone. To read them back is to fill the prefix cache: whoever begins with these tokens finds them.

Whether that is cheaper than to compute the text again is measured: bytes per second of the files so
far, against tokens per second of the prompts so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmos.services.engine.blocks import Table
from llmos.services.engine.model import PagedModel
from llmos.services.model.load import weight_files

FILE = "kv.safetensors"

# Before any was written: a common disk behind the system's cache.
GUESSED_BYTES_PER_S = 500e6

# So much of what is free on the disk one file takes at most.
MOST_OF_FREE = 0.25


class Spill:
    """Files of one engine's texts. `model`: the folder that it was loaded from."""

    def __init__(self, model: str, dtype: Any) -> None:
        files = weight_files(Path(model)) if Path(model).is_dir() else []
        told = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        self._identity = json.dumps([model, str(dtype), told])
        self._bytes_per_s = GUESSED_BYTES_PER_S

    def pays(self, model: PagedModel, tokens: int, tokens_per_s: float) -> bool:
        """Whether writing and reading so many tokens is cheaper than computing them again."""
        return 2 * tokens * model.pool.shape.token_bytes / self._bytes_per_s < tokens / tokens_per_s

    def write(self, folder: Path, model: PagedModel, table: Table, ids: Sequence[int]) -> bool:
        """The known blocks of a text -> whether the disk took them. What was there is replaced."""
        blocks = table.blocks[: table.known]
        nbytes = len(blocks) * model.pool.shape.block_bytes
        began = time.perf_counter()
        aside = folder / f"{FILE}.new"
        try:
            if not blocks or nbytes > MOST_OF_FREE * shutil.disk_usage(folder).free:
                return False
            data = model.pool.out(blocks)
            kept = list(ids[: len(blocks) * model.blocks.size])
            told = {"identity": self._of(table.salt), "ids": json.dumps(kept)}
            save_file({"kv": data}, aside, metadata=told)
            os.replace(aside, folder / FILE)
        except (OSError, SafetensorError):
            aside.unlink(missing_ok=True)
            return False
        self._took(nbytes, time.perf_counter() - began)
        return True

    def read(self, folder: Path, model: PagedModel, salt: Any) -> int:
        """Bring back what was written; the file goes -> how many tokens are known again.

        None are when another model or adapter has written it, or when there is no room.
        """
        path = folder / FILE
        began = time.perf_counter()
        try:
            with safe_open(path, "pt") as opened:
                told = opened.metadata() or {}
                if told.get("identity") != self._of(salt):
                    return 0
                ids = [int(i) for i in json.loads(told["ids"])]
                data = opened.get_tensor("kv")
        except (OSError, SafetensorError, ValueError, KeyError):
            return 0
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        if tuple(data.shape[1:]) != tuple(model.pool.data.shape[1:]):
            return 0
        # One more: of a whole text the last token is left to be computed.
        table = model.blocks.begin([*ids, 0], salt)
        have = len(table.blocks)
        if model.blocks.grow(table, table.cached, len(ids)) is not None:
            model.pool.back(table.blocks[have:], data[have : len(table.blocks)])
            model.blocks.computed(table, ids, len(ids))
        tokens = table.known * model.blocks.size
        model.blocks.release(table)
        self._took(data.nbytes, time.perf_counter() - began)
        return tokens

    def _of(self, salt: Any) -> str:
        return f"{self._identity} {salt or ''}"

    def _took(self, nbytes: int, seconds: float) -> None:
        if nbytes > 1 << 20 and seconds > 0:
            self._bytes_per_s += 0.3 * (nbytes / seconds - self._bytes_per_s)
