"""A conversation with a model: program `chat`, its turns, its settings, and what was said.

Knows the messages that the program takes and the records that it writes, not how text is made. What
was said is known here too: a conversation outlives its process, which can be killed or lose its
kernel, and goes on in the next one.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

from llmos.kernel.errors import BadRequest, LlmosError, NoKernel, TimedOut
from llmos.shell.chats import Messages, SavedChat
from llmos.shell.client import Client, Record, Stream
from llmos.shell.context import Context
from llmos.shell.follow import GONE
from llmos.shell.options import Option, Usage, convert, from_schema
from llmos.shell.processes import reason
from llmos.shell.resolve import nearest_hint
from llmos.shell.view import View

# A turn that was refused leaves a note and no answer: then the state tells, after this time.
QUIET_S = 0.3
# A chat that waits for its user ends at once when it is told to; who is slower is killed.
END_S = 5.0
# Which engine it is, and how it answers at all: these stay for the length of a conversation.
_FIXED = frozenset({"adapter", "exact", "ignore_eos", "logit_bias", "logprobs"})


class ChatEnded(LlmosError):
    """The process of the chat has ended."""


class _Abandoned(Exception):
    """Ctrl-C for the second time: not even the end of the answer is waited for."""


@dataclass(frozen=True)
class _Line:
    """To a process of program `chat`, which ends when the client hangs up."""

    client: Client
    stream: Stream


class Conversation:
    """What was said, and the process that says the next thing. A context manager."""

    def __init__(
        self,
        ctx: Context,
        schema: Record,
        args: Record,
        options: Record,
        connect: Callable[[], Client] | None = None,
    ) -> None:
        """`args`: the program's, the model among them; `options`: those of `Client.submit`."""
        self.args = args
        self.pid = 0
        self.messages: Messages = []
        self.last: Record = {}  # how the last answer ended, and what it cost
        self.turns = self.tokens = 0  # answers of this terminal, and their tokens
        self.markdown = False
        self._ctx = ctx
        self._schema = schema
        self._options = options
        self._connect = connect or (lambda: Client(ctx.home.path))
        self._line: _Line | None = None
        self._stops = 0  # how often the answer was asked to end

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if kind is None:
            with contextlib.suppress(NoKernel):  # what belongs to us ends without us
                self.end()
        self.drop()

    # ---- its process ----

    def begin(self) -> None:
        """Start a process, over a line of its own: the old one may have lost its kernel."""
        self.drop()
        client = self._connect()
        try:
            self.pid = client.submit("chat", self.args, attached=True, **self._options)
            self._line = _Line(client, client.attach(self.pid))
        except BaseException:
            client.close()
            raise

    def end(self) -> None:
        """End the process: as its work is done where it waits, else by force. Raises NoKernel."""
        line = self._line
        if line is None:
            return
        line.client.reconnect_s = 0.0  # nobody waits for a kernel to say goodbye to
        with contextlib.suppress(BadRequest):  # it has ended in the meantime
            found = line.client.process(self.pid)
            # Right after an answer it runs still; one that waits for memory could not hear.
            hears = found["reason"] == "input" or found["state"] == "running"
            if not (hears and self._leaves(line)):
                line.client.kill(self.pid)
        self.drop()

    def _leaves(self, line: _Line) -> bool:
        """Tell the program that nobody has more to say -> whether it has ended of it."""
        line.client.send(self.pid, {"end": True})
        try:
            while line.stream.next(END_S)["kind"] != "note":  # a note: it does not know the message
                pass
        except StopIteration:
            return True
        except TimedOut:
            pass
        return False

    def drop(self) -> None:
        """Let go of the process, which ends when its client hangs up: after an interruption an
        answer of the kernel may be half read. The next message is for a new one."""
        if self._line is not None:
            self._line.client.close()
            self._line = None

    def _open(self) -> _Line:
        """The process that the next message is for; a new one where the last one has ended."""
        if self._line is None:
            self.begin()
        assert self._line is not None
        return self._line

    # ---- turns ----

    def turn(self, prompt: str) -> Record:
        """Say something and show the answer -> its "turn" record; empty where it was refused, or
        its end not waited for.

        Raises ChatEnded; the next turn then begins with a new process.
        """
        is_new = self._line is None
        line = self._open()
        if is_new and self.messages:
            self._replace(line, self.messages)
        said: list[str] = []
        try:
            with self._view(line) as view, self._interrupts_stop(view):
                self._send(line, {"prompt": prompt})
                turn = self._answer(line, view, said)
        except (_Abandoned, ChatEnded) as exc:
            if said:
                self._note_turn(prompt, "".join(said))
            if isinstance(exc, ChatEnded):
                raise
            self.drop()
            return {}
        if turn:
            self._note_turn(prompt, "".join(said))
            self.last = turn
            self.turns += 1
            self.tokens += int(turn.get("tokens", 0))
        return turn

    def _note_turn(self, prompt: str, answer: str) -> None:
        self.messages.append({"role": "user", "content": prompt})
        self.messages.append({"role": "assistant", "content": answer})

    def _view(self, line: _Line) -> View:
        markdown = self.markdown and self._ctx.stdout_is_terminal
        view = View(self._ctx, label="chat", markdown=markdown)
        line.client.on_lost = lambda: view.note(GONE)
        return view

    def _send(self, line: _Line, message: Record) -> None:
        """Also to the next kernel, if this one has gone, and not to both."""
        client, stream = line.client, line.stream
        key = secrets.token_hex(8)
        while True:
            connection = client.connections
            try:
                client.send(self.pid, message, key)
                return
            except NoKernel:
                client.reconnect(connection)
                stream.reopen()
            except BadRequest as exc:
                raise self._gone(line, exc) from None

    def _gone(self, line: _Line, exc: LlmosError) -> LlmosError:
        """Of a message that was not taken: has the process ended?"""
        try:
            process = line.client.process(self.pid)
        except BadRequest:
            process = {"state": "exited", "reason": "it is not known any more"}
        return self._ended(process) if process["state"] == "exited" else exc

    def _answer(self, line: _Line, view: View, said: list[str]) -> Record:
        def take(record: Record) -> bool:
            if record["kind"] == "text":
                said.append(str(record["text"]))
            return bool(record["kind"] == "turn")

        return self._until(line, view, take)

    def _until(self, line: _Line, view: View, last: Callable[[Record], bool]) -> Record:
        """Show records up to that of which `last` is true -> it; empty when there was only a note
        and the process waits for something else."""
        note = ""
        while True:
            try:
                record = line.stream.next(None if view.made_text else QUIET_S)
            except TimedOut:
                process = self._process(line.client)
                if note and process.get("reason") == "input":
                    return {}
                if process:
                    view.wait_for(_doing(process))
                continue
            except StopIteration:
                raise self._ended(line.stream.result or {}) from None
            if last(record):
                return dict(record)
            if record["kind"] == "note":
                note = str(record["text"])
            view.show(record)

    def _process(self, client: Client) -> Record:
        """What the kernel says of the process; nothing while there is no kernel."""
        with contextlib.suppress(NoKernel):  # the stream waits for the next one
            return client.process(self.pid)
        return {}

    def _ended(self, ended: Record) -> ChatEnded:
        self.drop()
        error = (ended.get("result") or {}).get("error")
        if isinstance(error, dict):
            return ChatEnded(str(error.get("message")), str(error.get("hint", "")))
        why = ended.get("reason") or f"exit status {ended.get('exit_status')}"
        return ChatEnded(
            f"the process of the chat has ended: {why}", f"`llmos explain {self.pid}` has its story"
        )

    @contextmanager
    def _interrupts_stop(self, view: View) -> Iterator[None]:
        """Ctrl-C stops the answer. A handler and no exception: the stream stays whole. Whoever
        cannot wait for that presses it again."""
        self._stops = 0

        def stop(number: int, frame: FrameType | None) -> None:
            self._stops += 1
            if self._stops > 1:
                raise _Abandoned
            view.wait_for("stops (Ctrl-C again does not wait for it)")
            try:
                with Client(self._ctx.home.path, auto_boot=False) as other:
                    other.send(self.pid, {"stop": True})
            except LlmosError:  # there is no kernel that would do it
                raise _Abandoned from None

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # ---- what was said ----

    def replace(self, messages: Messages) -> None:
        """Go on as if this had been said, and nothing else. Raises LlmosError where it cannot."""
        self._replace(self._open(), messages)
        self.messages = list(messages)

    def _replace(self, line: _Line, messages: Messages) -> None:
        with self._view(line) as view:
            self._send(line, {"history": messages})
            if not self._until(line, view, lambda record: bool(record["kind"] == "history")):
                raise LlmosError("the conversation stays as it was")

    def forget_turn(self) -> str:
        """Take the last turn back -> what was asked. Raises Usage when there is none."""
        asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not asked:
            raise Usage("nothing was said yet")
        prompt = self.messages[asked[-1]]["content"]
        self.replace(self.messages[: asked[-1]])
        return prompt

    # ---- settings ----

    def options(self) -> dict[str, Option]:
        """What can be set in the middle of a conversation."""
        fixed = _FIXED | set(self._schema.get("engine_args", ()))
        return {o.name: o for o in from_schema(self._schema) if o.name not in fixed}

    def change(self, name: str, word: str) -> None:
        """Set one of the program's arguments from now on. Raises Usage, LlmosError."""
        option = self.option(name)
        value = option.default if word == "default" else value_of(option, word)
        if value is None:
            raise Usage(f"{option.name} has no default to go back to")
        self.change_all({option.name: value})

    def change_all(self, values: Record) -> None:
        if self._line is not None:
            self._send(self._line, {"set": values})
        self.args.update(values)

    def option(self, name: str) -> Option:
        """The setting of that name. Raises Usage."""
        known, name = self.options(), name.replace("-", "_")
        if name not in known:
            raise Usage(f"there is no setting {name!r}", nearest_hint(name, known))
        return known[name]

    def settings(self) -> Record:
        """Every setting with its value; defaults of what was not set."""
        return {name: self.args.get(name, o.default) for name, o in self.options().items()}

    def changed(self) -> Record:
        """The settings that differ from their defaults; the system prompt is none of them."""
        options = self.options()
        return {
            name: value
            for name, value in self.settings().items()
            if name != "system" and value != options[name].default
        }

    def saved(self) -> SavedChat:
        return SavedChat(
            model=str(self.args["model"]),
            system=str(self.args.get("system") or ""),
            settings=self.changed(),
            messages=list(self.messages),
        )


