"""The kernel's own process: bring the machine up in this order; it goes down in reverse.

    python -P -m llmos.kernel.main --home HOME [--device SPEC]... [--policy NAME]

`llmos boot` starts it. The last line on stderr says why it could not start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import signal
import sys
from pathlib import Path

from llmos.kernel import config
from llmos.kernel.errors import Busy, LlmosError
from llmos.kernel.home import Home
from llmos.kernel.kernel import Kernel
from llmos.kernel.log import log
from llmos.kernel.server import listen

_PR_SET_CHILD_SUBREAPER = 36

EXIT_BUSY = 75  # another kernel serves this home


async def run(cfg: config.Config, home: Home) -> None:
    config.check(cfg)
    drivers = config.drivers_of(cfg)  # which devices there are
    kernel = Kernel(cfg, home, drivers)
    await kernel.open()  # the books, and the table as the journal has it
    server = await listen(kernel)  # the door: from here on calls are answered
    kernel.spawn(kernel.bring_up())  # zygote, adoption, services: what takes longer
    stop_on_signals(kernel)
    gc.freeze()
    await kernel.stopping.wait()
    server.close()
    home.socket.unlink(missing_ok=True)
    for client in list(kernel.clients):
        client.close()
    await kernel.close()
    log("the kernel has ended")


def stop_on_signals(kernel: Kernel) -> None:
    """TERM and INT are a shutdown; a second one does not hurry it."""

    async def shut_down() -> None:
        await kernel.drain()
        kernel.stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: kernel.spawn(shut_down()))


def adopt_orphans() -> None:
    """If a zygote dies, its workers become this process's children, not init's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="llmos-kernel")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--device", action="append", default=[])
    parser.add_argument("--policy", default="eevdf")
    given = parser.parse_args()
    home = Home(given.home.absolute())
    try:
        home.prepare()
        with home.held():
            adopt_orphans()
            asyncio.run(run(config.Config(home.path, tuple(given.device), given.policy), home))
    except Busy as exc:
        return fail(exc, EXIT_BUSY)
    except LlmosError as exc:
        return fail(exc, 1)
    return 0


def fail(exc: LlmosError, status: int) -> int:
    hint = f" ({exc.hint})" if exc.hint else ""
    sys.stderr.write(f"llmos: {exc.message}{hint}\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
