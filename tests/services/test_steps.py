"""steps() where no llmos is, and what it costs to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmos.services import steps as module
from llmos.services.steps import report, step, steps


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMOS_STEPS", raising=False)
    monkeypatch.setattr(module, "_run", None)


def test_without_llmos_it_is_the_loader() -> None:
    def never(folder: Path) -> None:
        raise AssertionError("nobody asks for a checkpoint")

    assert list(steps("abc", total=3, save=never, load=never)) == ["a", "b", "c"]
    report(loss=1.0)
    assert list(steps(range(2))) == [0, 1]
    assert step() == 5


def test_a_loop_may_be_left_early() -> None:
    for batch in steps(range(10)):
        if batch == 3:
            break
    assert step() == 3, "the one that was left is not done"


def test_save_without_load_is_refused() -> None:
    with pytest.raises(ValueError, match="save and load together"):
        next(iter(steps([1], save=print)))


def test_a_worker_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMOS_STEPS", str(tmp_path / "nobody"))
    assert list(steps([1, 2])) == [1, 2]
    assert "no worker listens" in capsys.readouterr().err


def test_it_loads_neither_torch_nor_the_rest_of_llmos() -> None:
    code = (
        "import sys; import llmos.services.steps; "
        "print(*[m for m in sys.modules if m.startswith(('torch', 'transformers', 'llmos.'))])"
    )
    command = [sys.executable, "-P", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(ended.stdout.split()) == {"llmos.services", "llmos.services.steps"}