def value_of(option: Option, word: str) -> Any:
    """What is meant by a word after `/set NAME`. Raises Usage."""
    if option.type == "bool":
        if word.lower() not in ("on", "off", "true", "false", "yes", "no"):
            raise Usage(f"{option.name} is on or off, not {word!r}")
        return word.lower() in ("on", "true", "yes")
    if option.type == "list":
        if not word.startswith("["):
            return [convert(option, _unquoted(word))]
        import json

        with contextlib.suppress(ValueError):
            found = json.loads(word)
            if isinstance(found, list) and all(isinstance(text, str) for text in found):
                return found
        raise Usage(f'{option.name} is a text or a list of texts: ["one", "two"]')
    return convert(option, _unquoted(word) if option.type == "str" else word)


def _unquoted(word: str) -> str:
    """A text in quotes without them; in double quotes \\n is a newline, as in JSON."""
    if len(word) >= 2 and word[0] == word[-1] == '"':
        import json

        with contextlib.suppress(ValueError):
            return str(json.loads(word))
    return word


def _doing(process: Record) -> str:
    """What the process does while there is no text."""
    if process["state"] in ("running", "ready"):
        return "..."
    why = reason(process)
    if why == "engine":
        return "the model is being loaded"
    return f"{process['state']}: {why}" if why else str(process["state"])
