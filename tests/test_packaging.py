"""The list of packages and the tree agree, and the light parts stay light."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("kernel", "drivers", "services", "shell")
CONF = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What the kernel may hold before it has a single process (the issue asks for 60 MB in all).
KERNEL_IMPORT_BYTES = 25 * 1024**2

HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors", "sklearn", "PIL", "peft"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_package_is_listed() -> None:
    listed = set(CONF["tool"]["setuptools"]["packages"])
    on_disk = {
        "llmos." + init.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in TOPS
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert listed == on_disk, "edit [tool.setuptools] packages in pyproject.toml"


def test_every_module_lies_in_a_package() -> None:
    """A folder with .py files but no __init__.py would be left out of the wheel."""
    bare = {
        p.parent.relative_to(ROOT).as_posix()
        for top in TOPS
        for p in (ROOT / top).rglob("*.py")
        if not (p.parent / "__init__.py").exists()
    }
    assert not bare


def test_every_part_is_typed() -> None:
    assert [top for top in TOPS if not (ROOT / top / "py.typed").exists()] == []


@pytest.mark.parametrize("group", sorted(CONF["project"]["entry-points"]))
def test_every_entry_point_leads_somewhere(group: str) -> None:
    listed = CONF["project"]["entry-points"][group]
    installed = {
        p.name: p.value
        for p in importlib.metadata.distribution("llmos").entry_points
        if p.group == group
    }
    assert installed == listed, "reinstall: pip install -e ."
    for value in listed.values():
        module, _, name = value.partition(":")
        path = ROOT / (module.removeprefix("llmos.").replace(".", "/") + ".py")
        assert path.is_file(), value
        text = path.read_text()
        assert f"class {name}" in text or f"def {name}" in text, value


@pytest.mark.parametrize("module", ["llmos.kernel.main", "llmos.shell.main", "llmos.services.host"])
def test_the_light_parts_never_load_the_heavy_ones(module: str) -> None:
    ended = python(f"import {module}, sys; print(*({HEAVY!r} & sys.modules.keys()))")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == ""


def test_the_manifest_is_made_without_the_heavy_parts(tmp_path: Path) -> None:
    code = (
        "import sys, json; sys.argv = ['manifest', sys.argv[1]]\n"
        "from llmos.services import manifest\n"
        "manifest.main()\n"
        "print(*{'torch', 'transformers'} & sys.modules.keys())"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "manifest.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["begun", "made"]


def test_the_kernel_and_its_calls_are_small() -> None:
    code = (
        "import re\n"
        "def rss():\n"
        "    text = open('/proc/self/smaps_rollup').read()\n"
        "    return 1024 * sum(int(n) for n in re.findall(r'Private_Dirty: +(\\d+)', text))\n"
        "import llmos.kernel.main\n"
        "print(rss())"
    )
    ended = python(code)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < KERNEL_IMPORT_BYTES


def test_no_bare_name_reaches_the_world() -> None:
    """`import kernel` must not find ours: the four names are taken by other distributions."""
    for top in TOPS:
        ended = subprocess.run(
            [sys.executable, "-P", "-c", f"import {top}"],
            capture_output=True, text=True, cwd="/", timeout=60, check=False,
        )  # fmt: skip
        assert "ModuleNotFoundError" in ended.stderr
