"""An adapter that is named as a model runs on its base, in the base's engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.kernel import adapters
from llmos.kernel.errors import BadArgument, NoSuchThing
from support.live import Live, in_kernel

CONFIG = adapters.CONFIG


def write_adapter(folder: Path, base: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


@pytest.fixture
def adapter(live: Live) -> Iterator[Path]:
    """One on the model that every test kernel has."""
    folder = write_adapter(live.path / "models" / "tuned", "toy")
    yield folder
    (folder / CONFIG).unlink()
    folder.rmdir()


@in_kernel
async def test_it_is_a_guest_of_its_bases_engine(live: Live, adapter: Path) -> None:
    pids = [await live.guest(), await live.guest(model="tuned"), await live.guest(adapter="tuned")]
    engines = [live.kernel.core.m.engine_of(live.proc(pid)) for pid in pids]
    assert engines[0] is engines[1] is engines[2]
    assert [live.proc(pid).args["adapter"] for pid in pids] == ["", str(adapter), str(adapter)]
    assert {live.proc(pid).args["model"] for pid in pids} == {str(live.path / "models" / "toy")}
    assert [live.proc(pid).name for pid in pids] == ["toy", "tuned", "toy"]


@in_kernel
async def test_an_adapter_on_an_adapter_is_refused(live: Live, adapter: Path) -> None:
    with pytest.raises(BadArgument, match="tuned is an adapter itself"):
        await live.guest(model="tuned", adapter="tuned")


@pytest.mark.parametrize(
    ("base", "message"),
    [("gone", "on gone: there is no model 'gone'"), (None, "on a model that it does not name")],
)
def test_without_its_base_it_is_said_what_is_missing(
    live: Live, adapter: Path, base: str | None, message: str
) -> None:
    write_adapter(adapter, base)

    async def ask() -> None:
        with pytest.raises(NoSuchThing, match=message) as caught:
            await live.guest(model="tuned")
        assert "--adapter tuned" in caught.value.hint

    live.run(ask())


@in_kernel
async def test_an_unknown_adapter_is_refused_as_an_unknown_model_is(live: Live) -> None:
    with pytest.raises(NoSuchThing, match="there is no model 'nobody'"):
        await live.guest(adapter="nobody")


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    assert adapters.base_of(tmp_path, None) is None
    write_adapter(tmp_path, "toy")
    assert adapters.base_of(tmp_path, None) == "toy"
    (tmp_path / "config.json").write_text("{}")
    assert adapters.base_of(tmp_path, None) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"base_model_name_or_path": 3}'])
def test_a_file_that_makes_no_sense_names_no_base(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text, encoding="latin-1")
    assert not adapters.base_of(tmp_path, None)


def test_what_a_user_may_not_read_is_not_told(tmp_path: Path) -> None:
    uid = os.getuid()
    write_adapter(tmp_path, "toy")
    (tmp_path / CONFIG).chmod(0o600)
    assert adapters.base_of(tmp_path, uid) == "toy"
    assert adapters.base_of(tmp_path, uid + 1) is None
    (tmp_path / CONFIG).chmod(0o640)
    assert adapters.base_of(tmp_path, uid + 1) == "toy", "shared with the group"
    (tmp_path / "secret.json").write_text('{"base_model_name_or_path": "secret"}')
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).symlink_to(tmp_path / "secret.json")
    assert adapters.base_of(tmp_path, uid) is None
    assert adapters.base_of(tmp_path, None) == "secret"


def test_the_kernel_waits_for_no_pipe_and_reads_no_flood(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CONFIG)
    assert adapters.base_of(tmp_path, None) is None
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_bytes(b" " * (adapters._MOST_BYTES + 1))
    assert adapters.base_of(tmp_path, None) is None
