"""`llmos help`: all commands by group, or one of them."""

from __future__ import annotations

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
        from llmos.shell.main import find

        ctx.print(command_help(find(ctx, values["topic"])).rstrip("\n"))
        return 0
    manifest = ctx.manifest()
    ctx.print(_INTRO)
    ctx.print(groups_help(overview(manifest)))
    if manifest is None:
        ctx.say("Programs (pretrain, finetune, gan, plugins) are listed once a kernel has run "
                "here:\n`llmos boot` starts one.\n")  # fmt: skip
    ctx.print(_OUTRO)
    return 0


def overview(manifest: dict[str, object] | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings with names and summaries: ours, then the programs of the manifest."""
    ours = {
        heading: [(name, commands.load(name).summary) for name in names]
        for heading, names in commands.GROUPS.items()
    }
    programs = [(heading, rows) for heading, rows in listing(manifest) if heading not in ours]
    groups = list(ours.items())
    return [*groups[:2], *programs, *groups[2:]]


COMMAND = Command(
    name="help",
    summary="Show the commands, or the help of one",
    run=run,
    options=(Option("topic", "a command", positional=True, metavar="COMMAND", complete="command"),),
    examples=("llmos help", "llmos help pretrain"),
)
