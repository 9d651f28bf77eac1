"""A million bad frames: minutes, so only `pytest -m soak` sends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent / "fuzz_protocol.py"


@pytest.mark.soak
@pytest.mark.fault
def test_a_million_bad_frames_cost_the_others_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(RUNNER)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
