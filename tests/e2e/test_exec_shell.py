"""`llmos exec` on the command line: in the foreground it looks like the command itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.machine import LIMIT_S, Machine, end, make_machine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llmos() -> Iterator[Machine]:
    machine = make_machine()
    machine.ok("boot")
    yield machine
    end(machine)


def start(llmos: Machine, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llmos.shell", *words],
        env={**os.environ, "LLMOS_HOME": str(llmos.home)}, cwd=llmos.text.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.long
def test_bytes_streams_and_status_pass_through(llmos: Machine) -> None:
    ran = start(llmos, "exec", "--", "sh", "-c", r"printf 'a\377\0'; echo b >&2; exit 9")
    out, err = ran.communicate(timeout=LIMIT_S)
    assert (out, err, ran.returncode) == (b"a\xff\0", b"b\n", 9)


def test_a_quiet_command_says_nothing_and_needs_no_dashes(llmos: Machine) -> None:
    ran = llmos("exec", "true")
    assert (ran.stdout, ran.stderr, ran.returncode) == ("", "", 0)
    ran = llmos("exec", "echo", "--help", "-d")
    assert ran.stdout == "--help -d\n"


def test_ctrl_c_is_the_commands(llmos: Machine, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "print('begun')\n"
        "try:\n    time.sleep(1000)\n"
        "except KeyboardInterrupt:\n    print('saved')\n    raise SystemExit(5)\n"
    )
    ran = start(llmos, "exec", sys.executable, str(script))
    assert ran.stdout is not None
    assert ran.stdout.readline() == b"begun\n"
    ran.send_signal(signal.SIGINT)
    out, _ = ran.communicate(timeout=LIMIT_S)
    assert (out, ran.returncode) == (b"saved\n", 5)


def test_a_second_ctrl_c_kills(llmos: Machine) -> None:
    ran = start(
        llmos, "exec", "sh", "-c", "trap 'echo no' INT; echo begun; while :; do sleep 0.01; done"
    )
    assert ran.stdout is not None
    assert ran.stdout.readline() == b"begun\n"
    ran.send_signal(signal.SIGINT)
    assert ran.stdout.readline() == b"no\n"
    ran.send_signal(signal.SIGINT)
    ran.communicate(timeout=LIMIT_S)
    assert ran.returncode == 137


def test_a_command_whose_terminal_goes_ends(llmos: Machine) -> None:
    ran = start(llmos, "exec", "--name", "left", "sh", "-c", "echo begun; sleep 1000")
    assert ran.stdout is not None
    assert ran.stdout.readline() == b"begun\n"
    ran.kill()
    ran.communicate(timeout=LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while any(p["name"] == "left" for p in llmos.json("ps")):
        assert time.monotonic() < deadline


def test_detached_it_prints_its_pid_and_goes_on(llmos: Machine) -> None:
    pid = llmos.ok("exec", "-d", "--", "sh", "-c", "echo there; exit 3").strip()
    assert llmos("wait", pid).returncode == 3
    assert llmos.ok("logs", pid) == "there\n"
    assert llmos("attach", "--from-start", pid).stdout == "there\n"


def test_a_dry_run_says_what_is_declared_and_runs_nothing(llmos: Machine, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert "2.0G" in llmos.ok("exec", "--memory", "2GiB", "--dry-run", "--", "touch", str(mark))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [(["no-such-command"], 1, "there is no command 'no-such-command'"),
     (["--memory", "-5", "true"], 1, "--memory: '-5' is not a size"),
     (["--memory", "0", "true"], 1, "a command needs some"),
     (["--cwd", "/no/such/folder", "true"], 1, "there is no folder /no/such/folder"),
     ([], 2, "COMMAND is missing"), (["--"], 2, "COMMAND is missing"),
     (["--memori", "1GiB", "true"], 2, "there is no flag --memori")],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(
    llmos: Machine, words: list[str], status: int, text: str
) -> None:
    ran = llmos("exec", *words)
    assert ran.returncode == status
    first = ran.stderr.splitlines()[0]
    assert first.startswith("llmos: ")
    assert text in first
    assert "Traceback" not in ran.stderr
