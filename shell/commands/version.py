"""`llmos version`: which llmos this is."""

from __future__ import annotations

import platform
from importlib import metadata

from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Values

# What decides about results, without importing any of it.
PARTS = ("torch", "transformers")


def run(ctx: Context, values: Values) -> int:
    found = {"llmos": metadata.version("llmos"), "python": platform.python_version()}
    for part in PARTS:
        try:
            found[part] = metadata.version(part)
        except metadata.PackageNotFoundError:
            found[part] = ""
    if values.get("json"):
        ctx.json(found)
        return 0
    rest = ", ".join(f"{k} {v or 'missing'}" for k, v in found.items() if k != "llmos")
    ctx.print(f"llmos {found['llmos']} ({rest})")
    return 0


COMMAND = Command(
    name="version",
    summary="Which llmos this is",
    run=run,
    options=(JSON,),
    examples=("llmos version",),
)
