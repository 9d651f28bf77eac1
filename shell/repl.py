"""The interactive shell: lines in, commands run in this process; `&`, `jobs`, `fg`.

Knows how to read lines and what its own words mean; everything else is shell/main.py's.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmos.kernel.errors import LlmosError, NoKernel
from llmos.shell.client import Record
from llmos.shell.context import Context, encodable
from llmos.shell.follow import follow
from llmos.shell.launch import Launch, running
from llmos.shell.main import complain, dispatch, find, guarded
from llmos.shell.options import Usage
from llmos.shell.processes import find_pid, process_table
from llmos.shell.render import plural

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from llmos.shell.poller import Poller

LEAVE = ("exit", "quit", "bye")
WELCOME = "llmos {version}: `help` lists the commands, Tab completes, Ctrl-D leaves"


class Repl:
    """One session: runs lines, and remembers which processes were started here."""

    def __init__(self, ctx: Context, after: Callable[[], None] = lambda: None) -> None:
        self._home = ctx.home
        self._after = after  # a command has run: look again
        self.jobs: dict[int, str] = {}  # pid -> program, oldest first
        self.leaving = False
        self.status = 0

    def execute(self, line: str) -> None:
        """Run one line; nothing that goes wrong in it ends the session."""
        ctx = Context(self._home, interactive=True)
        ctx.on_submit = self._started
        try:
            argv = shlex.split(line, comments=True)
        except ValueError as exc:
            complain(ctx, f"the line cannot be read: {exc}", "quotes come in pairs")
            self.status = 2
            return
        if argv[:1] == ["llmos"]:
            argv = argv[1:]
        if not argv:
            return
        self.status = guarded(argv, ctx, self._dispatch)
        self._after()

    def _dispatch(self, argv: list[str], ctx: Context) -> int:
        if argv[-1] == "&" or (argv[-1].endswith("&") and len(argv) > 1):
            return self._in_background(argv, ctx)
        match argv[0]:
            case word if word in LEAVE:
                self.leaving = True
                return 0
            case "clear":
                print("\x1b[2J\x1b[H", end="", flush=True)
                return 0
            case "jobs":
                return self._list_jobs(ctx)
            case "fg":
                return self._foreground(argv[1:], ctx)
        return dispatch(argv, ctx)

    def _started(self, pid: int, program: str) -> None:
        self.jobs[pid] = program

    def _in_background(self, argv: list[str], ctx: Context) -> int:
        words = [*argv[:-1], argv[-1].removesuffix("&")]
        words = [word for word in words if word]
        if not words:
            raise Usage("& stands after a command", "pretrain ... &")
        command = find(ctx, words[0])
        if "detach" not in {o.name for o in command.options}:
            raise Usage(f"`{words[0]}` runs no program: only programs go to the background")
        ctx.in_background = True
        return dispatch([words[0], "--detach", *words[1:]], ctx)

    def _live_jobs(self, ctx: Context) -> list[Record]:
        with ctx.client() as client:
            return [p for p in client.ps() if p["pid"] in self.jobs]

    def _list_jobs(self, ctx: Context) -> int:
        live = self._live_jobs(ctx)
        if live:
            ctx.lines(process_table(live, ctx.width))
        return 0

    def _foreground(self, argv: list[str], ctx: Context) -> int:
        with ctx.client() as client:
            if argv:
                pid = find_pid(client, argv[0].removeprefix("%"))
            else:
                live = self._live_jobs(ctx)
                if not live:
                    raise Usage("no process that was started here is alive", "`fg PID` takes any")
                pid = max(p["pid"] for p in live)
            process = client.process(pid)
            schema = client.programs()["programs"].get(process["program"])
            if schema is None:
                raise Usage(f"{pid} is a {process['program']}: it has no foreground")
            return follow(ctx, client, pid, schema, skip_old=True)

    def report_ended(self) -> None:
        """Say which of the jobs have ended since the last prompt."""
        if not self.jobs:
            return
        ctx = Context(self._home, interactive=True)
        try:
            with ctx.client() as client:
                ended = [p for p in client.ps(all=True) if p["pid"] in self.jobs]
        except LlmosError:
            return  # without a kernel nobody knows; the toolbar says so
        for p in ended:
            if p["state"] == "exited":
                status = p["exit_status"]
                how = f"exit status {status}: {p['reason']}" if status else "done"
                ctx.say(f"[{p['pid']}] {p['program']}: {how}")
                del self.jobs[p["pid"]]

    def forget_shown(self, before: set[int]) -> None:
        """What ended in the foreground has been reported there."""
        ctx = Context(self._home, interactive=True)
        try:
            live = {p["pid"] for p in self._live_jobs(ctx)}
        except LlmosError:
            return
        for pid in set(self.jobs) - before - live:
            del self.jobs[pid]


def say_booted(ctx: Context, status: Record) -> None:
    ctx.say(f"booted a kernel: pid {status['kernel']['os_pid']}, home {ctx.home.path}")


def start(ctx: Context) -> int:
    """Bare `llmos`: boot a kernel if none runs, then read lines until the end."""
    launch = None if running(ctx.home) else Launch(ctx.home)
    if not sys.stdin.isatty():
        if launch is not None:
            say_booted(ctx, launch.wait())
        return run_script(Repl(ctx))
    # The kernel boots while prompt_toolkit is imported.
    from llmos.shell.poller import Poller

    poller = Poller(ctx.home)
    session = make_session(ctx, poller)
    if launch is not None:
        say_booted(ctx, launch.wait())
    poller.start()
    repl = Repl(ctx, after=poller.refresh)
    ctx.say(WELCOME.format(version=_version()))
    try:
        read_lines(repl, session)
    finally:
        poller.stop()
    _farewell(ctx)
    return 0


def _version() -> str:
    from importlib.metadata import version

    return version("llmos")


def run_script(repl: Repl) -> int:
    """Lines from a pipe; the exit status is the last command's."""
    for line in sys.stdin:
        repl.execute(line)
        if repl.leaving:
            break
    return repl.status


