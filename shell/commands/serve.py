"""`llmos serve`: the gateway, OpenAI's API over HTTP. It runs as a service; this starts it."""

from __future__ import annotations

import json
import signal
import time
from types import FrameType
from typing import Any

from llmos.kernel.errors import Busy, NoKernel, NoSuchThing, ServiceFailed
from llmos.kernel.units import parse_bytes
from llmos.shell import keys
from llmos.shell.client import Client, Record
from llmos.shell.commands.batch import DTYPES
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Values

SERVICE = "gateway"

# How often a foreground `serve` looks whether the gateway is still there.
LOOK_S = 0.5

_FLAGS = {
    "host": "host",
    "port": "port",
    "max_active": "max_active",
    "max_waiting": "max_waiting",
    "max_body": "max_body",
    "max_file": "max_file",
    "timeout": "timeout_s",
    "batch_active": "batch_active",
    "dtype": "dtype",
    "cors": "cors",
}
_SIZES = ("max_body", "max_file")


def run(ctx: Context, values: Values) -> int:
    action = values.get("action", "start")
    with ctx.client() as client:
        found = _row(client)
        if action == "stop":
            client.disable_service(SERVICE)
            ctx.say("the gateway is stopped")
            return 0
        if action == "status":
            return _status(ctx, client, bool(values.get("json")))
        return _start(ctx, client, found, values)


def _start(ctx: Context, client: Client, found: Record, values: Values) -> int:
    detach = bool(values.get("detach"))
    told = _settings(values)
    path = keys.folder_of(ctx.home) / "settings.json"
    if found["state"] == "running":
        url = client.call(f"{SERVICE}.status")["url"]
        if not detach or told != path.read_text():
            raise Busy(f"the gateway serves already: {url}", "`llmos serve stop` ends it")
    else:
        keys.write(path, told)
    _bring_up(client, detach)
    status = client.call(f"{SERVICE}.status")
    _greet(ctx, status["url"], detach)
    return 0 if detach else _stay(ctx, client)


def _settings(values: Values) -> str:
    """What was asked for, as services/gateway/settings.py reads it. Raises BadArgument."""
    told: dict[str, Any] = {_FLAGS[n]: values[n] for n in _FLAGS if n in values}
    for name in _SIZES:
        if name in told:
            told[name] = parse_bytes(told[name])
    return json.dumps(told, indent=1, sort_keys=True) + "\n"


def _bring_up(client: Client, detach: bool) -> None:
    """Start it. One that cannot start is not tried again behind its user's back."""
    try:
        (client.enable_service if detach else client.start_service)(SERVICE)
    except ServiceFailed as exc:
        client.disable_service(SERVICE)
        said = exc.message.removeprefix(f"service {SERVICE} ").removeprefix("cannot start: ")
        raise ServiceFailed(said, exc.hint) from None


def _greet(ctx: Context, url: str, detach: bool) -> None:
    ctx.print(url)
    ctx.print(f"export OPENAI_BASE_URL={url}")
    if not keys.listed(ctx.home):
        ctx.print("export OPENAI_API_KEY=none")  # clients insist on one; any will do
    ctx.say("  `llmos serve stop` ends it" if detach else "  Ctrl-C stops it")


def _stay(ctx: Context, client: Client) -> int:
    """Until somebody stops it: here, or elsewhere."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        while True:
            time.sleep(LOOK_S)
            try:
                state = _row(client)["state"]
            except NoKernel:
                # The server is there all the same, for a while: the next kernel takes it over.
                client.reconnect(client.connections)
                client.start_service(SERVICE)
                continue
            if state in ("stopped", "disabled"):
                ctx.say("the gateway was stopped")
                return 0
    except KeyboardInterrupt:
        with ctx.client() as again:  # on the old line an answer may be half read
            again.disable_service(SERVICE)
        ctx.say("\nthe gateway is stopped")
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _status(ctx: Context, client: Client, as_json: bool) -> int:
    status = client.call(f"{SERVICE}.status")
    if as_json:
        ctx.json(status)
    else:
        ctx.print(f"{status['url']}: {status['active']} requests run, {status['waiting']} wait")
    return 0


def _row(client: Client) -> Record:
    """The gateway among the services. Raises NoSuchThing."""
    for row in client.services():
        if row["name"] == SERVICE:
            return row
    raise NoSuchThing(f"there is no service {SERVICE!r}", "`llmos service reload` looks for it")


COMMAND = Command(
    name="serve",
    summary="Serve the models to OpenAI's clients, over HTTP",
    run=run,
    options=(
        Option(
            "action",
            "start it, stop it, or say what it does; default: start",
            positional=True,
            metavar="ACTION",
            choices=("start", "stop", "status"),
        ),
        Option("detach", "do not stay; it is started again at each boot", type="bool", short="-d"),
        Option("host", "where to listen; default: 127.0.0.1", metavar="ADDRESS"),
        Option("port", "default: 8000; 0: any that is free", type="int", minimum=0, maximum=65535),
        Option("max_active", "requests at once; default: 256", type="int", minimum=1),
        Option("max_waiting", "requests that wait; default: 1024", type="int", minimum=0),
        Option("max_body", "of a request; default: 16MiB", metavar="SIZE"),
        Option("max_file", "of an upload; default: 512MiB", metavar="SIZE"),
        Option(
            "timeout",
            "give up a request of which nothing comes; default: 10m",
            type="duration",
            minimum=1,
            metavar="TIME",
        ),
        Option("dtype", "number format of the weights; default: auto", choices=DTYPES),
        Option("batch_active", "of batches, at once; default: 32", type="int", minimum=1),
        Option("cors", "an origin whose pages may ask (repeatable)", type="list", metavar="ORIGIN"),
        JSON,
    ),
    details="Prints the base URL, and lines for your shell. Beyond this machine it listens only "
    "when there is an API key (`llmos key new NAME`). Needs `pip install 'llmos[serve]'`.",
    examples=(
        "llmos serve",
        "llmos serve -d --port 0",
        "llmos serve --host 0.0.0.0",
        "llmos serve stop",
    ),
)
