"""One run of somebody's command: started, its output taken, its script listened to, ended.

A hold needs nothing from here (it stops the whole process group). A signal that is to end the
process reaches the command and this worker alike: the worker waits for the command, which may
still have its say, and ends what is left of it after `GRACE_S`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from llmos.kernel.errors import BadInput, IllegalMove, LlmosError, TimedOut
from llmos.services.programs.base import Context, Done, Report, Waiting
from llmos.services.programs.exec_channel import Channel
from llmos.services.programs.exec_child import PIECE_BYTES, Child
from llmos.services.programs.exec_command import environment, find_command

# How long a command may take to end after a signal that asks for it; then it is killed.
# `llmos kill` waits for 30 s, a shutdown for 60 s.
GRACE_S = 10.0

# How long a script may take to its next safepoint. Longer, and a shutdown would not wait for it.
SAFEPOINT_S = 45.0

# Small pieces of output are collected for so long: a script that prints each line by itself would
# otherwise wake the worker, the kernel and the reader for each.
COLLECT_S = 0.005

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT, signal.SIGUSR1,
          signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM)  # fmt: skip

# What a shell gives for a command that it could not find, and for one that it could not execute.
NOT_FOUND, NOT_EXECUTED = 127, 126

_MEMORY = re.compile(
    rb"MemoryError|OutOfMemoryError|can't allocate memory|out of memory|std::bad_alloc", re.I
)


class Session:
    def __init__(self, args: Any, ctx: Context) -> None:
        self._args, self._ctx = args, ctx
        self._folder: Path | None = None
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._deadline: float | None = None  # when a command that was asked to end is killed
        self._asked = 0  # the signal that asked
        self._killed = False  # by us, after the deadline
        self._collect_until = 0.0
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for number in ENDING:
            signal.signal(number, self._on_signal)

    @property
    def can_save(self) -> bool:
        return self._channel is not None and self._channel.can_save

    def resume_from(self, folder: Path) -> None:
        """The script goes on from this checkpoint, when it asks."""
        self._folder = folder

    # ---- the worker's calls ----

    def step(self) -> Report | Done | Waiting:
        """Begin, take what has come, and say what to wait for next."""
        if self._child is None:
            try:
                self._begin()
            except LlmosError as exc:
                denied = isinstance(exc.__cause__, PermissionError)
                code = NOT_EXECUTED if denied else NOT_FOUND
                return Done(code, exc.message, {"error": exc.to_wire()})
        child, channel = self._child, self._channel
        assert child is not None
        assert channel is not None
        if channel.at is not None:
            channel.order("go")  # a checkpoint is done, or nobody wants one any more
        status = self._take()
        if channel.reports:
            return channel.reports.popleft()
        return self._waiting() if status is None else self._done(child, status)

    def save(self, folder: Path) -> int:
        """Have the script write a checkpoint -> its step; the script stands there until `step`."""
        channel = self._channel
        if channel is None or not channel.can_save:
            raise TimedOut("the script is outside of its loop: it comes to no safepoint now")
        if channel.at is None:
            channel.order("safepoint")
            self._attend(lambda: channel.at is not None, SAFEPOINT_S)
        step = channel.at
        assert step is not None
        channel.order("write", folder=str(folder))
        self._attend(lambda: channel.written)
        channel.at = step  # it waits for `go`, or for `stop`
        return step

    def close(self) -> None:
        """End the command, if it still runs, and whoever else is left of its tree."""
        child, channel = self._child, self._channel
        if child is not None and channel is not None:
            if child.status() is None:
                if channel.at is not None:
                    channel.order("stop")
                else:
                    child.signal_tree(signal.SIGTERM)
                self._ask_to_end(signal.SIGTERM)
                while self._take() is None:
                    self._wait(None)
            child.kill_tree()
            self._drain(child)
            child.close()
            channel.close()
        os.close(self._bell)

    # ---- inside ----

    def _begin(self) -> None:
        args, ctx = self._args, self._ctx
        file = find_command(args.command, args.cwd, args.search_path)
        step = int(self._folder.name.removeprefix("step-")) if self._folder else 0
        channel = Channel(ctx.work / "steps", step, self._folder)
        try:
            env = environment(ctx, ctx.work / "steps")
            self._child = Child(file, args.command, args.cwd, env)
        except OSError as exc:
            channel.close()
            hint = "does its first line name an interpreter that is there (#!/usr/bin/env python)?"
            bad = exc.errno in (errno.ENOEXEC, errno.ENOENT)
            error = BadInput(f"{file} cannot be run: {exc.strerror}", hint if bad else "")
            raise error from exc
        self._channel = channel

    def _take(self) -> int | None:
        """Output, frames, the end -> the command's exit status, None while it runs."""
        child, channel = self._child, self._channel
        assert child is not None
        assert channel is not None
        if time.monotonic() >= self._collect_until:
            self._pass_on(child)
        channel.read()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._killed, self._deadline = True, None
            child.kill_tree()
        return child.status()

    def _pass_on(self, child: Child) -> int:
        """Output goes to the log and to who is attached -> the bytes of the largest piece."""
        largest = 0
        for number, data in child.read():
            os.write(number, data)  # the worker's own stdout and stderr are the process's log
            self._ctx.emit("output", fd=number, data=data)
            largest = max(largest, len(data))
        if 0 < largest < PIECE_BYTES:
            self._collect_until = time.monotonic() + COLLECT_S
        return largest

    def _drain(self, child: Child) -> None:
        while self._pass_on(child):
            pass

    def _waiting(self) -> Waiting:
        child, channel = self._child, self._channel
        assert child is not None
        assert channel is not None
        now = time.monotonic()
        limits = [] if self._deadline is None else [self._deadline - now]
        on: tuple[int, ...] = (self._bell, child.pidfd, *channel.fds)
        if now < self._collect_until:
            limits.append(self._collect_until - now)
        else:
            on += tuple(child.pipes)
        return Waiting(on, min(limits, default=None))

    def _wait(self, at_most_s: float | None) -> None:
        """What the worker does with a Waiting, for those that wait in here."""
        waiting = self._waiting()
        limits = [s for s in (waiting.at_most_s, at_most_s) if s is not None]
        poll = select.poll()
        for fd in waiting.on:
            poll.register(fd, select.POLLIN)
        poll.poll(max(0.0, min(limits)) * 1000 if limits else None)

    def _attend(self, until: Callable[[], bool], limit_s: float | None = None) -> None:
        """Wait for the script. Raises TimedOut, IllegalMove when it has ended."""
        channel, began = self._channel, self._ctx.clock()
        assert channel is not None
        while not until():
            left = None if limit_s is None else limit_s - (self._ctx.clock() - began)
            if left is not None and left <= 0:
                raise TimedOut(f"the script came to no safepoint in {limit_s:.0f} s")
            self._wait(left)
            if self._take() is not None:
                raise IllegalMove("the script ended before it had written a checkpoint")
            if not channel.can_save:
                raise TimedOut("the script left its loop before it had written a checkpoint")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ask_to_end(number)
        os.eventfd_write(self._bell, 1)

    def _ask_to_end(self, number: int) -> None:
        if self._deadline is None and not self._killed:
            self._asked = number
            self._deadline = time.monotonic() + GRACE_S

    def _done(self, child: Child, status: int) -> Done:
        child.kill_tree()  # what it left running in the background ends with it
        self._drain(child)
        if status == 0:
            return Done(0, "", {"ended_by": "itself"})
        if self._killed:
            name = signal.Signals(self._asked).name
            return Done(status, f"killed: it did not end in {GRACE_S:.0f} s after {name}")
        return _failure(status, child.error_tail, self._args.memory)


def _failure(status: int, error_tail: bytes, memory: str) -> Done:
    """What is known of why a command failed."""
    declared = f"it declared {memory}" if memory else "it declared nothing, so 1GiB"
    if _MEMORY.search(error_tail):
        reason = f"out of memory ({declared}): give it more with --memory, or make it need less"
        return Done(status, reason, {"ended_by": "memory"})
    if status > 128 and status - 128 in set(signal.Signals):
        name = signal.Signals(status - 128).name
        why = f"; was the memory short? {declared}" if name == "SIGKILL" else ""
        return Done(status, f"its command was ended by {name}{why}", {"ended_by": "signal"})
    lines = error_tail.decode(errors="replace").strip().splitlines()
    last = f": {lines[-1].strip()[:200]}" if lines else ""
    return Done(status, f"exit status {status}{last}", {"ended_by": "itself"})
