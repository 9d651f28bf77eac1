"""Killed anywhere and resumed, a training is the one that nobody disturbed, to the bit.

The table is that of tests/support/exact.py, in docs/concepts/survival.md.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from llmos.drivers.worker import checkpoint
from support.exact import Killed, Life, Row, differences, rows
from support.run_program import make_context

QUICK = {
    ("pretrain lstm adamw8bit", "while one is written"),
    ("finetune lora gpt2 adamw", "in the middle of a step"),
    ("gan dcgan adam", "in the final save"),
    ("spin", "while one is written"),
}


def cells() -> list[Any]:
    """By default a few; all of them by `-m long`."""
    return [
        pytest.param(
            row, place, id=f"{row.name}, {place}",
            marks=pytest.mark.slow if (row.name, place) in QUICK else pytest.mark.long,
        )
        for row in rows() for place in row.places()
    ]  # fmt: skip


@pytest.mark.parametrize(("row", "place"), cells())
def test_a_killed_run_ends_in_the_same_bits(row: Row, place: str, tmp_path: Path) -> None:
    assert differences(row, place, tmp_path) == []


def test_the_quick_ones_are_in_the_table() -> None:
    assert {(row.name, place) for row in rows() for place in row.places()} >= QUICK


ONE_EACH = ("spin", "gan dcgan adam", "pretrain transformer adamw8bit", "finetune lora llama adamw")


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in rows() if r.name in ONE_EACH], ids=lambda r: r.name)
def test_no_pickle_is_read_when_a_run_is_restored(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Life(row, make_context(tmp_path, threads=1))
    first.die_at("right after a checkpoint")
    with pytest.raises(Killed):
        first.run()
    second = Life(row, make_context(tmp_path, threads=1))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle is read")

    for module, names in (
        (pickle, ("load", "loads", "Unpickler", "_Unpickler")),
        (torch, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    second.after_step = stop
    with pytest.raises(Killed):
        second.run()
    assert second.restored == 6
    suffixes = {p.suffix for p in second.root.rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md"}


def stop() -> None:
    raise Killed


@pytest.mark.slow
def test_conditions_are_kept_and_a_difference_is_said(tmp_path: Path) -> None:
    """Each program keeps them, the instruction set and the kind of device included."""
    for row in (r for r in rows() if r.name in ONE_EACH):
        first = Life(row, make_context(tmp_path / row.name, threads=1))
        first.die_at("right after a checkpoint")
        with pytest.raises(Killed):
            first.run()
        folder = checkpoint.newest(first.root, print)
        assert folder is not None
        (state,) = [
            p
            for p in folder.glob("*.json")
            if p.name in ("state.json", "training.json", "spin.json")
        ]
        capability = torch.backends.cpu.get_cpu_capability()
        text = state.read_text()
        assert '"device": "cpu", "deterministic": false' in text
        assert capability in text
        state.write_text(text.replace(capability, "ABACUS").replace(torch.__version__, "1.0"))
        ctx = make_context(tmp_path / row.name, threads=1)
        second = Life(row, ctx)
        second.program, _ = build_and_load(row, ctx)
        second.program.restore(folder)
        (note,) = [r["text"] for r in ctx.of_kind("note") if "restored with" in r["text"]]
        assert note.startswith(
            f"restored with torch {torch.__version__}, saved with 1.0; processor "
        )
        assert note.endswith("ABACUS: the results may differ in the last bits")


def build_and_load(row: Row, ctx: Any) -> tuple[Any, int]:
    from support.exact import build

    program, steps = build(row)
    program.load(ctx)
    return program, steps
