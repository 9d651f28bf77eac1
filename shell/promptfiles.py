"""The prompt of `run`: what stands on the command line, in files, and on standard input."""

from __future__ import annotations

import codecs
import os
import stat
import sys
import threading
from collections.abc import Sequence

from llmos.shell.context import Context
from llmos.shell.options import Usage
from llmos.shell.render import size

# What a message to the kernel can hold, with room for what else is in it (kernel/wire.py).
MOST_BYTES = 15 * 1024 * 1024
_TOO_MUCH = "no model of today reads so much at once"
STDIN = "-"
# Somebody who waits for a pipe that nobody writes to should know what for.
SAY_AFTER_S = 3.0


def read_prompt(ctx: Context, prompt: str | None, files: Sequence[str]) -> str | None:
    """All parts of the prompt, an empty line between two; None where there is none at all.

    Standard input is a part where `-` names it, where there is nothing else, and beside a prompt
    when something is sent to it. Raises Usage for what is no text.
    """
    parts = [] if prompt in (None, STDIN) else [str(prompt)]
    parts += [_read_file(name) for name in files if name != STDIN]
    named = prompt == STDIN or STDIN in files
    if named or (not files and (_is_sent() if prompt is not None else _is_given(ctx))):
        parts.append(_read_stdin(ctx))
    if not parts:
        return None
    text = "\n\n".join(parts)
    if len(text.encode()) > MOST_BYTES:
        raise Usage(
            f"the prompt has {size(len(text.encode()))}; at most {size(MOST_BYTES)} can be sent",
            _TOO_MUCH,
        )
    return text


def _is_given(ctx: Context) -> bool:
    """Is standard input ours to read, and not a person's keyboard?"""
    return not ctx.interactive and sys.stdin is not None and not sys.stdin.isatty()


def _is_sent() -> bool:
    """Was something sent to standard input on purpose: a pipe, or a file?"""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_file(name: str) -> str:
    try:
        with open(os.path.expanduser(name), "rb") as f:
            data = f.read(MOST_BYTES + 1)
    except OSError as exc:
        raise Usage(f"{name} cannot be read: {exc.strerror}") from None
    return _text(data, name)


def _read_stdin(ctx: Context) -> str:
    if ctx.interactive:
        raise Usage("standard input is the shell's own here", "-f FILE reads a file")

    def say() -> None:
        ctx.say("reading the prompt from standard input (Ctrl-D ends it, < /dev/null gives none)")

    later = threading.Timer(SAY_AFTER_S, say)
    later.daemon = True
    later.start()
    try:
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    finally:
        later.cancel()
    return _text(data, "standard input")


def _text(data: bytes, name: str) -> str:
    if len(data) > MOST_BYTES:
        raise Usage(f"{name} has more than {size(MOST_BYTES)}", _TOO_MUCH)
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise Usage(f"{name} is no text: it has zero bytes", "a prompt is UTF-8 text")
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise Usage(
            f"{name} is not UTF-8 text: {exc.reason} at byte {exc.start}",
            "`iconv -f LATIN1 -t UTF-8` and the like make it so",
        ) from None
    if not text.strip():
        raise Usage(f"{name} is empty", 'llmos run MODEL "PROMPT", or -f FILE, or a pipe')
    # The newline at the end of a file, or that `echo` adds, is not part of what was meant.
    return text.removesuffix("\n")
