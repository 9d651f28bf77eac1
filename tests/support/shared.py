"""Find the real data and models that tests use where they are present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shared(name: str) -> Path:
    """The file or folder `name` of the test data; skips the test where it is not there.

    Looks in $LLMOS_TEST_DATA, else in `shared/` beside the repository.
    """
    base = Path(os.environ.get("LLMOS_TEST_DATA") or ROOT.parent / "shared")
    path = base / name
    if not path.exists():
        pytest.skip(f"no {name} in {base} (set LLMOS_TEST_DATA)")
    return path
