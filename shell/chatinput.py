"""Where the messages of a chat come from: a line editor on a terminal, else lines of a pipe."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.kernel.errors import BadInput
from llmos.shell.context import Context
from llmos.shell.talk import LEAVE

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'
PLACEHOLDER = "a message, or /? for help"
HOW_TO_LEAVE = "Ctrl-D or /bye leaves the chat"
# What was typed is kept up to this; then the older half goes.
MOST_HISTORY_BYTES = 1024 * 1024

_OPENS = re.compile(r'\s*(?:/(?:system|set\s+(?:parameter\s+)?\w+)\s+)?"""')


def is_open(text: str) -> bool:
    """Has a text of many lines been begun and not ended?"""
    found = _OPENS.match(text)
    return found is not None and not text[found.end() :].rstrip().endswith(QUOTES)


def message_of(text: str) -> str:
    """What was typed, without the quotes of a text of many lines."""
    text = text.strip()
    if text.startswith(QUOTES) and text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES):
        return text[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class PipeReader:
    """A line is a message, or begins one of many lines."""

    keeps = False

    def __init__(self, readline: Callable[[], bytes] | None = None) -> None:
        self._readline = readline or (lambda: sys.stdin.buffer.readline())
        self._lines = 0

    def read(self) -> str:
        text = self._line()
        while is_open(text):
            text += "\n" + self._line()
        return message_of(text)

    def _line(self) -> str:
        line = self._readline()
        if not line:
            raise EOFError
        self._lines += 1
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError as exc:
            raise BadInput(
                f"line {self._lines} of standard input is not UTF-8 text ({exc.reason})"
            ) from None


class TerminalReader:
    """Messages that are typed, with editing, completion and what was typed before."""

    def __init__(
        self,
        ctx: Context,
        complete: Callable[[str], Iterable[tuple[str, str]]],
        toolbar: Callable[[int], str],
        keeps: bool = True,
    ) -> None:
        """`complete` gives the words that could stand at the end of a text, and what they are;
        `toolbar` a line of at most so many columns."""
        self._ctx = ctx
        self._history = _history(ctx.home.chat_history, keeps)
        self._session = _session(self._history, complete, toolbar)

    @property
    def keeps(self) -> bool:
        return bool(self._history.keeps)

    @keeps.setter
    def keeps(self, on: bool) -> None:
        self._history.keeps = on

    def read(self) -> str:
        try:
            return message_of(self._session.prompt())
        except KeyboardInterrupt:
            if not self._session.default_buffer.text:
                self._ctx.say(HOW_TO_LEAVE)
            raise


def _session(
    history: Any,
    complete: Callable[[str], Iterable[tuple[str, str]]],
    toolbar: Callable[[int], str],
) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    # What the model says may go to a file; what the person types stays on the terminal.
    output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)

    def bottom() -> str:
        columns = output.get_size().columns
        try:
            return toolbar(columns)
        except Exception as exc:  # noqa: BLE001  a bug here must not end the conversation
            return f" the toolbar failed: {type(exc).__name__}: {exc}"[:columns]

    def more(width: int, number: int, wrapped: int) -> str:
        return " " * width if wrapped else "... "

    def placeholder() -> FormattedText:
        # Not in what stays on the screen when nothing was typed.
        shown = "" if get_app().is_done else PLACEHOLDER
        return FormattedText([("class:placeholder", shown)])

    return PromptSession(
        ">>> ",
        multiline=True,  # so that the keys below say when it ends
        prompt_continuation=more,
        key_bindings=_keys(),
        completer=_completer(complete),
        complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(),
        history=history,
        bottom_toolbar=bottom,
        placeholder=placeholder,
        style=Style.from_dict({
            "bottom-toolbar": "noreverse fg:ansibrightblack",
            "placeholder": "fg:ansibrightblack",
        }),
        output=output,
    )  # fmt: skip


def _keys() -> KeyBindings:
    """Enter says it, unless a text of many lines is open; Alt-Enter is a newline."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _completer(complete: Callable[[str], Iterable[tuple[str, str]]]) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class Words(Completer):
        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            text = document.text_before_cursor
            last = text.rpartition(" ")[2]
            for word, meaning in complete(text):
                yield Completion(word, start_position=-len(last), display_meta=meaning)

    return Words()


def _history(path: Path, keeps: bool) -> Any:
    from prompt_toolkit.history import FileHistory

    class PrivateHistory(FileHistory):
        """A file that only its owner reads, and that can be switched off."""

        def __init__(self) -> None:
            self.keeps = keeps
            super().__init__(str(path))

        def load_history_strings(self) -> Iterable[str]:
            with contextlib.suppress(OSError):
                _halve(path)
                return super().load_history_strings()
            return []

        def store_string(self, string: str) -> None:
            if not self.keeps or string.strip() in LEAVE:
                return
            with contextlib.suppress(OSError):  # a full disk must not end the conversation
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
                super().store_string(string)

    return PrivateHistory()


def _halve(path: Path) -> None:
    """Keep the newer half of a history that has grown too large."""
    if not path.exists() or path.stat().st_size <= MOST_HISTORY_BYTES:
        return
    data = path.read_bytes()
    begin = data.find(b"\n\n# ", len(data) - MOST_HISTORY_BYTES // 2)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
        f.write(data[begin:] if begin >= 0 else b"")
    aside.replace(path)


@contextmanager
def quiet_keys() -> Iterator[None]:
    """While a conversation lasts keys are not echoed in the midst of an answer: they wait, as they
    are, for the next message. Ctrl-C is a signal still."""
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = list(before)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
