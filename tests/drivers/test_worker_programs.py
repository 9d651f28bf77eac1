"""What is done in a fresh worker before its program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "first_steps.py"


@pytest.mark.long
def test_the_first_step_of_every_process_has_the_same_bits() -> None:
    ran = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "300"], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "1\n"


def test_the_vector_functions_of_mkl_are_called_with_one_thread() -> None:
    code = (
        "import os, torch; torch.set_num_threads(2); n = len(os.listdir('/proc/self/task'));"
        "from llmos.drivers.worker.programs import settle_vector_math as f; f();"
        "print(len(os.listdir('/proc/self/task')) - n)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "0\n"
