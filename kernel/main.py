"""The kernel's own process: bring the machine up in this order; it goes down in reverse.

    python -P -m llmos.kernel.main --home HOME [--device SPEC]... [--policy NAME]
                                   [--batch-share X] [--group NAME]

`llmos boot` starts it. The last line on stderr says why it could not start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import os
import re
import signal
import sys
from pathlib import Path

from llmos.kernel import config
from llmos.kernel.access import check_members_can_run, group_of
from llmos.kernel.errors import Busy, LlmosError
from llmos.kernel.home import Home
from llmos.kernel.kernel import Kernel
from llmos.kernel.log import log
from llmos.kernel.server import listen

_PR_SET_CHILD_SUBREAPER = 36

EXIT_BUSY = 75  # another kernel serves this home


async def run(cfg: config.Config, home: Home) -> None:
    config.check(cfg)
    serve_group(cfg, home)
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


# What members' processes may have of the environment of a group's kernel, which is root's.
KEPT_VARIABLES = re.compile(
    r"PATH|LANG|TZ|LD_LIBRARY_PATH|TMPDIR|(HTTPS?|NO|ALL)_PROXY|(https?|no|all)_proxy"
    r"|LC_\w+|HF_HOME|HF_HUB_\w+|CUDA_\w+|NVIDIA_\w+|NCCL_\w+|OMP_\w+|MKL_\w+|LLMOS_\w+|GLIBC_\w+"
)


def serve_group(cfg: config.Config, home: Home) -> None:
    """Open the home to the members of a group, if there is to be one. Raises NotAllowed,
    NoSuchThing, HomeUnusable."""
    group = group_of(cfg.group)
    if group is None:
        return
    home.open_to(group)
    check_members_can_run(group)
    for name in list(os.environ):
        if not KEPT_VARIABLES.fullmatch(name):
            del os.environ[name]


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
    # Flags that were not given are not in `given`: then config.toml decides, then the default.
    parser.add_argument("--device", action="append", dest="devices")
    parser.add_argument("--policy")
    parser.add_argument("--batch-share", type=float)
    parser.add_argument("--group")
    given = vars(parser.parse_args())
    flags = {name: value for name, value in given.items() if value is not None}
    home = Home(flags.pop("home").absolute())
    if "devices" in flags:
        flags["devices"] = tuple(flags["devices"])
    try:
        home.prepare()
        with home.held():
            adopt_orphans()
            asyncio.run(run(config.load(home.path, flags), home))
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
