"""Show a process while it runs: its text, its progress, its end; and come back after a break.

Knows the records of a stream, not the program that wrote them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from llmos.kernel import protocol
from llmos.kernel.errors import LlmosError, NoKernel, TimedOut, from_wire
from llmos.shell.client import Client, Record, Stream
from llmos.shell.context import Context
from llmos.shell.processes import reason
from llmos.shell.view import View

# A silence this long makes one ask what the process waits for.
QUIET_S = 2.0
WAITING = frozenset({"waiting", "paused", "preempted", "backoff"})
INTERRUPTED = 130
GONE = "the kernel has gone; waiting for it to come back (`llmos boot` starts it, Ctrl-C leaves)"


class Background(Exception):
    """Ctrl-Z in the interactive shell: leave the process running."""


def follow(
    ctx: Context,
    client: Client,
    pid: int,
    schema: dict[str, Any],
    *,
    offset: int = 0,
    skip_old: bool = False,
    view: View | None = None,
) -> int:
    """Show a process until it ends -> its exit status; 130 when the person leaves with Ctrl-C.

    `skip_old`: what is in the stream already counts, but is not shown (`attach`).
    """
    if view is None:
        view = View(
            ctx, f"{schema['name']} {pid}", quiet=bool(schema.get("foreign")),
            unit=schema.get("progress_unit", "step"),
        )  # fmt: skip
    view.offset = offset
    try:
        with view, _ctrl_z(ctx):
            if skip_old:
                view.offset = _catch_up(client, pid, view)
            if schema["on_interrupt"] == "interrupt":
                ended = _in_foreground(ctx, client, pid, view)
            else:
                ended = _until_end(ctx, client, pid, view)
    except Background:
        ctx.say(f"[{pid}] {schema['name']} goes on in the background; `fg` brings it back")
        return 0
    except KeyboardInterrupt:
        return _interrupted(ctx, pid, schema)
    return report_end(ctx, schema, pid, ended, view)


def _in_foreground(ctx: Context, client: Client, pid: int, view: View) -> Record:
    """As a shell has it: Ctrl-C is the command's, which may still have its say; twice is enough."""
    with ExitStack() as later:
        for number in (signal.SIGINT, signal.SIGKILL, None):
            try:
                return _until_end(ctx, client, pid, view)
            except KeyboardInterrupt:
                if number is None:
                    raise
                # A new line to the kernel: on the old one an answer may be half read.
                client = later.enter_context(ctx.client())
                client.begin(protocol.Kill(pid, number))
    raise AssertionError  # the last round has returned or raised


@contextmanager
def _ctrl_z(ctx: Context) -> Iterator[None]:
    """In the interactive shell Ctrl-Z leaves the process, not the shell."""
    if not ctx.interactive or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise Background

    before = signal.signal(signal.SIGTSTP, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def _catch_up(client: Client, pid: int, view: View) -> int:
    stream = client.attach(pid, follow=False)
    for record in stream:
        view.remember(record)
    return stream.offset


def _until_end(ctx: Context, client: Client, pid: int, view: View) -> Record:
    """Show records until the process ends, over any number of kernels."""
    client.on_lost = lambda: view.note(GONE)
    stream = client.attach(pid, view.offset)
    _show_all(client, pid, stream, view)
    return stream.result or {}


def _show_all(client: Client, pid: int, stream: Stream, view: View) -> None:
    """Show the records to the end; when nothing comes, say once what the process waits for."""
    said = ""
    while True:
        try:
            record = stream.next(QUIET_S)
            with _whole():
                view.show(record)
                view.offset = stream.offset
        except StopIteration:
            return
        except TimedOut:
            try:
                process = client.process(pid)
            except NoKernel:
                continue  # the stream waits for the next one
            why = reason(process)
            why = f"{process['state']}: {why}" if why else ""
            if why and why != said and process["state"] in WAITING:
                view.note(f"{why}  (`llmos explain {pid}` tells more)")
            said = why


@contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits until a record is shown and counted: else it would be shown again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupted(ctx: Context, pid: int, schema: dict[str, Any]) -> int:
    name = schema["name"]
    if schema["on_interrupt"] == "kill":
        # On a line of its own: on the old one an answer may be half read.
        with ctx.client() as client:
            client.kill(pid, 2)
        ctx.say("")
    else:
        ctx.say(f"\ndetached: {name} {pid} goes on")
        ctx.say(f"  `llmos attach {pid}` shows it again, `llmos kill {pid}` ends it")
    return INTERRUPTED


def report_end(ctx: Context, schema: dict[str, Any], pid: int, ended: Record, view: View) -> int:
    """Say how a process ended -> its exit status."""
    status = int(ended.get("exit_status") or 0)
    result = ended.get("result") or {}
    if schema.get("foreign") and (status == 0 or result.get("ended_by") == "itself"):
        return status  # the command has said what there is to say
    if status == 0:
        view.finish(pid, result)
        return 0
    error = result.get("error")
    shown = from_wire(error) if isinstance(error, dict) else _failure(schema, pid, ended)
    ctx.say(f"llmos: {shown.message}")
    if shown.hint:
        ctx.say(f"  {shown.hint}")
    return status


def _failure(schema: dict[str, Any], pid: int, ended: Record) -> LlmosError:
    status, reason = ended.get("exit_status"), ended.get("reason") or ""
    what = f"{reason} (exit status {status})" if reason else f"exit status {status}"
    hint = f"`llmos logs {pid}` shows what it printed, `llmos explain {pid}` its story"
    return LlmosError(f"{schema['name']} {pid} failed: {what}", hint)
