"""Booting and shutting down, as whole command lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmos.kernel.errors import LlmosError
from llmos.shell.context import Context
from llmos.shell.follow import follow
from llmos.shell.launch import Launch, alive, wait_gone
from support.shell import DEVICE, Shell, Site, until


def test_boot_says_where_and_shutdown_returns_when_the_kernel_is_gone(
    sh_off: Shell, off: Site
) -> None:
    ran = sh_off("boot", "--device", DEVICE)
    status = sh_off("status", "--json").json
    off.os_pid = status["kernel"]["os_pid"]
    assert ran.status == 0
    assert ran.out == f"llmos runs: pid {off.os_pid}, home {off.home.path}, devices sim0\n"
    assert "llmos shutdown" in ran.err
    assert (off.home.path / "kernel.sock").stat().st_mode & 0o777 == 0o600
    out = sh_off.ok("shutdown")
    assert not alive(off.os_pid)
    assert out.startswith("llmos has ended")
    assert sh_off("shutdown").status == 1


def test_the_file_in_the_home_decides_and_status_says_so(sh_off: Shell, off: Site) -> None:
    (off.home.path / "config.toml").write_text(
        'batch_share = 0.1\n[[devices]]\nname = "sim7"\nmemory = "2GiB"\n'
    )
    sh_off.ok("boot", "--batch-share", "0")
    status = sh_off("status", "--json").json
    off.os_pid = status["kernel"]["os_pid"]
    (device,) = status["devices"]
    assert (device["device"], device["capacity_bytes"]) == ("sim7", 2 * 2**30)
    assert device["found"] == "config.toml: simulated, nothing is computed"
    assert "sim7 (config.toml: simulated" in sh_off.ok("status")


def test_a_second_boot_says_so_and_does_no_harm(sh: Shell, site: Site) -> None:
    ran = sh("boot", "--device", DEVICE)
    assert ran.status == 1
    assert f"a kernel runs already for {site.home.path} (pid {site.os_pid})" in ran.err
    assert sh("status", "--json").json["kernel"]["os_pid"] == site.os_pid


def test_of_two_boots_at_the_same_moment_one_wins_and_the_other_says_so(off: Site) -> None:
    launches = [Launch(off.home, [DEVICE]) for _ in range(2)]
    outcomes: list[int | str] = []

    def wait(launch: Launch) -> None:
        try:
            outcomes.append(int(launch.wait()["kernel"]["os_pid"]))
        except LlmosError as exc:
            outcomes.append(exc.message)

    threads = [threading.Thread(target=wait, args=(launch,)) for launch in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [off.os_pid] = [found for found in outcomes if isinstance(found, int)]
    [said] = [found for found in outcomes if isinstance(found, str)]
    assert f"(pid {off.os_pid})" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "sim0:memory=lots"], "lots"),
        (["--device", "abacus0"], "abacus"),
        (["--policy", "fairest"], "there is no policy 'fairest'"),
    ],
)
def test_a_kernel_that_cannot_start_says_why(
    sh_off: Shell, off: Site, words: list[str], says: str
) -> None:
    ran = sh_off("boot", *words)
    assert ran.status == 1
    assert ran.err.startswith("llmos: the kernel did not start: ")
    assert says in ran.err
    assert ran.err.count("\n") <= 2
    assert not (off.home.path / "kernel.sock").exists()


def test_what_was_running_goes_on_after_shutdown_and_boot(sh_off: Shell, off: Site) -> None:
    off.boot()
    pid = off.spin(steps=0)
    until(lambda: off.process(pid)["progress"])
    assert "1 checkpoint" in sh_off.ok("shutdown")
    off.boot()
    until(lambda: off.process(pid)["state"] == "running")


def test_whoever_is_attached_stays_so_over_the_death_of_a_kernel(
    off: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    off.boot()
    pid = off.spin(steps=0)
    until(lambda: off.process(pid)["progress"])
    statuses: list[int] = []

    first = off.client()

    def attached() -> None:
        schema = {"name": "spin", "on_interrupt": "detach"}
        with first:
            statuses.append(follow(Context(off.home), first, pid, schema))

    thread = threading.Thread(target=attached)
    thread.start()
    off.kill()
    off.boot()
    with off.client() as client:
        until(lambda: client.process(pid)["state"] != "starting")
        client.kill(pid, 15)
    thread.join(30)
    assert statuses == [143]
    assert "the kernel has gone" in capsys.readouterr().err


@pytest.mark.slow
def test_the_console_script_is_silent_when_its_reader_goes(site: Site) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -P -m llmos.shell ps -w | true"],
        env={**os.environ, "LLMOS_HOME": str(site.home.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.mark.slow
def test_sigint_ends_an_attached_run_with_130(site: Site) -> None:
    command = [sys.executable, "-P", "-m", "llmos.shell", "run", "toy", "x",
               "--max-tokens", "100000"]  # fmt: skip
    with subprocess.Popen(
        command, env={**os.environ, "LLMOS_HOME": str(site.home.path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stdout.read(2) == "1 "
        with site.client() as client:
            [pid] = [q["pid"] for q in client.ps() if q["program"] == "infer"]
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=20)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert until(lambda: site.process(pid)["exit_status"]) == 130


@pytest.mark.slow
def test_a_run_whose_terminal_dies_does_not_go_on(site: Site) -> None:
    command = [sys.executable, "-P", "-m", "llmos.shell", "run", "toy", "x",
               "--max-tokens", "100000"]  # fmt: skip
    with subprocess.Popen(
        command, env={**os.environ, "LLMOS_HOME": str(site.home.path)}, text=True,
        stdout=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stdout.read(2) == "1 "
        with site.client() as client:
            [pid] = [q["pid"] for q in client.ps() if q["program"] == "infer"]
        run.kill()
    until(lambda: site.process(pid)["state"] == "exited")


def test_wait_gone_gives_up_in_time() -> None:
    with pytest.raises(LlmosError, match="still there"):
        wait_gone(os.getpid(), 0.01)


def test_the_log_keeps_what_older_boots_said(sh_off: Shell, off: Site) -> None:
    off.home.log.write_text("llmos: an older error\n")
    ran = sh_off("boot", "--policy", "fairest")
    assert "older" not in ran.err
    assert Path(off.home.log).read_text().startswith("llmos: an older error\n")


def test_whoever_is_attached_is_told_what_a_silent_process_waits_for(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.shell.follow.QUIET_S", 0.02)
    pid = site.spin(steps=0)
    until(lambda: site.process(pid)["progress"])
    statuses: list[int] = []
    with site.client() as client, site.client() as other:
        other.pause(pid)

        def attached() -> None:
            schema = {"name": "spin", "on_interrupt": "detach"}
            statuses.append(follow(Context(site.home), client, pid, schema, skip_old=True))

        thread = threading.Thread(target=attached)
        thread.start()
        until(lambda: "paused: " in capsys.readouterr().err)
        other.kill(pid, 9)
        thread.join(20)
    assert statuses == [137]
