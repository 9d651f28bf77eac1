"""A kernel that comes back: by systemd, or by whoever asks next."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from llmos.shell import Client, autoboot
from llmos.shell.home import Home
from llmos.shell.launch import alive
from llmos.shell.unit import quoted, unit
from support.shell import DEVICE, Shell, Site, until


@pytest.mark.parametrize(
    ("word", "written"),
    [("plain", "plain"), ("a b", '"a b"'), ("50%", "50%%"), ('say "x"', '"say \\"x\\""'),
     ("$HOME", "$$HOME"), ("a\\b", '"a\\\\b"'), ("", '""')],
)  # fmt: skip
def test_words_are_quoted_as_systemd_reads_them(word: str, written: str) -> None:
    assert quoted(word) == written


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
@pytest.mark.parametrize("name", ["home", "a b%c"])
def test_systemd_takes_the_unit(tmp_path: Path, name: str) -> None:
    home = Home(tmp_path / name)
    home.path.mkdir()
    command = ["/bin/sh", "-c", "exit 0", "--device", "cpu0:cores=0,memory=8GiB"]
    file = tmp_path / "llmos.service"
    file.write_text(unit(home, command, system=True, environment={"HF_HOME": "/a b"}))
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True
    )
    assert "llmos.service" not in ran.stderr, ran.stderr


def test_the_unit_is_printed_and_nothing_is_started(sh_off: Shell, off: Site) -> None:
    ran = sh_off("boot", "--device", DEVICE, "--print-unit")
    assert ran.status == 0
    assert f"--home {off.home.path} --device {DEVICE}\n" in ran.out
    assert "KillMode=process" in ran.out
    assert "systemctl --user daemon-reload" in ran.err
    assert not off.home.socket.exists()


def test_a_kernel_that_died_is_started_by_the_next_client_and_one_that_was_shut_down_is_not(
    sh_off: Shell, off: Site
) -> None:
    sh_off.ok("boot", "--device", DEVICE, "--auto-boot")
    first = sh_off("status", "--json").json["kernel"]["os_pid"]
    os.kill(first, signal.SIGKILL)
    until(lambda: not alive(first))
    assert "no kernel runs" in sh_off("status").err, "to ask whether it runs starts nothing"
    sh_off.ok("ps")
    status = sh_off("status", "--json").json
    off.os_pid = status["kernel"]["os_pid"]
    assert off.os_pid != first
    assert [d["device"] for d in status["devices"]] == [DEVICE.partition(":")[0]]
    sh_off.ok("shutdown")
    assert "no kernel runs" in sh_off("ps").err
    sh_off.ok("boot", "--device", DEVICE)
    off.os_pid = sh_off("status", "--json").json["kernel"]["os_pid"]
    assert autoboot.flags_of(off.home) is None, "the last boot did not say so"


def test_two_clients_at_once_start_one_kernel(off: Site) -> None:
    off.home.path.mkdir(exist_ok=True)
    autoboot.remember(off.home, {"devices": [DEVICE]})
    off.home.socket.touch()
    with Client(off.home.path) as one, Client(off.home.path) as two:
        off.os_pid = one.status()["kernel"]["os_pid"]
        assert two.status()["kernel"]["os_pid"] == off.os_pid
