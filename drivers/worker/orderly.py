"""An orderly end: who is asked to end (SIGTERM) does so between two steps.

Python runs a signal's handler in the main thread, and only when that thread comes back to the
interpreter. A worker that is stopped when the signal comes may take it in another thread after it
goes on; its main thread then waits for its next message for ever. So the signal is read from a pipe
(signal.set_wakeup_fd), by a thread that says the rest.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def on_term(ask: Callable[[], None]) -> None:
    """`ask` is called, in a thread, for the first SIGTERM; a second one kills the process.

    In the main thread only. Children that are forked from now on end by a SIGTERM, as all do.
    """
    read, write = os.pipe()
    os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_leave)
    os.set_blocking(write, False)
    # It is never undone: a worker has one program, and ends with it.
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_listen, args=(read, ask), name="orderly", daemon=True).start()


def _listen(read: int, ask: Callable[[], None]) -> None:
    asked = False
    while number := os.read(read, 1):
        if number[0] != signal.SIGTERM:
            continue
        if asked:  # by a signal, so that what it has started is ended, too
            os.kill(os.getpid(), signal.SIGKILL)
        asked = True
        ask()


def _hold() -> None:
    """Around a fork: a child that takes the signal too early would write for its parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _go_on() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _leave() -> None:
    """In a child: the pipe is its parent's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _go_on()
