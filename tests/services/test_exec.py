"""The program `exec` with real children, without a kernel and without torch."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.programs.exec import DEFAULT_BYTES, Exec, declared_bytes
from llmos.services.programs.exec_command import find_command
from llmos.services.programs.exec_session import _failure
from support.exec_scripts import WALK, write
from support.run_exec import run_exec

PATH = os.environ["PATH"]


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---- what is asked before anything runs ----


def test_a_command_is_found_as_a_shell_finds_it(tmp_path: Path) -> None:
    there = executable(tmp_path / "tool")
    found = {
        find_command([name], str(tmp_path), path)
        for name, path in [("./tool", ""), (str(there), ""), ("tool", f"/nowhere:{tmp_path}"),
                           ("tool", "/nowhere:")]
    }  # fmt: skip
    assert {os.path.realpath(f) for f in found} == {os.path.realpath(there)}


def test_a_relative_folder_in_the_path_is_seen_from_where_it_runs(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    there = executable(tmp_path / "bin" / "tool")
    assert find_command(["tool"], str(tmp_path), "bin") == str(there)


@pytest.mark.parametrize(
    ("word", "why", "hint"),
    [("nix", "there is no command 'nix' in the PATH", "a path begins with"),
     ("text", "there is no command 'text'", "did you mean ./text"),
     ("./nix", r"\./nix does not exist", "looked for at"),
     ("./text", "is not executable", "chmod"),
     ("./folder", "is a folder, not a command", ""),
     ("plain", "plain is not executable", "chmod")],
)  # fmt: skip
def test_what_is_no_command_is_said_in_one_line(
    tmp_path: Path, word: str, why: str, hint: str
) -> None:
    (tmp_path / "text").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "plain").write_text("x")
    with pytest.raises(BadInput, match=why) as caught:
        find_command([word], str(tmp_path), f"{tmp_path}/bin")
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no folder"):
        find_command(["true"], str(tmp_path / "nix"), PATH)


@pytest.mark.parametrize("command", [[], [""]])
def test_no_command_is_said(command: list[str]) -> None:
    with pytest.raises(BadArgument, match="needs a COMMAND"):
        find_command(command, "/", PATH)


@pytest.mark.parametrize(("text", "found"), [("", DEFAULT_BYTES), ("6GiB", 6 * 2**30)])
def test_the_plan_is_what_was_declared(tmp_path: Path, text: str, found: int) -> None:
    plan = Exec.plan(Exec.Args(["true"], text, str(tmp_path), PATH))
    assert plan.total_bytes == found


@pytest.mark.parametrize("text", ["0", "0GiB", "-1", "much", "inf"])
def test_a_size_that_is_none_is_said(text: str) -> None:
    with pytest.raises(BadArgument, match=f"--memory.*{text}"):
        declared_bytes(text)


# ---- a run ----


@pytest.mark.slow
def test_output_is_kept_byte_for_byte_and_apart(tmp_path: Path) -> None:
    code = (
        "import sys; data = bytes(range(256)) * 1024; sys.stdout.buffer.write(data);"
        "sys.stderr.buffer.write(data[::-1]); sys.exit(5)"
    )
    ran = run_exec(tmp_path, sys.executable, "-c", code)
    data = bytes(range(256)) * 1024
    assert ran["output"] == {1: data, 2: data[::-1]}
    assert ran["done"][0] == 5


@pytest.mark.slow
def test_who_waits_uses_no_time(tmp_path: Path) -> None:
    base = run_exec(tmp_path, "true")["cpu_s"]
    assert run_exec(tmp_path, "sleep", "1")["cpu_s"] < base + 0.1


@pytest.mark.slow
def test_a_command_may_have_its_say_after_a_signal(tmp_path: Path) -> None:
    script = "trap 'echo saved; exit 4' TERM; echo begun; while :; do sleep 0.01; done"
    ran = run_exec(tmp_path, "sh", "-c", script, signal_at=[6, int(signal.SIGTERM)])
    assert ran["done"][0] == 4
    assert ran["output"][1] == b"begun\nsaved\n"


@pytest.mark.slow
def test_a_command_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    script = "trap '' TERM; echo begun; while :; do sleep 0.01; done"
    ran = run_exec(
        tmp_path, "sh", "-c", script, signal_at=[6, int(signal.SIGTERM)], grace_s=0.2
    )  # fmt: skip
    status, reason, _ = ran["done"]
    assert status == 137
    assert "SIGTERM" in reason


@pytest.mark.slow
def test_a_signal_of_its_own_is_its_status(tmp_path: Path) -> None:
    ran = run_exec(tmp_path, "sh", "-c", "kill -SEGV $$")
    assert ran["done"][0] == 128 + signal.SIGSEGV
    assert "SIGSEGV" in ran["done"][1]


@pytest.mark.slow
def test_a_python_out_of_memory_is_said_to_be_one(tmp_path: Path) -> None:
    ran = run_exec(tmp_path, sys.executable, "-c", "bytearray(1 << 60)", memory="2GiB")
    status, reason, _ = ran["done"]
    assert status == 1
    assert reason.startswith("out of memory (it declared 2GiB)")


@pytest.mark.parametrize(
    ("status", "tail", "reason"),
    [(1, b"RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "out of mem"),
     (1, b"torch.OutOfMemoryError: CUDA out of memory.", "out of memory"),
     (137, b"", "was the memory short?"),
     (1, b"Traceback\nValueError: no\n", "exit status 1: ValueError: no"),
     (2, b"\xff\xfe", "exit status 2: "), (3, b"", "exit status 3")],
)  # fmt: skip
def test_a_failure_has_a_reason(status: int, tail: bytes, reason: str) -> None:
    assert reason in _failure(status, tail, "").reason


# ---- three changed lines ----


@pytest.mark.slow
def test_a_walk_that_was_stopped_goes_on_to_the_same_end(tmp_path: Path) -> None:
    script = str(write(tmp_path, WALK))
    whole = run_exec(tmp_path / "a", sys.executable, script, "40", "0")
    first = run_exec(tmp_path / "b", sys.executable, script, "40", "0.01", save_at=8)
    assert first["done"] is None
    assert first["can"] == 1
    (folder,) = first["saved"]
    step = int(folder[-9:])
    assert step >= 8
    second = run_exec(tmp_path / "b", sys.executable, script, "40", "0", restore=folder)
    assert second["output"][1] == whole["output"][1]
    assert second["reports"][-1][:2] == [40, 40]
    assert second["reports"][0][0] > step


@pytest.mark.slow
def test_a_checkpoint_on_the_way_changes_nothing(tmp_path: Path) -> None:
    script = str(write(tmp_path, WALK))
    whole = run_exec(tmp_path / "a", sys.executable, script, "40", "0")
    saved = run_exec(tmp_path / "b", sys.executable, script, "40", "0.01", save_at=8, go_on=True)
    assert len(saved["saved"]) == 1
    assert saved["output"][1] == whole["output"][1]


@pytest.mark.slow
def test_a_checkpoint_of_the_last_step_is_loaded_too(tmp_path: Path) -> None:
    script = str(write(tmp_path, WALK))
    whole = run_exec(tmp_path / "a", sys.executable, script, "4", "0.3")
    for attempt in "bcdef":  # asked for in step 3; on a busy machine it may still be made there
        work = tmp_path / attempt
        saved = run_exec(work, sys.executable, script, "4", "0.3", save_at=3)["saved"][0]
        if saved.endswith("-000000004"):
            break
    assert saved.endswith("-000000004")
    again = run_exec(work, sys.executable, script, "4", "0", restore=saved)
    assert again["output"][1] == whole["output"][1]


@pytest.mark.slow
def test_nonsense_on_the_line_ends_the_line_and_not_the_run(tmp_path: Path) -> None:
    code = (
        "import os, socket; s = socket.socket(socket.AF_UNIX);"
        "s.connect(os.environ['LLMOS_STEPS']);"
        "s.sendall(b'\\0\\0\\0\\x01\\x05' + b'\\xff' * 100); s.recv(999); print(s.recv(999))"
    )
    ran = run_exec(tmp_path, sys.executable, "-c", code)
    assert ran["done"][0] == 0, ran
    assert ran["reports"] == []
