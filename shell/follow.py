"""Show a process while it runs: its text, its progress, its end; and come back after a break.

Knows the records of a stream, not the program that wrote them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from llmos.kernel.errors import LlmosError, NoKernel, TimedOut, from_wire
from llmos.shell.client import Client, Record, Stream
from llmos.shell.context import Context
from llmos.shell.render import duration
from llmos.shell.view import View

# How long to wait for a kernel that went away while its processes are alive.
KERNEL_BACK_S = 60.0
# A silence this long makes one ask what the process waits for.
QUIET_S = 2.0
WAITING = frozenset({"waiting", "paused", "preempted", "backoff"})
INTERRUPTED = 130


class Background(Exception):
    """Ctrl-Z in the interactive shell: leave the process running."""


def follow(
    ctx: Context,
    client: Client,
    pid: int,
    schema: dict[str, Any],
    *,
    offset: int = 0,
    stats: bool = False,
    skip_old: bool = False,
) -> int:
    """Show a process until it ends -> its exit status; 130 when the person leaves with Ctrl-C.

    `skip_old`: what is in the stream already counts, but is not shown (`attach`).
    """
    view = View(ctx, label=f"{schema['name']} {pid}", stats=stats)
    try:
        with view, _ctrl_z(ctx):
            if skip_old:
                offset = _catch_up(client, pid, view)
            ended = _until_end(ctx, client, pid, offset, view)
    except Background:
        ctx.say(f"[{pid}] {schema['name']} goes on in the background; `fg` brings it back")
        return 0
    except KeyboardInterrupt:
        return _interrupted(ctx, pid, schema)
    return report_end(ctx, schema, pid, ended, view)


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


def _until_end(ctx: Context, client: Client, pid: int, offset: int, view: View) -> Record:
    """Show records until the process ends, over any number of kernels."""
    with ExitStack() as later:
        while True:
            stream: Stream | None = None
            try:
                stream = client.attach(pid, offset)
                _show_all(client, pid, stream, view)
                return stream.result or {}
            except NoKernel:
                offset = stream.offset if stream is not None else offset
                view.note("the kernel has gone; waiting for it to come back (Ctrl-C leaves)")
            client = later.enter_context(_wait_for_kernel(ctx))


def _show_all(client: Client, pid: int, stream: Stream, view: View) -> None:
    """Show the records to the end; when nothing comes, say once what the process waits for."""
    said = ""
    while True:
        try:
            view.show(stream.next(QUIET_S))
        except StopIteration:
            return
        except TimedOut:
            process = client.process(pid)
            why = f"{process['state']}: {process['reason']}" if process["reason"] else ""
            if why and why != said and process["state"] in WAITING:
                view.note(f"{why}  (`llmos explain {pid}` tells more)")
            said = why


def _wait_for_kernel(ctx: Context) -> Client:
    deadline = time.monotonic() + KERNEL_BACK_S
    while True:
        try:
            return Client(ctx.home.path)
        except NoKernel:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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
    if status == 0:
        if view.made_text:
            view.statistics(result)
        else:
            _print_result(ctx, schema, pid, result, view)
        return 0
    error = result.get("error")
    shown = from_wire(error) if isinstance(error, dict) else _failure(schema, pid, ended)
    ctx.say(f"llmos: {shown.message}")
    if shown.hint:
        ctx.say(f"  {shown.hint}")
    return status


def _print_result(
    ctx: Context, schema: dict[str, Any], pid: int, result: Record, view: View
) -> None:
    took = f" in {duration(view.elapsed_s)}" if view.elapsed_s else ""
    ctx.say(f"{schema['name']} {pid} is done{took}")
    width = max((len(key) for key in result), default=0)
    ctx.lines(f"{key.ljust(width)}  {_plain(value)}" for key, value in result.items())


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _failure(schema: dict[str, Any], pid: int, ended: Record) -> LlmosError:
    status, reason = ended.get("exit_status"), ended.get("reason") or ""
    what = f"{reason} (exit status {status})" if reason else f"exit status {status}"
    hint = f"`llmos logs {pid}` shows what it printed, `llmos explain {pid}` its story"
    return LlmosError(f"{schema['name']} {pid} failed: {what}", hint)
