"""Chats and runs as a user has them: a real model, a terminal, files and pipes."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from llmos.shell import Client
from llmos.shell.chatinput import PLACEHOLDER
from llmos.shell.launch import wait_gone
from support.machine import LIMIT_S, Machine
from support.shared import shared
from support.terminal import Terminal

pytestmark = pytest.mark.slow

SHORT = ("--max-tokens", "8", "--temperature", "0")


def chat(machine: Machine, *words: str) -> Terminal:
    return Terminal(machine.home, "chat", "tiny", *SHORT, *words)


def last_chat(machine: Machine) -> dict[str, object]:
    found = [p for p in machine.json("ps", "-a") if p["program"] == "chat"]
    return max(found, key=lambda p: p["pid"])  # type: ignore[no-any-return]


def said(terminal: Terminal) -> int:
    """How many messages the conversation has."""
    found = re.search(r"messages +(\d+)", say(terminal, "/show"))
    assert found is not None
    return int(found[1])


def messages(machine: Machine, name: str) -> object:
    return json.loads((machine.home / "chats" / f"{name}.json").read_text())["messages"]


def say(terminal: Terminal, text: str) -> str:
    """-> what came up to the next prompt."""
    terminal.type(f"{text}\r")
    terminal.expect(text)  # the prompt before may be drawn more than once
    return terminal.expect(PLACEHOLDER)


def test_a_chat_on_a_terminal_is_kept_and_leaves_with_status_0(llmos: Machine) -> None:
    with chat(llmos, "--stats") as terminal:
        terminal.expect(PLACEHOLDER)
        assert "8 tokens" in say(terminal, "The red")
        assert said(terminal) == 2
        say(terminal, "/save kept")
        terminal.type("\x04")
        assert terminal.ended() == 0
    kept = json.loads((llmos.home / "chats" / "kept.json").read_text())
    assert [m["role"] for m in kept["messages"]] == ["user", "assistant"]
    assert kept["settings"] == {"max_tokens": 8, "temperature": 0.0}
    assert last_chat(llmos)["exit_status"] == 0


def test_on_a_pipe_each_line_is_a_turn(llmos: Machine) -> None:
    done = llmos("chat", "tiny", *SHORT, "-v", stdin="The red\nThe blue\n")
    assert done.returncode == 0, done.stderr
    assert [line[:10] for line in done.stderr.splitlines()] == ["8 tokens ·"] * 2
    assert len(done.stdout.splitlines()) == 2
    assert "\x1b" not in done.stdout


def test_clear_regenerate_and_load_on_a_real_engine(llmos: Machine) -> None:
    with chat(llmos) as terminal:
        terminal.expect(PLACEHOLDER)
        say(terminal, "The red")
        say(terminal, "/save before")
        say(terminal, "/clear")
        say(terminal, "The red")
        say(terminal, "/save one")
        assert messages(llmos, "one") == messages(llmos, "before"), "nothing is left"
        say(terminal, "and then")
        say(terminal, "/regenerate")
        assert said(terminal) == 4
        say(terminal, "/load one")
        assert said(terminal) == 2
        say(terminal, "and then")
        terminal.type("\x04")
        assert terminal.ended() == 0


def test_a_chat_that_was_killed_goes_on_in_a_new_process(llmos: Machine) -> None:
    with chat(llmos) as terminal:
        terminal.expect(PLACEHOLDER)
        say(terminal, "The red")
        pid = last_chat(llmos)["pid"]
        llmos.ok("kill", str(pid))
        assert "killed by SIGTERM" in say(terminal, "and then")
        say(terminal, "and then")
        assert said(terminal) == 4
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert last_chat(llmos)["pid"] != pid


@pytest.mark.long
def test_a_chat_goes_on_when_its_kernel_dies(fresh: Machine) -> None:
    fresh.ok("boot")
    fresh.ok("wait", str(fresh.pretrain("tiny", 3)))
    os_pid = int(fresh.json("status")["kernel"]["os_pid"])
    with chat(fresh) as terminal:
        terminal.expect(PLACEHOLDER)
        say(terminal, "The red")
        os.kill(os_pid, signal.SIGKILL)
        wait_gone(os_pid, LIMIT_S)
        terminal.type("and then\r")
        terminal.expect("the kernel has gone")
        fresh.ok("boot")
        terminal.expect(PLACEHOLDER)
        assert said(terminal) == 4
        terminal.type("\x04")
        assert terminal.ended() == 0


@pytest.mark.long
def test_what_a_chat_has_computed_outlives_its_engine(fresh: Machine) -> None:
    model, text = str(shared("models/stories15M")), "once upon a time " * 20
    fresh.ok("boot")
    pid = int(fresh.ok("chat", model, *SHORT, "--keep-alive", "1s", "-d"))
    with Client(fresh.home) as client:
        stream = client.attach(pid)

        def turn(prompt: str) -> dict[str, Any]:
            client.send(pid, {"prompt": prompt})
            return next(record for record in stream if record["kind"] == "turn")

        before = turn(text)
        (engine,) = (p["pid"] for p in client.ps() if p["role"] == "engine")
        while client.process(engine)["reason"] != "unloaded":
            pass
        after = turn("and then")
        assert before["prompt_tokens"] > 64
        assert after["cached_tokens"] > 0.8 * before["prompt_tokens"]


def test_run_reads_files_and_pipes_and_prints_json(llmos: Machine, tmp_path: Path) -> None:
    (tmp_path / "red.txt").write_text("The red\n")
    file = ("-f", str(tmp_path / "red.txt"))
    words = ("run", "tiny", *SHORT, "--raw")
    expected = llmos.ok(*words, "The red")
    assert llmos.ok(*words, *file) == expected
    piped = llmos(*words, stdin="The red\n")
    assert (piped.returncode, piped.stdout) == (0, expected)
    both = llmos(*words, "The red", stdin="and the blue\n")
    assert (both.returncode, both.stdout) == (0, llmos.ok(*words, "The red\n\nand the blue"))
    found = llmos.json(*words, "The red")
    assert found["text"] == expected
    assert found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == found["tokens"] == 8
    lines = [json.loads(x) for x in llmos.ok(*words, "The red", "--json", "--stream").splitlines()]
    assert "".join(x["text"] for x in lines[:-1]) == lines[-1]["text"] == expected


def test_what_is_no_prompt_is_refused_in_one_line(llmos: Machine, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\0")
    for words, says in (
        (("-f", str(tmp_path / "picture")), "is no text"),
        (("-f", str(tmp_path / "none")), "cannot be read"),
        ((), "standard input is empty"),
    ):
        ran = llmos("run", "tiny", *words)
        assert ran.returncode == 2
        assert says in ran.stderr.splitlines()[0]
    assert "standard input is empty" in llmos("run", "tiny", stdin="").stderr
