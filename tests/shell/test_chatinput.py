"""How messages are typed: many lines, keys, completion, what is kept; and how they are piped."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.base import PipeInput
from prompt_toolkit.output import DummyOutput

from llmos.kernel.errors import BadInput
from llmos.shell import chatinput
from llmos.shell.chat import Conversation
from llmos.shell.chatinput import HOW_TO_LEAVE, PipeReader, TerminalReader, is_open, message_of
from llmos.shell.chats import SavedChat, save
from llmos.shell.commands.chat import completions, toolbar
from llmos.shell.context import Context
from llmos.shell.talk import Talk
from support.chats import SCHEMA, Lines
from support.shell import Site


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    """A keyboard: what is sent to it is typed."""
    monkeypatch.setattr("prompt_toolkit.output.create_output", lambda *a, **k: DummyOutput())
    with create_pipe_input() as made, create_app_session(input=made, output=DummyOutput()):
        yield made


def reader(off: Site, keeps: bool = True) -> TerminalReader:
    return TerminalReader(Context(off.home), lambda text: (), lambda columns: "", keeps)


def typed(off: Site, keys: PipeInput, text: str) -> str:
    keys.send_text(text)
    return reader(off).read()


def test_enter_says_it_and_alt_enter_is_a_newline(off: Site, keys: PipeInput) -> None:
    assert typed(off, keys, "hello\r") == "hello"
    assert typed(off, keys, "one\x1b\rtwo\r") == "one\ntwo"


def test_triple_quotes_hold_many_lines(off: Site, keys: PipeInput) -> None:
    assert typed(off, keys, '"""one\r  two\rthree"""\r') == "one\n  two\nthree"
    assert typed(off, keys, '"""\rone\r"""\r') == "one"
    assert typed(off, keys, '/system """be\rkind"""\r') == '/system """be\nkind"""'


def test_a_text_that_is_pasted_is_one_message(off: Site, keys: PipeInput) -> None:
    assert typed(off, keys, "\x1b[200~one\rtwo\x1b[201~\r") == "one\ntwo"


def test_ctrl_c_drops_the_line_and_the_next_one_says_how_to_leave(
    off: Site, keys: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    keys.send_text("half a li\x03")
    made = reader(off)
    with pytest.raises(KeyboardInterrupt):
        made.read()
    assert capsys.readouterr().err == ""
    keys.send_text("\x03")
    with pytest.raises(KeyboardInterrupt):
        made.read()
    assert capsys.readouterr().err == HOW_TO_LEAVE + "\n"


def test_ctrl_d_leaves(off: Site, keys: PipeInput) -> None:
    with pytest.raises(EOFError):
        typed(off, keys, "\x04")


def test_what_was_typed_is_there_again_and_private(off: Site, keys: PipeInput) -> None:
    assert typed(off, keys, "first\x1b\rline\r") == "first\nline"
    assert stat.S_IMODE(off.home.chat_history.stat().st_mode) == 0o600
    assert typed(off, keys, "\x1b[A\r") == "first\nline", "the arrow key of another chat"
    with pytest.raises(EOFError):
        typed(off, keys, "\x04")
    assert off.home.chat_history.read_text().count("+first") == 1, "once is enough"


def test_who_wants_it_keeps_nothing(off: Site, keys: PipeInput) -> None:
    keys.send_text("secret\r")
    made = reader(off, keeps=False)
    made.read()
    assert not off.home.chat_history.exists()
    made.keeps = True
    keys.send_text("/bye\r")
    made.read()
    assert not off.home.chat_history.exists(), "nobody wants that back"


def test_a_history_that_has_grown_loses_its_older_half(
    off: Site, keys: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatinput, "MOST_HISTORY_BYTES", 1000)
    entries = "".join(f"\n# 2026-01-01 00:00:00\n+message {i:03}\n" for i in range(100))
    off.home.chat_history.write_text(entries)
    assert typed(off, keys, "\x1b[A\r") == "message 099"
    kept = off.home.chat_history.read_text()
    assert len(kept) < 600
    assert "message 000" not in kept
    assert stat.S_IMODE(off.home.chat_history.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_history_that_cannot_be_written_ends_nothing(off: Site, keys: PipeInput) -> None:
    off.home.chat_history.touch(mode=0o400)
    assert typed(off, keys, "hello\r") == "hello"


@pytest.mark.parametrize(
    ("text", "opened"),
    [('"""', True), ('"""a', True), ('"""a"""', False), ('""""""', False), ('a """', False),
     ('/system """a', True), ('/set stop """a', True), ('/set parameter stop """', True),
     ('/clear """', False), ('"""a"""b', True), ("a", False)],
)  # fmt: skip
def test_what_is_open(text: str, opened: bool) -> None:
    assert is_open(text) == opened


def test_a_message_is_what_stands_between_the_quotes() -> None:
    assert message_of('  """\n a\nb \n"""  ') == " a\nb "
    assert message_of("  a  ") == "a"


# ---- completion and toolbar ----


@pytest.fixture
def talk(off: Site) -> Talk:
    ctx = Context(off.home)
    return Talk(ctx, Conversation(ctx, SCHEMA, {"model": "models/tiny"}, {}), Lines())


def words(talk: Talk, text: str) -> list[str]:
    return [word for word, _ in completions(talk, text)]


def test_commands_settings_and_conversations_are_completed(talk: Talk, off: Site) -> None:
    assert words(talk, "/s") == ["/set", "/system", "/show", "/save"]
    assert words(talk, "/b") == ["/bye"]
    assert words(talk, "s") == []
    assert words(talk, "/set te") == ["temperature"]
    assert {"seed", "stats", "markdown"} <= set(words(talk, "/set "))
    assert "dtype" not in words(talk, "/set ")
    assert words(talk, "/set markdown ") == ["on", "off"]
    assert words(talk, "/set loud o") == ["on", "off"]
    assert words(talk, "/show sy") == ["system"]
    assert words(talk, "hello /s") == []
    save(off.home, "holiday", SavedChat("m"))
    assert words(talk, "/load h") == words(talk, "/save h") == ["holiday"]


def test_completion_replaces_the_last_word(off: Site, talk: Talk) -> None:
    completer = chatinput._completer(lambda text: completions(talk, text))
    found = list(completer.get_completions(Document("/set temp"), CompleteEvent()))
    assert [(c.text, c.start_position) for c in found] == [("temperature", -4)]


def test_the_toolbar_tells_the_model_the_speed_and_the_context(talk: Talk) -> None:
    assert toolbar(talk, 2048) == " tiny · context 0/2.0k tokens"
    talk.conversation.last = {"prompt_tokens": 100, "tokens": 50, "tokens_per_s": 12.34}
    talk.conversation.messages = [{"role": "user", "content": "x"}]
    talk.name = "holiday"
    assert toolbar(talk, None) == " tiny · 12.3 tokens/s · context 150 tokens · holiday"
    talk.conversation.messages = []
    assert "context 0/2.0k" in toolbar(talk, 2048), "after /clear"


# ---- pipes ----


def piped(data: bytes) -> PipeReader:
    return PipeReader(io.BytesIO(data).readline)


def test_on_a_pipe_each_line_is_a_message() -> None:
    lines = piped(b'one\r\n"""two\n three"""\nlast')
    assert [lines.read() for _ in range(3)] == ["one", "two\n three", "last"]
    with pytest.raises(EOFError):
        lines.read()


def test_what_is_no_text_is_refused_with_its_line() -> None:
    lines = piped(b"one\n\xff\xfe\nthree\n")
    lines.read()
    with pytest.raises(BadInput, match="line 2 of standard input is not UTF-8"):
        lines.read()
