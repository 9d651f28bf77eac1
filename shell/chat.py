"""A conversation on the terminal, line by line: program `chat`, its turns and its settings.

Knows the messages that the program takes and the records that it writes, not how text is made.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llmos.kernel.errors import LlmosError, NoKernel, TimedOut
from llmos.shell.client import Client, Record, Stream
from llmos.shell.context import Context
from llmos.shell.follow import GONE
from llmos.shell.options import Usage, convert, from_schema
from llmos.shell.render import clean
from llmos.shell.resolve import nearest_hint
from llmos.shell.view import View

# A turn that was refused leaves a note and no answer: then the state tells, after this time.
QUIET_S = 0.3
# What may change in the middle of a conversation; the rest belongs to the engine.
SETTINGS = ("system", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
LEAVE = ("/bye", "/exit", "/quit")
QUOTES = '"""'
HELP = """\
/set NAME VALUE   change a setting: temperature, max_tokens, seed, system, ...
/show             the settings
/clear            forget the conversation and begin anew
/bye              leave (also Ctrl-D)
\"\"\"               begins and ends a text of many lines
Ctrl-C            stops the answer, not the chat"""


class ChatEnded(LlmosError):
    """The process of the chat has ended."""


class Conversation:
    """A chat process and what this terminal has read of it."""

    def __init__(self, ctx: Context, client: Client, schema: Record, args: Record,
                 options: Record) -> None:  # fmt: skip
        self._ctx = ctx
        self._client = client
        self._schema = schema
        self._options = options
        self.args = args
        self.pid = 0
        client.on_lost = lambda: ctx.say(f"\n{GONE}")
        self._stream: Stream | None = None
        self.begin()

    def begin(self) -> None:
        """Start anew, with the settings as they are; an earlier conversation ends."""
        self.end()
        self.pid = self._client.submit("chat", self.args, attached=True, **self._options)
        self._stream = self._client.attach(self.pid)

    def end(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._client.kill(self.pid)

    def turn(self, prompt: str) -> Record:
        """Say something and show the answer -> its "turn" record. Raises ChatEnded."""
        assert self._stream is not None
        with View(self._ctx, label="chat") as view, self._interrupts_stop():
            self._send({"prompt": prompt})
            return self._answer(self._stream, view)

    def _send(self, message: Record) -> None:
        """Also to the next kernel, if this one has gone, and not to both."""
        assert self._stream is not None
        key = secrets.token_hex(8)
        while True:
            connection = self._client.connections
            try:
                self._client.send(self.pid, message, key)
                return
            except NoKernel:
                self._client.reconnect(connection)
                self._stream.reopen()

    def _answer(self, stream: Stream, view: View) -> Record:
        noted = False
        while True:
            try:
                record = stream.next(QUIET_S if noted and not view.made_text else None)
            except TimedOut:
                with contextlib.suppress(NoKernel):  # the stream waits for the next one
                    if self._client.process(self.pid)["reason"] == "input":
                        return {}
                continue
            except StopIteration:
                raise self._ended(stream.result or {}) from None
            if record["kind"] == "turn":
                return dict(record)
            noted = noted or record["kind"] == "note"
            view.show(record)

    def _ended(self, ended: Record) -> ChatEnded:
        self._stream = None
        error = (ended.get("result") or {}).get("error")
        if isinstance(error, dict):
            return ChatEnded(str(error.get("message")), str(error.get("hint", "")))
        why = ended.get("reason") or f"exit status {ended.get('exit_status')}"
        return ChatEnded(f"the chat has ended: {why}", f"`llmos explain {self.pid}` has its story")

    @contextmanager
    def _interrupts_stop(self) -> Iterator[None]:
        """Ctrl-C stops the answer. A handler and no exception: the stream stays whole."""

        def stop(number: int, frame: FrameType | None) -> None:
            with Client(self._client.home.path) as other:
                other.send(self.pid, {"stop": True})

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def change(self, name: str, word: str) -> None:
        """Set one of the program's arguments from now on. Raises Usage, LlmosError."""
        options = {o.name: o for o in from_schema(self._schema)}
        name = name.replace("-", "_")
        if name not in SETTINGS or name not in options:
            raise Usage(f"there is no setting {name!r}", nearest_hint(name, SETTINGS))
        value = convert(options[name], word)
        value = [value] if options[name].type == "list" else value
        self._send({"set": {name: value}})
        self.args[name] = value

    def settings(self) -> list[str]:
        """What is set, and the defaults of what is not."""
        return [
            f"{f['name']:<14} {self.args.get(f['name'], f['default'])}"
            for f in self._schema["args"]
        ]


def talk(ctx: Context, conversation: Conversation, read: Callable[[str], str], stats: bool) -> None:
    """Turn after turn until the person leaves. `read` raises EOFError at the end of the input."""
    while True:
        try:
            text = _read_turn(read)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text in LEAVE:
            return
        try:
            if text.startswith("/"):
                _command(ctx, conversation, text)
            elif text:
                turn = conversation.turn(text)
                if stats and turn:
                    ctx.say(_statistics(turn))
        except ChatEnded:
            raise
        except (LlmosError, Usage) as exc:
            ctx.say(exc.message + (f"\n  {exc.hint}" if exc.hint else ""))


def _read_turn(read: Callable[[str], str]) -> str:
    text = read(">>> ")
    if not text.strip().startswith(QUOTES):
        return text.strip()
    text = text.strip()[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + read("... ")
    return text.rstrip()[: -len(QUOTES)].strip("\n")


def _command(ctx: Context, conversation: Conversation, text: str) -> None:
    name, _, rest = text.partition(" ")
    match name:
        case "/?" | "/help":
            ctx.say(HELP)
        case "/clear":
            conversation.begin()
            ctx.say("a new conversation")
        case "/show":
            ctx.lines(clean(line) for line in conversation.settings())
        case "/set":
            setting, _, value = rest.strip().partition(" ")
            if not value:
                raise Usage("a setting is changed by /set NAME VALUE", "/show lists them")
            conversation.change(setting, value.strip())
        case _:
            known = ["/set", "/show", "/clear", "/?", *LEAVE]
            raise Usage(f"there is no command {name}", nearest_hint(name, known))


def _statistics(turn: dict[str, Any]) -> str:
    first, rate = turn.get("first_token_s"), turn.get("tokens_per_s")
    parts = [f"{turn.get('tokens', 0)} tokens"]
    parts += [f"first after {first * 1000:.0f} ms"] if first is not None else []
    parts += [f"{rate:.1f} tokens/s"] if rate else []
    return ", ".join(parts)


def reader(ctx: Context) -> Callable[[str], str]:
    """How turns are read: with editing on a terminal, else plain lines."""
    if not sys.stdin.isatty():
        return _plain_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    # Not kept on disk: what was said to a model is not a command.
    session: PromptSession[str] = PromptSession(history=InMemoryHistory())
    return session.prompt


def _plain_line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
