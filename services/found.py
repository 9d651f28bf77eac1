"""What entry points lead to, without importing it: where the code lies, and what its text says.

Knows files and syntax, and nothing of what a plugin does.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

# A package with more files is known by its first ones; nobody has that many.
MOST_FILES = 5000


def spec_of(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is. `importlib.util.find_spec` would import the packages that it lies in."""
    path: Any = None
    spec = None
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        found = (f.find_spec(name, path) for f in sys.meta_path)
        spec = next((s for s in found if s is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


@functools.cache
def code_of(point: importlib.metadata.EntryPoint) -> str:
    """Changes with the code behind an entry point: its distribution's, as far as it is one's own.

    A plain module is one file; a package all its modules; a module of a namespace (llmos) the
    folder that it lies in.
    """
    digest = hashlib.sha256()
    for path in _files(point.module):
        stat = os.stat(path)
        digest.update(f"{path} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    return digest.hexdigest()[:16]


def _files(module: str) -> list[Path]:
    spec = spec_of(module)
    if spec is None or not spec.origin or not os.path.isfile(spec.origin):
        return []
    top = spec_of(module.partition(".")[0])
    origin = Path(spec.origin)
    if top is not None and top.submodule_search_locations is None:
        return [origin]
    package = top is not None and top.origin and os.path.isfile(top.origin)
    folder = Path(str(top.origin)).parent if package and top is not None else origin.parent
    return sorted(folder.rglob("*.py"))[:MOST_FILES]


def describe(point: importlib.metadata.EntryPoint) -> dict[str, Any]:
    """A source or an optimizer: {name, summary, kind} from the text of its module.

    Raises FileNotFoundError where there is no such module, SyntaxError where it is no Python.
    """
    spec = spec_of(point.module)
    if spec is None or not spec.origin:
        raise FileNotFoundError(f"there is no module {point.module}")
    node: ast.AST | None = None
    if spec.origin.endswith(".py"):
        node = _definition(ast.parse(Path(spec.origin).read_bytes()), point.attr)
    documented = isinstance(node, ast.ClassDef | ast.FunctionDef)
    text = (ast.get_docstring(node) or "") if documented else ""  # type: ignore[arg-type]
    summary = text.partition("\n")[0]
    return {"name": point.name, "summary": summary, "kind": _kind(node)}


def _definition(tree: ast.Module, name: str) -> ast.AST | None:
    """The class or function of this name in a module; what is imported there is not followed."""
    named = (n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef))
    return next((n for n in named if n.name == name), None)


def _kind(node: ast.AST | None) -> str:
    """`kind = "text"` in the body of a source."""
    for line in getattr(node, "body", ()):
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        value = getattr(line, "value", None)
        if "kind" in names and isinstance(value, ast.Constant):
            return str(value.value)
    return ""
