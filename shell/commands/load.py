"""`llmos load`: have a model in memory before somebody uses it, and keep it there."""

from __future__ import annotations

import time

from llmos.kernel.errors import LlmosError
from llmos.kernel.units import FOR_EVER
from llmos.shell.client import Client, Record
from llmos.shell.context import Context
from llmos.shell.follow import WAITING
from llmos.shell.options import JSON, Command, Option, Values
from llmos.shell.processes import reason
from llmos.shell.render import duration

_POLL_S = 0.05

# Longer than a model of some gigabytes takes: then one asks what it waits for.
QUIET_S = 2.0


def run(ctx: Context, values: Values) -> int:
    keep_s = values.get("keep_alive_s", FOR_EVER)
    args: Values = {name: values[name] for name in ("model", "dtype") if name in values}
    with ctx.client() as client:
        pid = client.submit(
            "engine", {**args, "keep_alive_s": keep_s}, device=values.get("device", "")
        )
        engine = _loaded(ctx, client, pid)
    if values.get("json"):
        ctx.json({"pid": pid, "model": values["model"], "keep_alive_s": keep_s})
        return 0
    until = "until it is unloaded" if keep_s < 0 else f"for {duration(keep_s)} after its last use"
    ctx.say(f"{values['model']} is loaded on {engine['device']} (engine {pid}), {until}")
    return 0


def _loaded(ctx: Context, client: Client, pid: int) -> Record:
    """Wait until an engine has its model. Raises LlmosError when it ends first."""
    said, began = "", time.monotonic()
    while True:
        engine = client.process(pid)
        if engine["state"] == "exited":
            raise LlmosError(f"it could not be loaded: {engine['reason']}",
                             f"`llmos logs {pid}` shows what it printed")  # fmt: skip
        if engine["started_at"] is not None:
            return engine
        why = f"{engine['state']}: {reason(engine)}"
        if engine["state"] in WAITING and why != said and time.monotonic() - began > QUIET_S:
            ctx.say(f"{why}  (`llmos explain {pid}` tells more)")
            said = why
        time.sleep(_POLL_S)


COMMAND = Command(
    name="load",
    summary="Load a model into memory and keep it there",
    run=run,
    options=(
        Option("model", "a model, a folder or a hub name", positional=True, required=True,
               metavar="MODEL", complete="model"),
        Option("keep_alive_s", "keep it so long after its last use; default: until it is unloaded",
               type="duration", metavar="TIME", minimum=FOR_EVER),
        Option("dtype", "number format of the weights"),
        Option("device", "on this device; default: the kernel chooses"),
        JSON,
    ),
    details="Of a model that is loaded already it changes how long it stays. Where somebody else "
    "needs the memory, a model that nobody uses at that moment goes, however long it was to stay.",
    examples=("llmos load smollm2", "llmos load smollm2 --keep-alive 2h"),
)  # fmt: skip
