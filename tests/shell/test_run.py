"""`run`: where its prompt comes from, several answers, JSON."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from llmos.shell import promptfiles
from llmos.shell.answers import JsonView
from llmos.shell.context import Context
from llmos.shell.options import Usage
from llmos.shell.promptfiles import read_prompt
from llmos.shell.view import View
from support.shell import Shell, Site

Pipe = Callable[[bytes], None]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def ctx(off: Site) -> Context:
    return Context(off.home)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """What a pipe has for us."""
    opened: list[TextIO] = []

    def send(data: bytes) -> None:
        ours, theirs = os.pipe()
        os.write(theirs, data)
        os.close(theirs)
        opened.append(os.fdopen(ours))
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield send
    for stdin in opened:
        stdin.close()


# ---- the prompt ----


def test_standard_input_follows_the_prompt(ctx: Context, piped: Pipe) -> None:
    piped(b"a long text\n")
    assert read_prompt(ctx, "Summarize:", []) == "Summarize:\n\na long text"


@pytest.mark.parametrize("prompt", [None, "-"])
def test_standard_input_alone_is_the_prompt(ctx: Context, piped: Pipe, prompt: str | None) -> None:
    piped(b"\xef\xbb\xbfa text\n\n")
    assert read_prompt(ctx, prompt, []) == "a text\n"


def test_files_follow_the_prompt(ctx: Context, piped: Pipe, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\n")
    (tmp_path / "b").write_text("two\n")
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    piped(b"nobody reads this")
    assert read_prompt(ctx, "Compare:", names) == "Compare:\n\none\n\ntwo"
    assert read_prompt(ctx, None, names) == "one\n\ntwo"
    assert read_prompt(ctx, None, [*names, "-"]) == "one\n\ntwo\n\nnobody reads this"


def test_a_prompt_beside_nothing_is_alone(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as null:
        for stdin in (null, io.StringIO("a test's own"), None):
            monkeypatch.setattr(sys, "stdin", stdin)
            assert read_prompt(ctx, "hello", []) == "hello"


def test_a_script_of_commands_is_no_prompt(off: Site, piped: Pipe) -> None:
    piped(b"ps\nkill 1\n")
    shell = Context(off.home, interactive=True)
    assert read_prompt(shell, None, []) is None
    with pytest.raises(Usage, match="the shell's own"):
        read_prompt(shell, "-", [])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "standard input is empty"),
        (b" \n\n", "standard input is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "standard input is no text: it has zero bytes"),
        (b"abc\xff\xfe", "standard input is not UTF-8 text: invalid start byte at byte 3"),
        (b"x" * 101, "standard input has more than 100"),
    ],
)
def test_what_is_no_prompt_is_one_clear_line(
    ctx: Context, monkeypatch: pytest.MonkeyPatch, piped: Pipe, data: bytes, says: str
) -> None:
    monkeypatch.setattr(promptfiles, "MOST_BYTES", 100)
    piped(data)
    with pytest.raises(Usage, match=says):
        read_prompt(ctx, "-", [])


def test_files_that_cannot_be_read_are_named(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promptfiles, "MOST_BYTES", 100)
    (tmp_path / "large").write_text("x" * 101)
    (tmp_path / "empty").touch()
    for name, says in (("none", "none cannot be read: No such"), ("large", "large has more than"),
                       ("empty", "empty is empty"), ("", "Is a directory")):  # fmt: skip
        with pytest.raises(Usage, match=says):
            read_prompt(ctx, "x", [str(tmp_path / name)])
    (tmp_path / "half").write_text("x" * 60)
    with pytest.raises(Usage, match="the prompt has 122; at most 100"):
        read_prompt(ctx, None, [str(tmp_path / "half")] * 2)


def test_whoever_waits_for_a_pipe_is_told(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    monkeypatch.setattr(promptfiles, "SAY_AFTER_S", 0.0)
    heard: list[str] = []

    def say(text: str) -> None:
        heard.append(text)
        os.write(theirs, b"there")
        os.close(theirs)

    monkeypatch.setattr(ctx, "say", say)
    with os.fdopen(ours) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompt(ctx, "-", []) == "there"
    assert "standard input" in heard[0]


def test_files_and_pipes_on_the_command_line(
    sh: Shell, site: Site, tmp_path: Path, piped: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a text\n")
    pid = sh.ok("run", "toy", "-f", str(tmp_path / "a.txt"), "Summarize:", "-d")
    assert site.process(int(pid))["args"]["prompt"] == "Summarize:\n\na text"
    piped(b"piped")
    pid = sh.ok("run", "toy", "Summarize:", "-d")
    assert site.process(int(pid))["args"]["prompt"] == "Summarize:\n\npiped"
    ran = sh("run", "toy", "-f", str(tmp_path / "none"))
    assert (ran.status, "cannot be read" in ran.err) == (2, True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    ran = sh("run", "toy")
    assert (ran.status, "standard input is empty" in ran.err) == (2, True)
    ran = sh("run", "toy", "x", "--messages", "[]")
    assert (ran.status, "a prompt, or one of --messages" in ran.err) == (2, True)
    pid = sh.ok("run", "toy", "--prompt-ids", "[1, 2]", "-d")
    assert site.process(int(pid))["args"]["prompt_ids"] == [1, 2]


# ---- JSON ----


def text(piece: str, **more: Any) -> dict[str, Any]:
    return {"kind": "text", "at": 1.0, "text": piece, "tokens": [1], **more}


def test_json_is_one_object(sh: Shell) -> None:
    ran = sh("run", "toy", "x", "--max-tokens", "3", "--json")
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["text"] == "1 2 3 "
    assert ran.json["usage"]["completion_tokens"] == 3
    assert ran.json["model"] == "toy"
    ran = sh("run", "toy", "x", "--stream")
    assert (ran.status, "--stream is for --json" in ran.err) == (2, True)


def test_json_lines_are_the_pieces_and_then_the_result(sh: Shell) -> None:
    lines = [json.loads(line) for line in sh.ok(
        "run", "toy", "x", "--max-tokens", "3", "--json", "--stream").splitlines()]  # fmt: skip
    assert [line["kind"] for line in lines] == ["text", "text", "text", "result"]
    assert "".join(line["text"] for line in lines[:-1]) == lines[-1]["text"] == "1 2 3 "


def test_json_of_several_answers_with_logprobs(ctx: Context, capsys: Captured) -> None:
    entry = {"id": 5, "text": "b", "logprob": -0.5, "top": []}
    with JsonView(ctx, "infer 1", lines=False, args={"model": "m"}) as view:
        view.show({"kind": "prompt", "tokens": [7], "logprobs": [None]})
        view.show(text("a", index=0))
        view.show(text("b", index=1, logprobs=[entry]))
        view.show(text("c", index=0))
        view.show({"kind": "note", "text": "slow"})
    view.finish(1, {
        "tokens": 3, "prompt_tokens": 4, "cached_tokens": 2, "finish_reason": "stop",
        "choices": [{"index": 0, "tokens": 2, "finish_reason": "stop", "score": -1.5},
                    {"index": 1, "tokens": 1, "finish_reason": "length"}],
    })  # fmt: skip
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == "slow\n"
    assert (found["text"], found["finish_reason"], found["tokens"]) == ("ac", "stop", 3)
    assert [c["text"] for c in found["choices"]] == ["ac", "b"]
    assert [c["finish_reason"] for c in found["choices"]] == ["stop", "length"]
    assert (found["choices"][0]["score"], found["choices"][1]["logprobs"]) == (-1.5, [entry])
    assert found["prompt"] == {"tokens": [7], "logprobs": [None]}
    assert found["usage"] == {
        "prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "cached_tokens": 2,
    }  # fmt: skip


def test_json_of_a_result_that_tells_little(ctx: Context, capsys: Captured) -> None:
    view = JsonView(ctx, "infer 1", lines=False, args={"model": "m"})
    view.finish(1, {"tokens": 0})
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["logprobs"], len(found["choices"])) == ("", None, 1)


# ---- several answers ----


def test_several_answers_are_printed_one_after_another(ctx: Context, capsys: Captured) -> None:
    with View(ctx, "infer 1") as view:
        for index, piece in ((1, "B"), (0, "A"), (2, "C"), (0, "a"), (1, "b")):
            view.show(text(piece, index=index))
            if index == 0:
                assert piece in capsys.readouterr().out, "the first one as it is made"
    assert capsys.readouterr().out == "\n--- answer 2 ---\nBb\n--- answer 3 ---\nC"


def test_one_answer_has_no_heading(ctx: Context, capsys: Captured) -> None:
    with View(ctx, "infer 1") as view:
        view.show(text("A"))
    assert capsys.readouterr().out == "A"
