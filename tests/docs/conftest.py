"""A kernel for the documentation's tests: booted as the guides say, with the plugins they write.

The guides' own files are put where an installed distribution would lie, so what runs is the page.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.pages import DOCS, named_files

# Booting, and ending with checkpoints, on a machine that is busy with other tests.
LIMIT_S = 120


@dataclass(frozen=True)
class Machine:
    """A home with a kernel, and the command line that talks to it."""

    home: Path
    environment: dict[str, str]

    def llmos(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "llmos.shell", *words]
        return subprocess.run(
            command, env=self.environment, cwd=self.home, capture_output=True, text=True,
            timeout=LIMIT_S, check=True,
        )  # fmt: skip


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """One kernel for all of tests/docs; it is shut down at the end."""
    home = Path(tempfile.mkdtemp(prefix="ld", dir="/tmp"))
    plugins = home / "site"
    for guide in ("write-a-program.md", "write-a-service.md"):
        install(DOCS / "guides" / guide, plugins)
    environment = {**os.environ, "LLMOS_HOME": str(home), "PYTHONPATH": str(plugins)}
    made = Machine(home, environment)
    made.llmos("boot")
    try:
        yield made
    finally:
        made.llmos("shutdown")
        shutil.rmtree(home)


def install(guide: Path, site: Path) -> None:
    """What `pip install` does with the files of a guide, as far as Python looks at the result."""
    site.mkdir(exist_ok=True)
    files = named_files(guide)
    project: dict[str, Any] = {}
    for name, text in files.items():
        if name.endswith("pyproject.toml"):
            project = tomllib.loads(text)["project"]
        else:
            (site / Path(name).name).write_text(text)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
