"""The pages agree with the code: what is generated is fresh, what is written by hand is whole."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from llmos.kernel import errors, process, protocol
from llmos.shell.options import Command, parse
from support.pages import DOCS, ROOT, blocks, headings, load_generator, prose, table_keys

REFERENCE = DOCS / "reference"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "design" not in p.parts)
WITH_COMMANDS = [ROOT / "README.md", *PAGES]
WITH_LINKS = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator()


@pytest.fixture(scope="module")
def commands(generator: ModuleType) -> dict[str, Command]:
    found: dict[str, Command] = generator.all_commands()
    return found


def test_the_generated_parts_are_fresh(generator: ModuleType) -> None:
    stale = [p.name for p in generator.pages() if generator.fill(p.read_text()) != p.read_text()]
    assert not stale, f"refresh with: {generator.REFRESH}"


def test_every_part_that_can_be_generated_is_in_a_page(generator: ModuleType) -> None:
    used = {m[2] for p in generator.pages() for m in generator.PART.finditer(p.read_text())}
    assert used == set(generator.PARTS)


def test_every_command_is_documented_and_nothing_else_is(commands: dict[str, Command]) -> None:
    documented = headings(REFERENCE / "commands.md", after="# The commands")
    assert documented == list(commands)


def test_every_help_text_fits_in_80_columns(commands: dict[str, Command]) -> None:
    text = (REFERENCE / "commands.md").read_text()
    wide = [line for line in text.partition("# The commands")[2].splitlines() if len(line) > 80]
    assert not wide


def test_every_call_is_documented_and_nothing_else_is() -> None:
    assert headings(REFERENCE / "protocol.md", after="# The calls") == list(protocol.REQUESTS)


def test_every_error_has_a_paragraph_and_nothing_else_has() -> None:
    assert set(headings(REFERENCE / "errors.md")) == set(errors.BY_CODE)


def test_every_state_and_residency_is_explained() -> None:
    page = REFERENCE / "states.md"
    assert table_keys(page, "## state") == list(process.State)
    assert table_keys(page, "## residency") == list(process.Residency)


def test_every_kind_of_record_that_is_written_is_documented() -> None:
    written = {kind for file in _sources("services", "drivers/worker") for kind in _kinds(file)}
    assert written == set(table_keys(REFERENCE / "stream-records.md", "# Records"))


def test_every_environment_variable_that_is_read_is_documented() -> None:
    page = REFERENCE / "configuration.md"
    read = {
        name
        for file in _sources("kernel", "drivers", "services", "shell")
        for name in re.findall(r"environ\.get\(\s*\"(\w+)\"", file.read_text())
    }
    assert read <= set(table_keys(page, "## Environment variables"))


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_command_lines_in_pages_parse(page: Path, commands: dict[str, Command]) -> None:
    plugins = {"linefit"}  # written in the guide itself
    typed = [line for block in blocks(page, "sh") for line in block.splitlines()]
    typed += re.findall(r"^    \$ (.+)$", page.read_text(), re.M)
    for line in typed:
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:
            words.pop(0)  # LLMOS_HOME=... before the command
        if words[:1] != ["llmos"] or len(words) == 1 or words[1] in plugins:
            continue
        assert words[1] in commands, line
        command = commands[words[1]]
        parse(command.options, command.prepare(words[2:]))


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in _anchors(found), f"{target}: no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    missing = [p.name for p in PAGES if p.name != "README.md" and f"/{p.name})" not in index]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_files_that_pages_name_exist(page: Path) -> None:
    for name in re.findall(r"`((?:kernel|drivers|services|shell|docs)/[\w/]+\.\w+)`", prose(page)):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"


def _sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in (ROOT / folder).rglob("*.py")]


def _kinds(file: Path) -> set[str]:
    """The kinds of records that a file writes: `emit(KIND, ...)`, `records.add(PID, KIND, ...)`,
    and a stream's `append`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        at = 1 if called.endswith("records.add") else 0
        to_stream = called.endswith("append") and "streams" in called
        if called.rpartition(".")[2] != "emit" and not at and not to_stream:
            continue
        if len(node.args) > at and isinstance(node.args[at], ast.Constant):
            found.add(str(node.args[at].value))
    return found


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}
