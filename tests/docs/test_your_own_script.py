"""The guide's own scripts: the plain one, and the one with three lines, stopped and gone on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.pages import DOCS, named_files
from support.run_exec import run_exec

pytestmark = pytest.mark.slow

GUIDE = DOCS / "guides" / "your-own-script.md"

# One thread each, so that what is compared does not depend on who else is on the machine.
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.long
def test_the_script_of_the_guide_ends_the_same_stopped_or_not(tmp_path: Path) -> None:
    files = named_files(GUIDE)
    last = {}
    for name in ("plain/train.py", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(files[name])
    ran = run_exec(
        tmp_path / "a", sys.executable, str(tmp_path / "plain/train.py"), environment=ALONE
    )
    last["plain"] = ran["output"][1]
    command = [sys.executable, str(tmp_path / "train.py")]
    first = run_exec(tmp_path / "b", *command, environment=ALONE, save_at=100)
    assert first["done"] is None
    second = run_exec(tmp_path / "b", *command, environment=ALONE, restore=first["saved"][0])
    last["stopped"] = second["output"][1]
    assert last["plain"].startswith(b"loss ")
    assert last["stopped"] == last["plain"]
    assert second["reports"][-1][:2] == [384, 384]


def test_its_three_lines_are_three_lines() -> None:
    files = named_files(GUIDE)
    plain, changed = (files[n].splitlines() for n in ("plain/train.py", "train.py"))
    new = [line for line in changed if line not in plain]
    beside = [n for n, line in enumerate(new) if line.startswith(("def ", "    "))]
    lines = [
        line
        for n, line in enumerate(new)
        if n not in beside or "steps(" in line or "report(" in line
    ]
    assert len(lines) == 3, lines
