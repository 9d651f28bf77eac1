"""A conversation on the terminal: turns, settings, interruption, the end of its process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from llmos.shell.chat import ChatEnded, Conversation, talk
from llmos.shell.client import Client
from llmos.shell.context import Context
from support.scripted import Scripted, Send
from support.shell import Site

FIELDS = [
    ("model", "str", True), ("system", "str", False), ("max_tokens", "int", False),
    ("stop", "list", False), ("dtype", "str", False),
]  # fmt: skip
SCHEMA = {
    "name": "chat",
    "args": [
        {"name": name, "type": kind, "required": required, "default": None, "help": name,
         "model": False, "path": False, "positional": False}
        for name, kind, required in FIELDS
    ],
}  # fmt: skip


class Chats:
    """Answers as the kernel and the program do: each turn is echoed, then ended."""

    def __init__(self, home: Any) -> None:
        self.streams: dict[int, Send] = {}
        self.inputs: list[dict[str, Any]] = []
        self.pids = 0
        self.interrupt = False
        self.offset = 0
        self.server = Scripted(
            home,
            programs=lambda args, send: send(
                {"ok": {"programs": {"chat": SCHEMA}, "services": {}, "errors": []}}
            ),
            submit=self.submit,
            attach=self.attach,
            send=self.send,
            kill=lambda args, send: send({"ok": {"pid": args["pid"]}}),
            ps=lambda args, send: send({"ok": [{"pid": args["pid"], "reason": "input"}]}),
        )

    def submit(self, args: dict[str, Any], send: Send) -> None:
        self.pids += 1
        send({"ok": {"pid": self.pids}})

    def attach(self, args: dict[str, Any], send: Send) -> None:
        self.streams[args["pid"]] = send

    def send(self, args: dict[str, Any], send: Send) -> None:
        self.inputs.append({"pid": args["pid"], **args["message"]})
        send({"ok": {"pid": args["pid"]}})
        stream = self.streams[args["pid"]]
        match args["message"]:
            case {"prompt": "die"}:
                stream({"ok": {"pid": args["pid"], "exit_status": 137, "reason": "killed"}})
            case {"prompt": "refuse"}:
                self.record(stream, kind="note", text="the prompt is too long")
            case {"prompt": prompt}:
                self.record(stream, kind="text", text=f"you said {prompt}")
                if self.interrupt:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    self.record(stream, kind="turn", tokens=3, first_token_s=0.01)
            case {"stop": True}:
                self.record(stream, kind="turn", tokens=1, finish_reason="interrupted")

    def record(self, stream: Send, **record: Any) -> None:
        self.offset += 1
        stream({"item": {"offset": self.offset, "record": {"at": 0.0, **record}}})


@pytest.fixture
def chats(off: Site) -> Iterator[Chats]:
    made = Chats(off.home.path)
    yield made
    made.server.close()


@pytest.fixture
def client(off: Site, chats: Chats) -> Iterator[Client]:
    with off.client() as made:
        yield made


def converse(off: Site, client: Client, *lines: str) -> Conversation:
    conversation = Conversation(Context(off.home), client, SCHEMA, {"model": "m"}, {})
    said = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    talk(Context(off.home), conversation, read, stats=True)
    return conversation


def test_turns_are_answered_on_stdout(
    off: Site, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(off, client, "hello", "", "again", "/bye", "never said")
    out, err = capsys.readouterr()
    assert out == "you said helloyou said again"
    assert err == "3 tokens, first after 10 ms\n" * 2


def test_a_text_of_many_lines_stands_between_quotes(
    off: Site, client: Client, chats: Chats
) -> None:
    converse(off, client, '"""one', "two", 'three"""')
    assert chats.inputs == [{"pid": 1, "prompt": "one\ntwo\nthree"}]


def test_settings_are_typed_checked_and_kept_for_the_next_conversation(
    off: Site, client: Client, chats: Chats, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("/set max_tokens 5", "/set stop END", "/set max_tokens many", "/set dtype float32",
             "/set max_token 5", "/set system", "/show", "/clear", "hi")  # fmt: skip
    made = converse(off, client, *lines)
    assert [i for i in chats.inputs if "set" in i] == [
        {"pid": 1, "set": {"max_tokens": 5}},
        {"pid": 1, "set": {"stop": ["END"]}},
    ]
    assert chats.inputs[-1] == {"pid": 2, "prompt": "hi"}
    assert made.args == {"model": "m", "max_tokens": 5, "stop": ["END"]}
    out, err = capsys.readouterr()
    assert "--max-tokens takes a whole number, not 'many'" in err
    assert "there is no setting 'dtype'" in err
    assert "did you mean `max_tokens`?" in err
    assert "/set NAME VALUE" in err
    assert "max_tokens     5" in out


def test_an_unknown_command_is_answered_and_help_lists_them(
    off: Site, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(off, client, "/claer", "/?")
    err = capsys.readouterr().err
    assert "did you mean `/clear`?" in err
    assert "/bye" in err


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    off: Site, client: Client, chats: Chats, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(Context(off.home), client, SCHEMA, {"model": "m"}, {})
    chats.interrupt = True
    assert conversation.turn("hello")["finish_reason"] == "interrupted"
    assert {"pid": 1, "stop": True} in chats.inputs
    chats.interrupt = False
    assert conversation.turn("go on")["tokens"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    capsys.readouterr()


def test_a_turn_that_is_refused_gives_the_prompt_back(
    off: Site, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(off, client, "refuse", "hello")
    out, err = capsys.readouterr()
    assert "the prompt is too long" in err
    assert out == "you said hello"


def test_the_end_of_the_process_is_the_end_of_the_chat(off: Site, client: Client) -> None:
    with pytest.raises(ChatEnded, match="killed"):
        converse(off, client, "die")
