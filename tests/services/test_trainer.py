"""transformers' Trainer with the three lines: interrupted, it ends with the same bits."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmos.services import steps
from support.exec_scripts import TRAINER, write
from support.run_exec import run_exec

pytestmark = pytest.mark.slow

STEPS = 20  # more than one epoch of 12


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMOS_STEPS", raising=False)
    monkeypatch.setattr(steps, "_run", None)


@pytest.mark.usefixtures("_alone")
@pytest.mark.long
def test_it_ends_as_it_does_without_llmos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "plain"), str(STEPS)])
    exec(compile(TRAINER, "script.py", "exec"), {"__name__": "__main__"})
    torch.set_num_threads(threads)
    last = capsys.readouterr().out.splitlines()[-1].encode()
    assert last.startswith(b"final 20 ")

    command = [sys.executable, str(write(tmp_path, TRAINER)), str(tmp_path / "out"), str(STEPS)]
    first = run_exec(tmp_path / "work", *command, save_at=9)
    assert first["done"] is None
    (folder,) = first["saved"]
    assert 9 <= int(folder[-9:]) < STEPS
    assert b"final" not in first["output"][1], "it must not go on behind train()"
    # What the Trainer does to its own folder is nothing to the checkpoint.
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            path.unlink()

    second = run_exec(tmp_path / "work", *command, restore=folder)
    assert second["done"][0] == 0, second["output"][2][-2000:]
    assert second["output"][1].splitlines()[-1] == last
    step, total, metrics = second["reports"][-1]
    assert (step, total) == (STEPS, STEPS)
    assert "train_loss" in metrics


@pytest.mark.usefixtures("_alone")
def test_a_checkpoint_that_the_script_does_not_take_is_said(tmp_path: Path) -> None:
    from llmos.services.trainer import LlmosCallback, checkpoint

    run = steps.current()
    run._line = object()  # type: ignore[assignment]  # connected, as far as it looks
    run.folder = tmp_path
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=5)
    nothing: Any = SimpleNamespace()
    with pytest.raises(RuntimeError, match=r"resume_from_checkpoint=checkpoint\(\)"):
        LlmosCallback().on_train_begin(nothing, state, nothing)
    assert checkpoint() == str(tmp_path)
    assert checkpoint() is None, "it is taken once"
