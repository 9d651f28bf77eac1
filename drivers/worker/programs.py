"""Find a program by its entry point and build its arguments. Knows no program by name."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any


def load_program(entry: str) -> Any:
    """`module:Class` -> the class."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def build_args(program: Any, values: dict[str, Any]) -> Any:
    """The program's Args from plain values. The kernel has checked them against the manifest."""
    known = {f.name for f in fields(program.Args)}
    return program.Args(**{k: v for k, v in values.items() if k in known})
