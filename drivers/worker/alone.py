"""A worker that is forked from nobody: of a program that needs no device.

    python -P -m llmos.drivers.worker.alone FD < ORDER

FD is the socket it listens on, bound by whoever starts it; ORDER is what a zygote is told to fork a
worker. Nothing is imported that the program does not import. It ends with the kernel: there is no
device that it could keep, and whatever it fetches goes on where it was.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

from llmos.drivers.worker import main as worker
from llmos.drivers.worker.output import forgive
from llmos.drivers.worker.ranks import Team
from llmos.drivers.worker.zygote import settle
from llmos.kernel import drop
from llmos.kernel.wire import Unpacker

_PR_SET_PDEATHSIG = 1


def main() -> int:
    number = int(sys.argv[1])
    os.set_inheritable(number, False)
    (order,) = Unpacker().feed(sys.stdin.buffer.read())
    drop.become(order["user"])
    order["env"] = {**drop.environment(order["user"]), **order["env"]}
    settle(order)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    forgive()
    return worker.main(order, socket.socket(fileno=number), Team([]))


if __name__ == "__main__":
    raise SystemExit(main())
