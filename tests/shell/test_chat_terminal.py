"""`llmos chat` as a person has it: on a terminal, key by key, against a kernel that we play."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmos.shell.chatinput import HOW_TO_LEAVE, PLACEHOLDER
from support.chats import Chats
from support.shell import Site, until
from support.terminal import Terminal

pytestmark = pytest.mark.slow


@pytest.fixture
def chats(off: Site) -> Iterator[Chats]:
    made = Chats(off.home.path)
    yield made
    made.server.close()


@pytest.fixture
def terminal(off: Site, chats: Chats) -> Iterator[Terminal]:
    with Terminal(off.home.path, "chat", "m") as made:
        made.expect(PLACEHOLDER)
        yield made


def test_a_conversation_from_the_first_word_to_ctrl_d(terminal: Terminal, chats: Chats) -> None:
    terminal.type("**hello**\r")
    terminal.expect("you said hello")
    terminal.expect("50 tokens/s · context 10 tokens")
    assert b"\x1b[1mhello\x1b[0m" in terminal.output, "markdown is shown as such"
    terminal.type("\x03")
    terminal.expect(HOW_TO_LEAVE)
    terminal.type("\x04")
    assert terminal.ended() == 0
    assert chats.inputs[-1] == {"pid": 1, "end": True}


def test_ctrl_c_stops_the_answer(terminal: Terminal, chats: Chats) -> None:
    chats.endless = True
    terminal.type("count\r")
    terminal.expect("1 2 3 ")
    terminal.type("\x03")
    terminal.expect(PLACEHOLDER)
    assert {"pid": 1, "stop": True} in chats.inputs
    chats.endless = False
    terminal.type("more\r")
    terminal.expect("you said more")
    terminal.type("/show history\r")
    terminal.expect(">>> count")
    terminal.expect("1 2 3")
    terminal.type("/bye\r")
    assert terminal.ended() == 0


def test_what_is_typed_during_an_answer_is_the_next_message(
    terminal: Terminal, chats: Chats
) -> None:
    chats.endless = True
    terminal.type("count\r")
    terminal.expect("1 2 3 ")
    terminal.type("next\r")
    # It is with the terminal now: let the answer end.
    chats.endless = False
    until(lambda: chats.prompts)
    chats.turn(1, 3, "stop")
    came = terminal.expect("you said next")
    assert "next" not in came.partition(">>>")[0], "not in the midst of the answer"
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_commands_are_completed_and_many_lines_are_one_message(
    terminal: Terminal, chats: Chats
) -> None:
    terminal.type("/sys\t")
    terminal.expect("tem")
    terminal.type(" be kind\r")
    until(lambda: {"pid": 1, "set": {"system": "be kind"}} in chats.inputs)
    terminal.type('"""one\rtwo"""\r')
    terminal.expect("you said one\ntwo")
    terminal.type("/save kept\r")
    terminal.expect("saved as kept: 2 messages")
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_an_answer_while_the_terminal_changes_its_width(terminal: Terminal, chats: Chats) -> None:
    chats.endless = True
    terminal.type("count\r")
    terminal.expect("40 41")
    terminal.resize(30)
    chats.endless = False
    until(lambda: chats.prompts)
    chats.record(1, kind="text", text="the end of it")
    chats.turn(1, 3, "stop")
    terminal.expect("the end of it")
    terminal.type("\x04")
    assert terminal.ended() == 0
    numbers = terminal.shown.partition("1 2 3")[2].split()
    assert [n for n in numbers if n.isdigit()][:38] == [str(n) for n in range(4, 42)]


@pytest.mark.parametrize(
    ("words", "environment"),
    [(("--plain",), {}), ((), {"NO_COLOR": "1"}), ((), {"TERM": "dumb"})],
    ids=["plain", "no-color", "dumb"],
)
def test_plain_answers_are_as_they_are(
    off: Site, chats: Chats, words: tuple[str, ...], environment: dict[str, str]
) -> None:
    with Terminal(off.home.path, "chat", "m", *words, **environment) as terminal:
        terminal.expect(">>>")
        terminal.type("**hello**\r")
        terminal.expect("you said **hello**")
        terminal.type("\x04")
        assert terminal.ended() == 0


def test_run_without_a_prompt_is_a_chat(off: Site, chats: Chats) -> None:
    with Terminal(off.home.path, "run", "m", "--temperature", "0.1") as terminal:
        terminal.expect(PLACEHOLDER)
        terminal.type("hello\r")
        terminal.expect("you said hello")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert chats.submitted[0]["args"] == {"model": "m", "temperature": 0.1}
    with Terminal(off.home.path, "run", "m", "--n", "3") as terminal:
        terminal.expect("without one this is a chat, which takes no --n")
        assert terminal.ended() == 2


def test_a_saved_conversation_is_gone_on_with_without_its_model_being_named(
    off: Site, chats: Chats
) -> None:
    from llmos.shell.chats import SavedChat, save

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "**so**"}]
    save(off.home, "kept", SavedChat("m", "be kind", {"temperature": 0.1}, messages))
    with Terminal(off.home.path, "chat", "--load", "kept") as terminal:
        terminal.expect("loaded kept: 2 messages")
        terminal.expect(">>> hi")
        terminal.expect("so")
        terminal.expect("kept")
        terminal.type("\x04")
        assert terminal.ended() == 0
    sent = chats.submitted[0]["args"]
    assert sent == {"model": "m", "system": "be kind", "temperature": 0.1}
    assert chats.inputs[0] == {"pid": 1, "history": messages}
    with Terminal(off.home.path, "chat") as terminal:
        terminal.expect("MODEL is missing")
        assert terminal.ended() == 2
