"""Fixtures that more than one room uses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support.live import Live

# The same examples at each run, on a machine however busy. HYPOTHESIS_PROFILE=explore looks for
# new ones.
BUSY = [HealthCheck.too_slow]
settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, suppress_health_check=BUSY
)
settings.register_profile("explore", deadline=None, max_examples=1500, suppress_health_check=BUSY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="module")
def module_kernel() -> Iterator[Live]:
    live = Live()
    live.run(live.boot())
    yield live
    live.run(live.down())
    live.dispose()


@pytest.fixture
def live(module_kernel: Live) -> Iterator[Live]:
    """A running kernel with one simulated device of 1 GiB; no process lives before or after."""
    yield module_kernel
    module_kernel.run(module_kernel.clean())


@pytest.fixture
def fresh() -> Iterator[Live]:
    """A kernel for one test, which boots it, and may shut it down and boot it again."""
    live = Live()
    yield live
    live.dispose()
