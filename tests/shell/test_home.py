"""The home: what is checked before a kernel starts, and what is said when it cannot be used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from llmos.kernel.errors import HomeUnusable
from llmos.shell.client import Client
from llmos.shell.home import Home, prepare
from llmos.shell.resolve import local_path, program_args


def test_the_home_is_made_private(tmp_path: Path) -> None:
    home = Home.find(tmp_path / "a" / "home")
    assert prepare(home) == []
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700


def test_a_home_that_was_open_is_closed_and_that_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert "private" in prepare(Home.find(tmp_path))[0]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_file_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HomeUnusable, match="is not a folder"):
        prepare(Home.find(tmp_path / "file"))
    with pytest.raises(HomeUnusable, match="is not a folder"):
        prepare(Home.find(tmp_path / "file" / "below"))


def test_a_home_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(HomeUnusable, match="/proc/llmos cannot be made") as caught:
        prepare(Home.find("/proc/llmos"))
    assert "LLMOS_HOME" in caught.value.hint


def test_a_path_too_long_for_a_socket_is_refused_with_the_numbers(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    for use in (lambda: prepare(Home.find(long)), lambda: Client(long)):
        with pytest.raises(
            HomeUnusable, match=r"too long for unix sockets \(\d+ bytes, at most 81\)"
        ):
            use()
    assert not long.exists()


def test_llmos_home_chooses_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMOS_HOME", str(tmp_path))
    assert Home.find().path == tmp_path
    monkeypatch.delenv("LLMOS_HOME")
    assert Home.find().path == Path(os.path.expanduser("~/.llmos"))


def test_a_torn_manifest_is_as_good_as_none(tmp_path: Path) -> None:
    home = Home.find(tmp_path)
    assert home.manifest() is None
    (tmp_path / "manifest.json").write_text('{"programs": ')
    assert home.manifest() is None
    (tmp_path / "manifest.json").write_text('{"programs": {}}')
    assert home.manifest() == {"programs": {}}


def test_what_exists_here_or_looks_like_a_path_becomes_absolute(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    here = str(tmp_path)
    assert local_path("model", here) == f"{here}/model"
    assert local_path("./absent", here) == f"{here}/absent"
    assert local_path("../x", f"{here}/sub") == f"{here}/x"
    assert local_path("/a/../b", here) == "/b"
    assert local_path("org/model", here) == "org/model"
    assert local_path("registered", here) == "registered"
    assert local_path("", here) == ""


def test_only_paths_and_models_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    schema = {
        "name": "p",
        "args": [{"name": "data", "path": True}, {"name": "text", "path": False}],
    }
    args = program_args(schema, {"data": "x", "text": "x"}, str(tmp_path))
    assert args == {"data": f"{tmp_path}/x", "text": "x"}
