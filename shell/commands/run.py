"""`llmos run`: continue a prompt with a model: program `infer`, attached."""

from __future__ import annotations

import sys

from llmos.shell.commands.program import launch
from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Usage, Values


def run(ctx: Context, values: Values) -> int:
    prompt = values.get("prompt")
    if prompt is None and (sys.stdin.isatty() or ctx.interactive):
        raise Usage("PROMPT is missing: the text to continue",
                    'llmos run MODEL "PROMPT", or give it on standard input')  # fmt: skip
    if prompt in (None, "-"):
        values = {**values, "prompt": _read_prompt()}
    return launch(ctx, COMMAND.program, values)


def _read_prompt() -> str:
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as exc:
        raise Usage(f"the prompt on standard input is not UTF-8 text ({exc.reason})") from None
    # The newline that `echo` adds is not part of what was meant.
    return text[:-1] if text.endswith("\n") else text


COMMAND = Command(
    name="run",
    summary="Continue a prompt with a model; the text streams to stdout",
    run=run,
    program="infer",
    optional=("prompt",),
    options=(Option("stats", "print tokens and speed to stderr at the end", type="bool",
                    short="-v"),),
    details="Without PROMPT, or with -, the prompt is read from standard input. Ctrl-C ends it.",
)  # fmt: skip
