"""Fixtures of the shell's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.shell import Shell, Site


@pytest.fixture(scope="session")
def shared_site() -> Iterator[Site]:
    site = Site()
    site.boot()
    yield site
    site.end()


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """A running kernel with a simulated device; no process lives before or after."""
    yield shared_site
    shared_site.clean()


@pytest.fixture
def off() -> Iterator[Site]:
    """A home of the test's own, whose kernel is not booted."""
    site = Site()
    yield site
    site.end()


@pytest.fixture
def sh(site: Site, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(site.home, capsys)


@pytest.fixture
def sh_off(off: Site, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(off.home, capsys)