def read_lines(repl: Repl, session: PromptSession[str]) -> None:
    """The loop of the session."""
    while not repl.leaving:
        repl.report_ended()
        try:
            line = session.prompt()
            while _is_open(line):
                line += "\n" + session.prompt("... ")
        except KeyboardInterrupt:
            continue  # as in any shell: the line is dropped
        except EOFError:
            return
        before = set(repl.jobs)
        repl.execute(line)
        if set(repl.jobs) - before:
            repl.forget_shown(before)


def _is_open(line: str) -> bool:
    """Does the line end inside quotes? Then it goes on."""
    try:
        shlex.split(line, comments=True)
    except ValueError as exc:
        return "quotation" in str(exc)
    return False


def make_session(ctx: Context, poller: Poller) -> PromptSession[str]:
    """The line editor."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.styles import Style

    from llmos.shell.completer import ShellCompleter
    from llmos.shell.toolbar import toolbar

    trouble: list[str] = [""]

    def set_trouble(text: str) -> None:
        trouble[0] = text

    def bottom() -> str:
        output = session.app.output
        width = output.get_size().columns
        try:
            text = toolbar(poller, width, trouble[0])
        except Exception as exc:  # noqa: BLE001  a bug here must not end the session
            text = f" the toolbar failed: {type(exc).__name__}: {exc}"
        return encodable(text, output.encoding())

    session: PromptSession[str] = PromptSession(
        "llmos> ",
        completer=ShellCompleter(lambda: poller.known, set_trouble),
        complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(),
        history=FileHistory(str(ctx.home.history)),
        bottom_toolbar=bottom,
        refresh_interval=1.0,
        style=Style.from_dict({"bottom-toolbar": "noreverse bg:ansibrightblack fg:ansiwhite"}),
    )
    return session


def _farewell(ctx: Context) -> None:
    try:
        with ctx.client() as client:
            live = [p for p in client.ps() if p.get("role") != "service"]
    except NoKernel:
        return
    going = f"{plural(len(live), 'process')} left to themselves; " if live else ""
    ctx.say(f"{going}the kernel keeps running: `llmos shutdown` ends it")
