"""A chat's keys and values over the end of its engine: the next turn computes only what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmos.services.engine.host import Host
from llmos.services.engine.spill import FILE
from llmos.services.programs.base import Guest, Idle, OpenGate
from support.adapters import make_adapter
from support.run_program import make_context
from support.small_models import TEMPLATE, make_llama

ARGS = {"temperature": 0.0, "max_tokens": 20, "dtype": "float32"}


class Engine:
    def __init__(self, folder: Path, home: Path, kv_blocks: int = 0) -> None:
        self.model = str(folder)
        kv_bytes = 0
        if kv_blocks:
            probe = Host(self.model, "float32", "cpu", 1, OpenGate())
            kv_bytes = kv_blocks * probe._loaded.model.pool.shape.block_bytes
        self.host = Host(self.model, "float32", "cpu", 1, OpenGate(), kv_bytes)
        self.ctx = make_context(home)

    def chat(
        self,
        pid: int,
        folder: Path,
        records: list[dict[str, Any]] | None = None,
        adapter: str = "",
    ) -> None:
        args = {"model": self.model, "adapter": adapter, **ARGS}
        given = Guest(pid, "chat", args, (0, 0, pid), records or [], False, folder)
        self.host.admit(self.ctx, given)

    def say(self, pid: int, text: str) -> dict[str, Any]:
        message = {"prompt": text}
        self.ctx.emit("input", pid=pid, key=text, message=message)
        self.host.message(self.ctx, pid, message)
        while not isinstance(self.host.step(self.ctx), Idle):
            pass
        return self.ctx.of_kind("turn", pid)[-1]

    def text(self, pid: int) -> str:
        return self.ctx.text(pid)

    def records(self, pid: int) -> list[dict[str, Any]]:
        return [r for r in self.ctx.records if r["pid"] == pid]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_llama(folder, TEMPLATE, max_position_embeddings=512)


def folder(tmp_path: Path) -> Path:
    made = tmp_path / "procs" / "7"
    made.mkdir(parents=True)
    return made


def moved(model: Path, tmp_path: Path) -> tuple[Engine, Engine, Path]:
    """A chat of one turn whose engine has ended in order, and the next engine."""
    work = folder(tmp_path)
    first = Engine(model, tmp_path / "a")
    first.chat(7, work)
    first.say(7, "the cat sat on the mat and looked at the dog for a long time")
    first.host.close()
    return first, Engine(model, tmp_path / "b"), work


def test_the_next_engine_computes_only_what_is_new(model: Path, tmp_path: Path) -> None:
    first, second, work = moved(model, tmp_path)
    assert (work / FILE).exists()
    second.chat(7, work, first.records(7))
    turn = second.say(7, "and then")
    assert not (work / FILE).exists()
    undisturbed = Engine(model, tmp_path / "c")
    undisturbed.chat(7, work)
    undisturbed.say(7, "the cat sat on the mat and looked at the dog for a long time")
    other = undisturbed.say(7, "and then")
    assert turn["cached_tokens"] == other["cached_tokens"] > 0
    assert first.text(7) + second.text(7) == undisturbed.text(7)


@pytest.mark.parametrize("harm", ["torn", "text", "gone", "other"])
def test_what_cannot_be_read_is_computed_again(
    harm: str, model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, second, work = moved(model, tmp_path)
    file = work / FILE
    match harm:
        case "torn":
            file.write_bytes(file.read_bytes()[:-9])
        case "text":
            file.write_text("no tensors")
        case "gone":
            file.unlink()
        case "other":
            other = make_llama(tmp_path_factory.mktemp("o"), TEMPLATE, seed=5)
            second = Engine(other, tmp_path / "d")
    second.chat(7, work, first.records(7))
    turn = second.say(7, "and then")
    assert turn["cached_tokens"] == 0
    assert second.ctx.of_kind("turn", 7)


def test_who_has_to_make_room_finds_its_blocks_again(model: Path, tmp_path: Path) -> None:
    work = folder(tmp_path)
    engine = Engine(model, tmp_path / "a", kv_blocks=12)
    engine.chat(7, work)
    engine.say(7, "the cat sat on the mat and looked at the dog for a long time")
    greedy = {"model": str(model), "max_tokens": 100, "temperature": 0.0, "ignore_eos": True,
              "prompt_ids": [5 + i % 90 for i in range(90)]}  # fmt: skip
    engine.host.admit(engine.ctx, Guest(8, "infer", greedy, (0, 0, 8)))
    while not isinstance(engine.host.step(engine.ctx), Idle):
        pass
    assert (work / FILE).exists(), "all blocks were needed"
    assert engine.say(7, "and then")["cached_tokens"] > 0


def test_a_chat_that_ends_leaves_no_file(model: Path, tmp_path: Path) -> None:
    first, second, work = moved(model, tmp_path)
    second.chat(7, work, first.records(7))
    second.host.drop(7)
    assert not (work / FILE).exists()


@pytest.mark.parametrize("is_changed", [False, True])
def test_what_an_adapter_has_computed_is_read_back_for_the_same_numbers_only(
    is_changed: bool, model: Path, tmp_path: Path
) -> None:
    work, adapter = folder(tmp_path), tmp_path / "adapter"
    make_adapter(model, adapter, seed=1, scale=0.1)
    first = Engine(model, tmp_path / "a")
    first.chat(7, work, adapter=str(adapter))
    first.say(7, "the cat sat on the mat and looked at the dog for a long time")
    first.host.close()
    assert (work / FILE).exists()
    if is_changed:  # made anew under the same name
        make_adapter(model, adapter, seed=2, scale=0.1)
    second = Engine(model, tmp_path / "b")
    second.chat(7, work, first.records(7), adapter=str(adapter))
    turn = second.say(7, "and then")
    assert (turn["cached_tokens"] > 0) is not is_changed
