"""`top`: the live view, a full-screen application over snapshots of the kernel.

Knows how to ask and what keys do; what is shown is made by top_frame. Survives a kernel that goes
and comes back.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

from prompt_toolkit.application import Application, get_app
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import FormattedTextControl, Layout, Window
from prompt_toolkit.styles import Style

from llmos.kernel.errors import LlmosError
from llmos.shell.aclient import AsyncClient
from llmos.shell.commands.explain import explanation
from llmos.shell.context import encodable
from llmos.shell.home import Home
from llmos.shell.render import fit
from llmos.shell.top_frame import HELP, KEYS, Choices, Line, Snapshot, frame, visible

STYLE = Style.from_dict(
    {
        "head": "reverse",
        "chosen": "bg:ansicyan fg:ansiblack",
        "running": "ansigreen",
        "preempted": "ansiyellow",
        "paused": "ansimagenta",
        "backoff": "ansired",
        "ended": "ansibrightblack",
        "event": "ansibrightblack",
        "error": "ansired",
    }
)


async def snapshot(client: AsyncClient) -> Snapshot:
    """What there is now: four calls on their way at the same time."""
    status, processes, mem, events = await asyncio.gather(
        client.status(), client.ps(), client.mem(), client.events()
    )
    return Snapshot(status, processes, mem, events)


class Top:
    """The application's state: the last snapshot, the choices, what the last line says."""

    def __init__(self, home: Home, refresh_s: float, readonly: bool) -> None:
        self._home = home
        self._refresh_s = refresh_s
        self._readonly = readonly
        self._client: AsyncClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.seen: Snapshot | None = None
        self.choices = Choices()
        self.message = ""
        self.page: list[str] = []  # a text over the table: help or a story
        self.asking = ""  # "filter" or "kill" while the last line asks something
        self._wake = asyncio.Event()
        self.app: Application[None] = Application(
            layout=Layout(
                Window(FormattedTextControl(self._text, focusable=True, show_cursor=False))
            ),
            key_bindings=bindings(self),
            style=STYLE,
            full_screen=True,
        )

    async def run(self) -> None:
        polling = asyncio.create_task(self._poll())
        try:
            await self.app.run_async()
        finally:
            polling.cancel()
            await asyncio.gather(polling, *self._tasks, return_exceptions=True)
            if self._client is not None:
                await self._client.close()

    async def _poll(self) -> None:
        while True:
            try:
                self.seen = await snapshot(await self._connected())
                if self.message.startswith("no kernel"):
                    self.message = ""
            except LlmosError as exc:
                await self._disconnect()
                self.message = f"no kernel: {exc.message}"
            self.choices.settle(self.rows())
            self.app.invalidate()
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), self._refresh_s)
            except TimeoutError:
                continue

    async def _connected(self) -> AsyncClient:
        if self._client is None:
            self._client = await AsyncClient(self._home.path).connect()
        return self._client

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def rows(self) -> list[dict[str, object]]:
        return visible(self.seen, self.choices) if self.seen is not None else []

    # ---- what keys do ----

    def act(self, what: Callable[[AsyncClient, int], Awaitable[str]]) -> None:
        """Do something to the targets; errors and results go to the last line."""
        if self._readonly:
            self.message = "read-only"
            return
        task = asyncio.ensure_future(self._act(what, self.choices.targets()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _act(
        self, what: Callable[[AsyncClient, int], Awaitable[str]], pids: list[int]
    ) -> None:
        try:
            client = await self._connected()
            self.message = "; ".join([await what(client, pid) for pid in pids])
        except LlmosError as exc:
            self.message = exc.message
        self._wake.set()

    def explain(self) -> None:
        async def show(client: AsyncClient, pid: int) -> str:
            self.page = explanation(await client.explain(pid), time.time())
            return ""

        task = asyncio.ensure_future(self._act(show, [self.choices.pid]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- what is shown ----

    def _text(self) -> StyleAndTextTuples:
        shape = get_app().output.get_size()
        lines = self.lines(shape.columns, shape.rows, time.time())
        output = get_app().output
        return [
            (style, encodable(text, output.encoding()) + ("\n" if i < len(lines) - 1 else ""))
            for i, (style, text) in enumerate(lines)
        ]

    def lines(self, width: int, height: int, now: float) -> list[Line]:
        """The whole screen."""
        body = height - 1
        if self.page:
            lines: list[Line] = [("", fit(text, width)) for text in self.page[:body]]
        elif self.seen is None:
            lines = [("", "waiting for the kernel ...")]
        else:
            lines = frame(self.seen, self.choices, width, body, now)
        lines += [("", "")] * (body - len(lines))
        return [*lines, self._last_line(width)]

    def _last_line(self, width: int) -> Line:
        if self.asking == "filter":
            return (
                "class:head",
                fit(f"/{self.choices.filter}_  (Enter keeps it, Esc drops it)", width),
            )
        if self.asking == "kill":
            pids = " ".join(map(str, self.choices.targets()))
            return ("class:error", fit(f"kill {pids}? y/n", width))
        if self.page:
            return ("class:head", fit("any key: back", width))
        if self.message:
            return ("class:error", fit(self.message, width))
        mode = f"sort: {self.choices.sort}" + (
            f"  filter: {self.choices.filter}" if self.choices.filter else ""
        )
        return ("class:head", fit(f"{mode}   {KEYS}", width))


def bindings(top: Top) -> KeyBindings:
    """The keys. One handler for text while the last line asks, one for each key otherwise."""
    from prompt_toolkit.filters import Condition

    keys = KeyBindings()
    browsing = Condition(lambda: not top.asking and not top.page)
    reading = Condition(lambda: bool(top.page))
    asking = Condition(lambda: bool(top.asking))

    def on(*names: str) -> Callable[[Callable[[], None]], None]:
        def add(do: Callable[[], None]) -> None:
            def handler(event: KeyPressEvent) -> None:
                top.message = ""
                do()

            for name in names:
                keys.add(name, filter=browsing)(handler)

        return add

    on("up")(lambda: top.choices.move(top.rows(), -1))
    on("down", "j")(lambda: top.choices.move(top.rows(), 1))
    on("o", ">")(lambda: top.choices.next_sort(1))
    on("<")(lambda: top.choices.next_sort(-1))
    on("h", "?", "f1")(lambda: _show(top, HELP))
    on("enter", "e")(top.explain)
    on("space")(lambda: _tag(top))
    on("/")(lambda: _ask(top, "filter"))
    on("k", "f9")(lambda: _ask(top, "kill"))
    on("f7")(lambda: top.act(lambda c, pid: _renice(top, c, pid, -1)))
    on("f8")(lambda: top.act(lambda c, pid: _renice(top, c, pid, +1)))
    on("p")(lambda: top.act(lambda c, pid: _pause(top, c, pid)))
    keys.add("<any>", filter=reading)(lambda event: _show(top, ()))
    keys.add("<any>", filter=asking)(lambda event: _answer(top, event.data))
    keys.add("enter", filter=asking)(lambda event: _answer(top, "\r"))
    keys.add("escape", filter=asking, eager=True)(lambda event: _answer(top, "\x1b"))
    keys.add("backspace", filter=asking)(lambda event: _answer(top, "\x7f"))
    keys.add("q", filter=browsing)(lambda event: event.app.exit())
    keys.add("c-c")(lambda event: event.app.exit())
    keys.add("c-d")(lambda event: event.app.exit())
    return keys


def _show(top: Top, page: tuple[str, ...]) -> None:
    top.page = list(page)


def _ask(top: Top, what: str) -> None:
    if what == "kill" and (top._readonly or not top.choices.targets()):
        top.message = "read-only" if top._readonly else "no process is chosen"
        return
    top.asking = what


def _tag(top: Top) -> None:
    top.choices.tagged ^= {top.choices.pid} if top.choices.pid else set()
    top.choices.move(top.rows(), 1)


def _answer(top: Top, key: str) -> None:
    """A key while the last line asks something."""
    if top.asking == "kill":
        top.asking = ""
        if key in ("y", "Y"):
            top.act(_kill)
        return
    if key in ("\r", "\x1b"):
        top.asking = ""
        top.choices.filter = top.choices.filter if key == "\r" else ""
    elif key == "\x7f":
        top.choices.filter = top.choices.filter[:-1]
    elif key.isprintable():
        top.choices.filter += key
    top.choices.settle(top.rows())


async def _kill(client: AsyncClient, pid: int) -> str:
    await client.kill(pid)
    return f"{pid} has ended"


async def _renice(top: Top, client: AsyncClient, pid: int, by: int) -> str:
    nice = int((await client.process(pid))["nice"]) + by
    return f"{pid} has nice {(await client.renice(pid, max(-20, min(19, nice))))['nice']}"


async def _pause(top: Top, client: AsyncClient, pid: int) -> str:
    paused = (await client.process(pid))["state"] == "paused"
    done = await (client.resume(pid) if paused else client.pause(pid))
    return f"{pid} is {done['state']}"


async def once(home: Home, width: int) -> list[str]:
    """One frame as lines, for `top --once`."""
    async with AsyncClient(home.path) as client:
        seen = await snapshot(client)
    rows = len(seen.processes) + len(seen.status["devices"]) + 12
    return [text.rstrip() for _, text in frame(seen, Choices(), width, rows, time.time())]


def is_dumb() -> bool:
    """A terminal that cannot place the cursor."""
    return os.environ.get("TERM", "") in ("", "dumb")
