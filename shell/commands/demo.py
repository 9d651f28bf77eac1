"""`llmos demo`: the whole thing on real data, in about two minutes."""

from __future__ import annotations

from pathlib import Path

from llmos.shell.context import Context
from llmos.shell.home import Home
from llmos.shell.options import Command, Option, Values


def demo_home(ctx: Context) -> Home:
    """Beside the user's own home, so that neither gets in the other's way."""
    return Home(Path(f"{ctx.home.path}-demo"))


def run(ctx: Context, values: Values) -> int:
    from llmos.shell.demo.run import Demo, clean

    home = demo_home(ctx)
    if values.get("clean"):
        return clean(ctx, home)
    return Demo(ctx, home).run()


COMMAND = Command(
    name="demo",
    summary="See it work on real data: pretraining, a GAN, fine-tuning and a user in a hurry",
    run=run,
    options=(Option("clean", "remove what the demo left", type="bool"),),
    details="Takes about two minutes on two cores, needs no network, and works in a home of its "
    "own beside yours (HOME-demo), which stays until --clean. Nothing in it is staged.",
    examples=("llmos demo", "llmos demo --clean"),
)
