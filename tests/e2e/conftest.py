"""Real machines for the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.machine import Machine, end, make_machine


@pytest.fixture(scope="module")
def llmos() -> Iterator[Machine]:
    """A machine that is up, with a model called `tiny`; one for the tests of a module."""
    machine = make_machine()
    machine.ok("boot")
    try:
        machine.ok("wait", str(machine.pretrain("tiny", 30)))
        yield machine
    finally:
        end(machine)


@pytest.fixture
def fresh() -> Iterator[Machine]:
    """A machine of the test's own, not booted."""
    machine = make_machine()
    try:
        yield machine
    finally:
        end(machine)
