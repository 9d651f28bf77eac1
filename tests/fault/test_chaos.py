"""Faults at random in the middle of mixed work; see support/chaos.py for what is looked at.

pytest tests/fault/test_chaos.py -m long            16 faults
pytest tests/fault/test_chaos.py -m soak            200, LLMOS_CHAOS_SEED and _FAULTS change that
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.chaos import CONFIG, Chaos, small_disk
from support.real import Machine
from support.small_models import make_llama

pytestmark = [pytest.mark.fault, pytest.mark.slow]


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def run(folder: Path, seed: int, faults: int) -> None:
    model = make_llama(folder / "model", hidden_size=128, max_position_embeddings=1024)
    m = Machine("--device", "cpu0:memory=3GiB")
    with small_disk(m.home, "700m") as can_fill:
        (m.home / "config.toml").write_text(CONFIG)
        try:
            m.boot()
            chaos = Chaos(m, seed, folder, str(model), can_fill, say)
            chaos.run(faults)
            m.shutdown()
            m.check_nobody_is_left()
        except BaseException:
            say(m.log()[-5000:])
            say((m.home / "dmesg.jsonl").read_text()[-12_000:])
            raise
        finally:
            m.dispose()


@pytest.mark.long
def test_a_few_faults(tmp_path: Path) -> None:
    run(tmp_path, seed=1, faults=16)


@pytest.mark.soak
def test_many_faults(tmp_path: Path) -> None:
    seed, faults = (int(os.environ.get(f"LLMOS_CHAOS_{n}", d))
                    for n, d in (("SEED", "7"), ("FAULTS", "200")))  # fmt: skip
    run(tmp_path, seed, faults)
