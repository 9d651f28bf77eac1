"""`llmos batch`: a file of requests, answered line by line; whatever happens in between."""

from __future__ import annotations

import gzip
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.gateway import LIMIT_S, Served, fields, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served(gateway=False)
    yield made
    made.end()


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def read(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({r["custom_id"] for r in rows}) == len(rows), "somebody was answered twice"
    return {r["custom_id"]: r["response"] for r in rows}


def text_of(response: dict[str, Any]) -> str:
    return str(response["body"]["choices"][0]["text"])


def line(number: int, **more: Any) -> dict[str, Any]:
    body = {**fields(), "prompt": f"{number} the cat", **more}
    return {"custom_id": f"n{number}", "method": "POST", "url": "/v1/completions", "body": body}


def begin(served: Served, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llmos.shell", "batch", *words],
        env={**os.environ, "LLMOS_HOME": str(served.home)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_both_kinds_of_lines_are_answered(served: Served, tmp_path: Path) -> None:
    requests = write(
        tmp_path / "in.jsonl", line(0), "",
        {"prompt": "0 the cat", "max_tokens": 8, "temperature": 0},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "custom_id": "chat"},
    )  # fmt: skip
    out = tmp_path / "out.jsonl"
    done = served.machine("batch", str(requests), "-o", str(out), "--model", "tiny")
    assert done.returncode == 0, done.stderr
    assert "3 of 3 answered" in done.stderr
    found = read(out)
    assert set(found) == {"n0", "line-3", "chat"}
    assert text_of(found["n0"]) == text_of(found["line-3"])
    assert found["chat"]["body"]["choices"][0]["message"]["role"] == "assistant"
    said = served.machine.ok("run", "tiny", "0 the cat", "--max-tokens", "8", "--temperature", "0",
                             "--raw")  # fmt: skip
    assert text_of(found["n0"]) == said.rstrip("\n")


def test_damaged_lines_are_named_and_the_others_answered(served: Served, tmp_path: Path) -> None:
    requests = write(
        tmp_path / "in.jsonl", "{", line(1), line(1),
        {"url": "/v1/x", "body": {}, "custom_id": "a"}, [1], line(2, temperature=9),
    )  # fmt: skip
    out = tmp_path / "out.jsonl"
    done = served.machine("batch", str(requests), "-o", str(out))
    assert done.returncode == 1
    for number in (1, 3, 4, 5, 6):
        assert f"line {number}: " in done.stderr
    assert "1 of 6 answered, 1 failed, 4 damaged" in done.stderr
    again = served.machine("batch", str(requests), "-o", str(out))
    assert again.returncode == 1, "what failed is not forgotten"
    assert "1 of 6 answered, 1 failed, 4 damaged" in again.stderr
    found = read(out)
    assert {name: r["status_code"] for name, r in found.items()} == {"n1": 200, "n2": 400}
    assert found["n2"]["body"]["error"]["param"] == "temperature"


def test_what_was_answered_is_not_asked_again(served: Served, tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", *map(line, range(6)))
    out = tmp_path / "out.jsonl"
    served.machine.ok("batch", str(requests), "-o", str(out))
    whole = out.read_bytes()
    served.machine.ok("batch", str(requests), "-o", str(out))
    assert out.read_bytes() == whole
    out.write_bytes(whole[: len(whole) // 2])  # as a machine that died would leave it
    done = served.machine("batch", str(requests), "-o", str(out))
    assert done.returncode == 0
    assert {n: text_of(r) for n, r in read(out).items()} == {
        r["custom_id"]: text_of(r["response"]) for r in map(json.loads, whole.splitlines())
    }


@pytest.mark.long
def test_ctrl_c_keeps_what_is_done(served: Served, tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", *(line(n, model="long", max_tokens=40)
                                              for n in range(300)))  # fmt: skip
    out = tmp_path / "out.jsonl"
    words = (str(requests), "-o", str(out), "--at-once", "4")
    with begin(served, *words) as process:
        until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3, "some answers")
        assert 0 < len(served.live()) <= 4
        assert {p["class"] for p in served.live()} == {"idle"}
        second = served.machine("batch", *words)
        assert second.returncode == 1
        assert "another `llmos batch` writes" in second.stderr
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
        assert process.stderr is not None
        assert "goes on from here" in process.stderr.read()
    served.until_live(0)
    before = read(out)
    assert 3 <= len(before) < 300
    with begin(served, *words) as process:
        until(lambda: out.read_bytes().count(b"\n") > len(before), "more answers")
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(LIMIT_S)
    after = read(out)
    assert {name: after[name] for name in before} == before


@pytest.mark.long
def test_a_kernel_that_dies_is_waited_for(served: Served, tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", *(line(n, model="long", max_tokens=40)
                                              for n in range(40)))  # fmt: skip
    out = tmp_path / "out.jsonl"
    with begin(served, str(requests), "-o", str(out), "--at-once", "4") as process:
        until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3, "some answers")
        served.kill_kernel()
        served.machine.ok("boot")
        assert process.wait(2 * LIMIT_S) == 0
    assert {r["status_code"] for r in read(out).values()} == {200}
    assert len(read(out)) == 40


def test_progress_is_shown_on_a_terminal(served: Served, tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", *map(line, range(3)))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "llmos.shell", "batch", str(requests), "-o",
         str(tmp_path / "out.jsonl")],
        env={**os.environ, "LLMOS_HOME": str(served.home)}, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 4096):
                said += data
        except OSError:
            pass  # the other end is closed
        assert process.wait(LIMIT_S) == 0
    os.close(ours)
    assert b"\r\x1b[K" in said
    assert b"3 of 3 answered" in said


def test_a_file_may_be_compressed(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(line(0)).encode()))
    served.machine.ok("batch", str(path), "-o", str(tmp_path / "out.jsonl"))
    assert set(read(tmp_path / "out.jsonl")) == {"n0"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("nofile.jsonl", "-o", "out.jsonl"), "is no file"),
        (("in.jsonl", "-o", "in.jsonl"), "written over the requests"),
        (("in.jsonl", "-o", "text.txt"), "line 1 is no answer"),
        (("in.jsonl", "-o", "no/such/folder"), "No such file"),
    ],
)
def test_what_cannot_be_is_one_line(
    served: Served, tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    write(tmp_path / "in.jsonl", line(0))
    write(tmp_path / "text.txt", "not an answer")
    done = served.machine("batch", *(str(tmp_path / w) if w != "-o" else w for w in words))
    assert done.returncode == 1
    assert why in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert (tmp_path / "text.txt").read_text() == "not an answer\n"


def test_without_a_kernel_it_says_how_to_boot(served: Served, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", line(0))
    served.machine.ok("shutdown")
    done = served.machine("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    assert done.returncode == 1
    assert "llmos boot" in done.stderr
