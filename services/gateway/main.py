"""The gateway's server: an OS process of its own, that outlives the kernel (services/daemon.py).

    python -P -m llmos.services.gateway.main HOME FD

FD hears one line: that it serves, or why it cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, LlmosError, NotAllowed, ServiceFailed
from llmos.kernel.units import parse_bytes
from llmos.services.daemon_post import Post, tell_started
from llmos.services.gateway import settings as configuration
from llmos.services.gateway.keys import Keys
from llmos.services.gateway.settings import Settings
from llmos.services.host import keep_within

# Connections that are taken by the system and not yet by us.
BACKLOG = 1024

# Answers that are under way when the gateway is told to end have so long.
GRACE_S = 3

KEEP_ALIVE_S = 75

MEMORY = "1GiB"

NEEDS = ("starlette", "uvicorn", "prometheus_client", "python_multipart")


def check_installed() -> None:
    """Raise ServiceFailed where what the gateway is made of is not there."""
    import importlib.util

    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ServiceFailed(f"the gateway needs {', '.join(missing)}", "pip install 'llmos[serve]'")


def listen_again(settings: Settings, folder: Path) -> socket.socket:
    """The socket; for "any port" the one of the last time, so that clients find a server that was
    started again. Raises BadArgument."""
    last = folder / "port"
    if settings.port == 0 and last.exists():
        with contextlib.suppress(BadArgument, ValueError):
            return listen(settings, int(last.read_text()))
    made = listen(settings, settings.port)
    last.write_text(str(made.getsockname()[1]))
    return made


def listen(settings: Settings, port: int) -> socket.socket:
    """The socket. Raises BadArgument when the address cannot be had."""
    where = f"{settings.host}:{port}"
    try:
        found = socket.getaddrinfo(
            settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Who reads nothing for so long is cut off by the system; connections inherit it.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.stall_s * 1000))
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as exc:
        taken = "somebody listens there already" if exc.errno == 98 else exc.strerror
        raise BadArgument(
            f"cannot listen on {where}: {taken}", "`llmos serve --port N` takes another; 0: any"
        ) from None
    made.setblocking(False)
    return made


def url_of(settings: Settings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}/v1"


async def serve(home: Path, fd: int, settings: Settings, listener: socket.socket) -> None:
    """Until somebody sends TERM or INT, or no service holds it any more."""
    import uvicorn

    class _Server(uvicorn.Server):
        """Signals are ours: uvicorn's own way ends the process before it has tidied up."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    from llmos.services.gateway import app
    from llmos.services.gateway.kernel import Kernel
    from llmos.services.gateway.metrics import Metrics
    from llmos.services.gateway.run import Runner
    from llmos.services.gateway.turnstile import Turnstile

    folder = home / "gateway"
    turnstile = Turnstile(settings.max_active, settings.max_waiting)
    metrics = Metrics(turnstile)
    kernel = Kernel(home, settings.timeout_s)
    endpoints = app.Endpoints(
        home, folder, Runner(kernel, metrics, settings.dtype), settings, turnstile, metrics
    )
    config = uvicorn.Config(
        app.make(endpoints, Keys(folder)),
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        ws="none",
    )
    server = _Server(config)
    url = url_of(settings, listener)

    def status() -> dict[str, Any]:
        return {
            "url": url,
            "os_pid": os.getpid(),
            "active": turnstile.active,
            "waiting": turnstile.waiting,
        }

    def hello() -> dict[str, Any]:
        return {**identity(home), "about": url}

    def end() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    async with Post(folder, {"hello": hello, "status": status}) as post:

        async def end_when_abandoned() -> None:
            await post.abandoned.wait()
            end()

        waiting = asyncio.ensure_future(end_when_abandoned())
        tell_started(fd)
        endpoints.batches.resume()
        try:
            await server.serve(sockets=[listener])
        finally:
            waiting.cancel()
            await endpoints.batches.close()
            await kernel.close()


def identity(home: Path) -> dict[str, Any]:
    """What makes one running server as good as another."""
    path = home / "gateway" / configuration.FILE
    told = path.read_text() if path.exists() else ""
    return {"settings": told, "version": metadata.version("llmos")}


def main() -> int:
    home, fd = Path(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(fd, False)
    # A name of a model is no path: where nothing lies there is nothing that it could name.
    nowhere = home / "gateway" / "nowhere"
    nowhere.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chdir(nowhere)
    # Uploads are taken apart where they will lie, not where the machine has little room.
    uploads = home / "gateway" / "uploads"
    uploads.mkdir(mode=0o700, exist_ok=True)
    tempfile.tempdir = str(uploads)
    keep_within(parse_bytes(MEMORY))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a descriptor
    try:
        check_installed()
        settings = configuration.load(home / "gateway")
        if not settings.is_loopback and not Keys(home / "gateway").all():
            raise NotAllowed(
                f"without an API key the gateway does not listen on {settings.host}, where others "
                "can reach it",
                "`llmos key new` makes a key",
            )
        listener = listen_again(settings, home / "gateway")
    except LlmosError as exc:
        tell_started(fd, exc)
        return 1
    asyncio.run(serve(home, fd, settings, listener))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
