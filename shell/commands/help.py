"""`llmos help`: all commands by group, or one of them."""

from __future__ import annotations

from typing import Any

from llmos.shell import commands
from llmos.shell.commands.program import listing
from llmos.shell.context import Context
from llmos.shell.helptext import command_help, groups_help
from llmos.shell.options import Command, Option, Values

_INTRO = """\
llmos, an operating system for models. `llmos` alone opens the interactive shell
"""
_OUTRO = """\
`llmos COMMAND --help` shows flags and examples. LLMOS_HOME chooses the home.\
"""


def run(ctx: Context, values: Values) -> int:
    if "topic" in values:
        ctx.print(_topic(ctx, values["topic"]))
        return 0
    manifest = ctx.manifest()
    ctx.print(_INTRO)
    ctx.print(groups_help(overview(manifest)))
    broken = left_out(manifest)
    if broken:
        ctx.print(groups_help([("Left out, because they are broken", broken)]))
    if manifest is None:
        ctx.say("Programs (pretrain, finetune, gan, plugins) are listed once a kernel has run "
                "here:\n`llmos boot` starts one.\n")  # fmt: skip
    ctx.print(_OUTRO)
    return 0


def _topic(ctx: Context, topic: str) -> str:
    """The help of a command, of a program, of a service or of one of its calls."""
    from llmos.shell.commands.call import topic_help
    from llmos.shell.main import find

    if topic not in commands.NAMES:
        found = topic_help(ctx, topic)
        if found is not None:
            return found
    return command_help(find(ctx, topic)).rstrip("\n")


def left_out(manifest: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What is installed and cannot be used, and why."""
    return [(b["name"], b["error"]) for b in (manifest or {}).get("broken", ())]


def overview(manifest: dict[str, object] | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings with names and summaries: ours, then the programs of the manifest."""
    ours = {
        heading: [(name, commands.named(name).summary) for name in names]
        for heading, names in commands.GROUPS.items()
    }
    programs = [(heading, rows) for heading, rows in listing(manifest) if heading not in ours]
    groups = list(ours.items())
    return [*groups[:2], *programs, *groups[2:]]


COMMAND = Command(
    name="help",
    summary="Show the commands, or the help of one",
    run=run,
    options=(
        Option("topic", "a command, a service or SERVICE.CALL", positional=True,
               metavar="COMMAND", complete="topic"),
    ),
    examples=("llmos help", "llmos help pretrain", "llmos help models.show"),
)  # fmt: skip
