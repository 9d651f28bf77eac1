"""Read the pages in docs/: code blocks, files written in guides, headings, tables."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_NAMED = re.compile(r"^`([\w./-]+)`:\n\n```\w*\n(.*?)^```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return [m[2] for m in _BLOCK.finditer(page.read_text()) if m[1] == language]


def named_files(page: Path) -> dict[str, str]:
    """The files that a guide writes: a line with the name, then a block with the text."""
    return {m[1]: m[2] for m in _NAMED.finditer(page.read_text())}


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _BLOCK.sub("", page.read_text())


def headings(page: Path, after: str = "") -> list[str]:
    """The `## ` headings of a page, from a line on."""
    text = prose(page)
    return re.findall(r"^## (.+)$", text[text.index(after) :], re.M)


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table under a heading."""
    _, _, rest = page.read_text().partition(f"{heading}")
    lines: list[str] = []
    for line in rest.splitlines():
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def table_keys(page: Path, heading: str) -> list[str]:
    """The names in backticks in the first column of the table under a heading."""
    return [k for row in table_rows(page, heading) for k in re.findall(r"`([^`]+)`", row[0])]


def load_generator() -> ModuleType:
    """docs/reference/generate.py as a module."""
    path = DOCS / "reference" / "generate.py"
    spec = importlib.util.spec_from_file_location("llmos_docs_generate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
