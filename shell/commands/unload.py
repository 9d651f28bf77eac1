"""`llmos unload`: take a model that nobody uses out of memory."""

from __future__ import annotations

import os

from llmos.kernel.errors import Busy, NoSuchThing
from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Values
from llmos.shell.render import size
from llmos.shell.resolve import is_path, local_path, nearest_hint


def run(ctx: Context, values: Values) -> int:
    name = values["model"]
    freed = 0
    with ctx.client() as client:
        everybody = client.ps()
        loaded = [p for p in everybody if p["role"] == "engine"]
        engines = [p for p in loaded if _is(p, name)]
        if not engines:
            names = {p["name"] for p in loaded}
            raise NoSuchThing(
                f"{name} is not loaded", nearest_hint(name, names) if names else "no model is"
            )
        for guest in everybody:
            if guest["role"] == "guest" and any(_same(guest, e) for e in engines):
                raise Busy(
                    f"{name} is in use by process {guest['pid']} ({guest['program']})",
                    f"`llmos kill {guest['pid']}` ends it; or wait until it is done",
                )
        for engine in engines:
            freed += int(client.pause(engine["pid"], release=True)["freed_bytes"])
    if values.get("json"):
        ctx.json({"model": name, "pids": [e["pid"] for e in engines], "freed_bytes": freed})
    else:
        ctx.say(f"{name} is unloaded: {size(freed)} freed")
    return 0


def _is(engine: Record, name: str) -> bool:
    """Is it the engine of the model of that name, or of that folder?"""
    if is_path(name):
        return bool(engine["args"].get("model") == local_path(name, os.getcwd()))
    return name in (engine["name"], engine["args"].get("model"))


def _same(guest: Record, engine: Record) -> bool:
    return bool(guest["args"].get("model") == engine["args"].get("model"))


COMMAND = Command(
    name="unload",
    summary="Take a model that nobody uses out of memory",
    run=run,
    options=(
        Option("model", "a model that is loaded", positional=True, required=True, metavar="MODEL",
               complete="model"),
        JSON,
    ),
    details="Else a model goes when its keep-alive is over, or when somebody needs the memory.",
    examples=("llmos unload smollm2",),
)  # fmt: skip
