"""Somebody's command as a process of a real kernel: its end, its tree, its checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel import protocol as p
from llmos.kernel.errors import BadArgument, BadInput, IllegalMove, NoMemory
from support.exec_scripts import TREE, WALK, write
from support.real import Machine, is_stopped, machine, wait_until

pytestmark = pytest.mark.slow

ROLES = ("command", "child", "stray")


@pytest.fixture(scope="module")
def m() -> Iterator[Machine]:
    with machine("--device", "cpu0:memory=4GiB") as made:
        yield made


def execute(m: Machine, folder: Path, *command: str, **more: Any) -> int:
    environment = {**os.environ, "LLMOS_TEST_MARK": m.mark}
    return m.submit("exec", command=list(command), env=environment, cwd=str(folder), **more)


def log_of(m: Machine, pid: int) -> bytes:
    return Path(m.row(pid)["log"]).read_bytes()


@pytest.mark.long
def test_its_output_and_its_status_are_the_commands(m: Machine, tmp_path: Path) -> None:
    script = r"printf 'one\377\0two'; echo three >&2; pwd; exit 7"
    pid = execute(m, tmp_path, "sh", "-c", script)
    ended = m.end_of(pid)
    assert ended["exit_status"] == 7
    assert ended["reason"] == "exit status 7: three"
    output = {1: b"", 2: b""}
    for record in m.records(pid, "output"):
        output[record["fd"]] += record["data"]
    assert output == {1: b"one\xff\0two" + f"{tmp_path}\n".encode(), 2: b"three\n"}
    assert sorted(log_of(m, pid)) == sorted(output[1] + output[2])
    assert m.row(pid)["name"] == "sh"


def test_it_has_the_environment_of_whoever_submits_it(m: Machine, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "MINE": "1", "LLMOS_TEST_MARK": m.mark}
    pid = m.submit("exec", command=["env"], env=environment, cwd=str(tmp_path))
    m.end_of(pid)
    found = dict(line.split("=", 1) for line in log_of(m, pid).decode().splitlines())
    assert found["MINE"] == "1"
    assert found["LLMOS_PID"] == str(pid)
    assert found["LLMOS_HOME"] == str(m.home)
    assert found["LLMOS_DEVICE"] == "cpu"
    assert found["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    ours = {"LLMOS_PID", "LLMOS_HOME", "LLMOS_DEVICE", "LLMOS_STEPS", "LLMOS_WORKER"}
    assert set(found) - ours - set(environment) <= {
        "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "PYTHONUNBUFFERED",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "why"),
    [("no-such-command", "there is no command"), ("./no-such-file", "does not exist"),
     ("/", "is a folder"), ("./text", "is not executable")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_at_submit(
    m: Machine, tmp_path: Path, command: str, why: str
) -> None:
    (tmp_path / "text").write_text("x")
    before = len(m.ask(p.Ps(all=True)))
    with pytest.raises(BadInput, match=why):
        execute(m, tmp_path, command)
    assert len(m.ask(p.Ps(all=True))) == before


@pytest.mark.parametrize("size", ["0", "-1GiB", "many", "1e9"])
def test_a_size_that_is_none_is_refused(m: Machine, tmp_path: Path, size: str) -> None:
    with pytest.raises(BadArgument, match="--memory"):
        execute(m, tmp_path, "true", memory=size)


def test_more_than_there_is_is_refused(m: Machine, tmp_path: Path) -> None:
    with pytest.raises(NoMemory, match="exec needs"):
        execute(m, tmp_path, "true", memory="100TiB")


def test_a_script_without_its_interpreter_says_so(m: Machine, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    ended = m.end_of(execute(m, tmp_path, "./script"))
    assert ended["exit_status"] == 127
    assert "cannot be run" in ended["reason"]
    assert "interpreter" in ended["result"]["error"]["hint"]


def grown_tree(m: Machine, folder: Path, **more: Any) -> tuple[int, dict[str, int]]:
    """A running tree -> its process, and the OS pid of each of its members."""
    pid = execute(m, folder, sys.executable, str(write(folder, TREE)), str(folder), **more)
    for role in ROLES:
        wait_until((folder / role).exists, f"the {role} to count")
    return pid, {role: int((folder / f"{role}.pid").read_text()) for role in ROLES}


def counts(folder: Path) -> list[int]:
    return [int((folder / role).read_text()) for role in ROLES]


def test_a_hold_stops_the_whole_tree(m: Machine, tmp_path: Path) -> None:
    pid, members = grown_tree(m, tmp_path)
    m.ask(p.Pause(pid))
    assert all(is_stopped(os_pid) for os_pid in members.values())
    before = counts(tmp_path)
    # Long for them: each would have counted hundreds of times.
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    assert counts(tmp_path) == before
    m.ask(p.Resume(pid))
    wait_until(
        lambda: all(a > b for a, b in zip(counts(tmp_path), before, strict=True)), "all to go on"
    )
    m.ask(p.Kill(pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_kill_leaves_nobody(m: Machine, tmp_path: Path, number: int) -> None:
    pid, members = grown_tree(m, tmp_path)
    assert m.ask(p.Kill(pid, number))["exit_status"] == 128 + number
    wait_until(lambda: not set(members.values()) & set(m.os_pids()), "nobody to be left")


def test_a_held_tree_can_be_killed(m: Machine, tmp_path: Path) -> None:
    pid, members = grown_tree(m, tmp_path)
    m.ask(p.Pause(pid))
    m.ask(p.Kill(pid, 9))
    wait_until(lambda: not set(members.values()) & set(m.os_pids()), "nobody to be left")


@pytest.mark.fault
def test_a_worker_that_is_killed_takes_its_tree_with_it(m: Machine, tmp_path: Path) -> None:
    pid, members = grown_tree(m, tmp_path)
    os.kill(m.worker_of(pid), signal.SIGKILL)
    assert m.end_of(pid)["exit_status"] == 137
    wait_until(lambda: not set(members.values()) & set(m.os_pids()), "nobody to be left")


def test_what_a_command_leaves_in_the_background_ends_with_it(m: Machine, tmp_path: Path) -> None:
    pid = execute(m, tmp_path, "sh", "-c", "sleep 1000 & setsid sleep 1001 & echo done")
    assert m.end_of(pid)["exit_status"] == 0
    assert log_of(m, pid) == b"done\n"
    wait_until(lambda: not [w for w in m._who().values() if w.startswith("sleep")], "no sleep")


def test_a_failed_command_is_started_again(m: Machine, tmp_path: Path) -> None:
    script = "if [ -e again ]; then exit 0; fi; touch again; exit 3"
    pid = execute(m, tmp_path, "sh", "-c", script, restart="on-failure")
    assert m.end_of(pid)["exit_status"] == 0
    assert m.row(pid)["restarts"] == 1


def test_an_ordinary_command_has_no_checkpoints_and_explain_says_what_that_means(
    m: Machine, tmp_path: Path
) -> None:
    pid = execute(m, tmp_path, "sleep", "1000")
    m.until_state(pid, "running")
    with pytest.raises(IllegalMove, match="no checkpoints"):
        m.ask(p.Checkpoint(pid))
    advice = " ".join(m.ask(p.Explain(pid))["advice"])
    assert "begin anew" in advice
    assert "declared" in advice
    assert "your-own-script" in advice
    m.ask(p.Kill(pid))


# ---- three changed lines ----

TOTAL, PAUSE_S = 60, 0.01


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the walk comes to without llmos."""
    script = write(tmp_path_factory.mktemp("alone"), WALK)
    command = [sys.executable, str(script), str(TOTAL), "0"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def walk(m: Machine, folder: Path, **more: Any) -> int:
    script = str(write(folder, WALK))
    return execute(m, folder, sys.executable, script, str(TOTAL), str(PAUSE_S), **more)


def printed(m: Machine, pid: int) -> bytes:
    return b"".join(r["data"] for r in m.records(pid, "output") if r["fd"] == 1)


def test_a_paused_walk_comes_to_the_same(m: Machine, tmp_path: Path, undisturbed: bytes) -> None:
    pid = walk(m, tmp_path)
    m.until_step(pid, 5)
    m.ask(p.Pause(pid))
    m.ask(p.Resume(pid))
    assert m.end_of(pid)["exit_status"] == 0
    assert printed(m, pid) == undisturbed
    progress = m.row(pid)["progress"]
    assert (progress["step"], progress["total"]) == (TOTAL, TOTAL)
    assert progress["metrics"]["value"] == float(undisturbed.split()[1])


@pytest.mark.fault
@pytest.mark.parametrize("at", [5, 35])
def test_a_killed_walk_goes_on_from_its_checkpoint(
    m: Machine, tmp_path: Path, undisturbed: bytes, at: int
) -> None:
    """In the first and in the second of its two loops."""
    pid = walk(m, tmp_path, restart="on-failure")
    m.until_step(pid, at)
    saved = m.ask(p.Checkpoint(pid))["step"]
    assert saved >= at
    m.until_step(pid, saved + 2)
    os.kill(m.worker_of(pid), signal.SIGKILL)
    assert m.end_of(pid)["exit_status"] == 0
    assert printed(m, pid) == undisturbed
    assert [r["step"] for r in m.records(pid, "restored")] == [saved]
    assert m.row(pid)["restarts"] == 1


@pytest.mark.fault
@pytest.mark.long
def test_a_walk_outlives_the_kernel_and_goes_on_in_the_next(
    tmp_path: Path, undisturbed: bytes
) -> None:
    with machine("--device", "cpu0:memory=4GiB") as m:
        pid = walk(m, tmp_path)
        m.until_step(pid, 5)
        m.shutdown()
        m.boot()
        assert m.end_of(pid)["exit_status"] == 0
        assert printed(m, pid) == undisturbed
        (restored,) = m.records(pid, "restored")
        assert restored["step"] >= 5
