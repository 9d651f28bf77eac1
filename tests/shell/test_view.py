"""What an attached process looks like, on a terminal and into a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.shell.context import Context
from llmos.shell.home import Home
from llmos.shell.view import View, metrics_line
from support.shell import Site, plain


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(Home.find(tmp_path))


def progress(step: int, at: float, total: int = 100) -> dict[str, object]:
    metrics = {"loss": 3.14159, "tokens_per_s": 15_234.0, "lr": 0.001}
    return {"kind": "progress", "at": at, "step": step, "total": total, "metrics": metrics}


def test_into_a_pipe_progress_is_a_line_now_and_then_and_the_last(
    ctx: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    with View(ctx, "pretrain 3") as view:
        for step in range(1, 101):
            view.show(progress(step, at=1000.0 + step / 10))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "pretrain 3: step 1/100  loss 3.142  tok/s 15.2k"
    assert lines[1] == "pretrain 3: step 51/100  loss 3.142  tok/s 15.2k  eta 4.9s"
    assert lines[-1] == "pretrain 3: step 100/100  loss 3.142  tok/s 15.2k"
    assert len(lines) == 3


def test_bytes_are_shown_as_sizes_with_their_speed(
    ctx: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    with View(ctx, "pull 3", unit="byte") as view:
        view.show({"kind": "note", "text": "fetching it"})
        for step, at in ((0, 1000.0), (50, 1010.0), (100, 1020.0)):
            made = {"step": step * 2**20, "total": 100 * 2**20, "metrics": {}}
            view.show({"kind": "progress", "at": at, **made})
        view.show({"kind": "progress", "at": 1030.0, "step": 5, "total": None, "metrics": {}})
    assert capsys.readouterr().err.splitlines() == [
        "fetching it", "pull 3: 0/100M", "pull 3: 50M/100M  5.0M/s  eta 10s",
        "pull 3: 100M/100M  5.0M/s", "pull 3: 5",
    ]  # fmt: skip


def test_text_goes_to_stdout_and_everything_else_to_stderr(
    ctx: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    with View(ctx, "x") as view:
        view.show({"kind": "text", "text": "Once"})
        view.show({"kind": "note", "text": "half\x1b[2J way"})
        view.show({"kind": "sample", "path": "/tmp/grid.png"})
        view.show({"kind": "eval", "metrics": {"perplexity": 12.345}})
        view.show({"kind": "restored", "step": 40})
        view.show({"kind": "something-newer"})
        view.show({"kind": "text", "text": " upon\n"})
    out, err = capsys.readouterr()
    assert out == "Once upon\n"
    assert err.splitlines() == [
        "half [2J way",
        "sample: /tmp/grid.png",
        "evaluation: perplexity 12.35",
        "goes on from its checkpoint at step 40",
    ]


def test_metrics_are_named_as_people_call_them() -> None:
    metrics = {"loss": 0.5, "images_per_s": 812.3, "lr": 1e-3, "my_metric": 3.0}
    assert metrics_line(metrics) == "loss 0.5  img/s 812  my_metric 3"


@pytest.mark.slow
def test_on_a_terminal_progress_is_a_bar_and_the_result_follows_it(site: Site) -> None:
    pid = site.spin(steps=40, busy_ms=5)
    screen = on_terminal(site, "attach", "--from-start", str(pid))
    assert "━" in screen
    assert "40/40" in screen
    assert f"spin {pid} is done" in screen
    assert screen.rstrip().endswith("40"), "the result: how many steps"


@pytest.mark.slow
def test_on_a_terminal_a_continuation_ends_with_a_newline(site: Site) -> None:
    assert on_terminal(site, "run", "toy", "x", "--max-tokens", "3") == "1 2 3 \r\n"


def on_terminal(site: Site, *words: str) -> str:
    """What a command line shows on a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "LLMOS_HOME": str(site.home.path), "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "llmos.shell", *words],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "LANG": "C.UTF-8"},
    ) as shown:  # fmt: skip
        os.close(theirs)
        found = b""
        while True:
            try:
                found += os.read(ours, 4096)
            except OSError:
                break  # the other end is closed: nothing more comes
        os.close(ours)
    assert shown.returncode == 0
    return plain(found.decode())
