"""An adapter that is named as a model: the model is its base, and it the adapter on it.

What an adapter is, only workers know; here is read which model it names as its own.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, NoSuchThing

CONFIG = "adapter_config.json"
_MOST_BYTES = 1 << 20  # of that file: it holds a few lines


def on_its_base(
    schema: dict[str, Any],
    args: dict[str, Any],
    asked: str,
    uid: int | None,
    resolve_model: Callable[[str], str],
) -> dict[str, Any]:
    """The arguments of a guest, with `model` and `adapter` where `model` is an adapter alone.

    `asked`: what the user called it. `uid`: whose file it must be, or be shared with; None reads
    all. Raises NoSuchThing without its base, BadArgument with an adapter on an adapter.
    """
    takes_one = any(f["name"] == "adapter" for f in schema["args"])
    if not (schema["engine"] and takes_one and str(args.get("model", "")).startswith("/")):
        return args
    base = base_of(Path(args["model"]), uid)
    if base is None:
        return args
    if args["adapter"]:
        raise BadArgument(
            f"{asked} is an adapter itself: it cannot have another one",
            "name its base model, and one adapter",
        )
    try:
        return {**args, "model": resolve_model(base), "adapter": args["model"]}
    except NoSuchThing as exc:
        why = f"on {base}: {exc.message}" if base else "on a model that it does not name"
        raise NoSuchThing(
            f"{asked} is an adapter {why}", f"name one: `llmos run MODEL --adapter {asked}`"
        ) from None


def base_of(folder: Path, uid: int | None) -> str | None:
    """Which model the adapter in a folder names; None when it is none, or is not to be read."""
    if (folder / "config.json").exists():
        return None
    # A user may put anything under this name: the kernel must neither wait for it nor tell of it.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if uid is None else os.O_NOFOLLOW)
    try:
        handle = os.open(folder / CONFIG, flags)
    except OSError:
        return None
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        is_open = uid is None or status.st_uid == uid or status.st_mode & stat.S_IRGRP
        if not (stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_BYTES and is_open):
            return None
        try:
            found = json.loads(file.read())
        except ValueError:
            return None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) else ""
