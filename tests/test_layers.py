"""Who may import whom: the rooms of the architecture, kept by reading every import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "kernel": ("llmos.kernel", "llmos.drivers.base"),
    "drivers": (
        "llmos.drivers", "llmos.kernel.errors", "llmos.kernel.wire", "llmos.kernel.units",
        "llmos.kernel.drop",
    ),
    "services": (
        "llmos.services", "llmos.kernel.protocol", "llmos.kernel.errors", "llmos.kernel.wire",
        "llmos.kernel.units", "llmos.kernel.drop",
    ),
    "shell": (
        "llmos.shell", "llmos.kernel.protocol", "llmos.kernel.errors", "llmos.kernel.wire",
        "llmos.kernel.units",
    ),
}  # fmt: skip

# What else a folder may import, and why.
EXCEPTIONS = {
    # The gateway is a client of the kernel, as anybody's program is: by the public Python API.
    "services/gateway": ("llmos.shell.Client", "llmos.shell.AsyncClient"),
}

# An `__init__` that is a table says so here; all others are empty, or importing one module
# would load its whole room.
TABLES = {"kernel/syscalls/__init__.py", "shell/commands/__init__.py", "shell/__init__.py"}

MODULES = sorted(p for part in MAY_IMPORT for p in (ROOT / part).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it: `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(allowed + ".")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_keep_to_their_room(path: Path) -> None:
    part = name_of(path).split("/")[0]
    ours = {n for n in imports(path) if within(n, "llmos")}
    allowed = (*MAY_IMPORT[part], *EXCEPTIONS.get(name_of(path.parent), ()))
    wrong = {n for n in ours if not any(within(n, a) for a in allowed)}
    assert not wrong, f"{name_of(path)} may not import {sorted(wrong)}"


def test_no_part_is_imported_by_its_bare_name() -> None:
    bare = {
        f"{name_of(p)}: {n}" for p in MODULES for n in imports(p) if n.split(".")[0] in MAY_IMPORT
    }
    assert not bare


def test_the_worker_and_its_kernel_meet_only_on_the_wire() -> None:
    """drivers/worker lives in another process: it knows no driver, and no driver imports it but
    for the file formats both sides have to agree on."""
    for path in (ROOT / "drivers" / "worker").glob("*.py"):
        wrong = {
            n
            for n in imports(path)
            if within(n, "llmos.drivers") and not within(n, "llmos.drivers.worker")
        }
        assert not wrong, f"{name_of(path)}: {wrong}"


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_every_init_is_empty_but_the_tables(part: str) -> None:
    full = {name_of(p) for p in (ROOT / part).rglob("__init__.py") if p.read_text().strip()}
    assert full <= TABLES


def test_the_tests_import_no_part_by_path() -> None:
    """A bare `kernel` would be a second copy of every module."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {n for n in imports(path) if n.split(".")[0] in MAY_IMPORT}, path
