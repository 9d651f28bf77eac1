"""Every program's module and schema can be read without torch."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib.metadata, sys
from llmos.services.programs.base import describe
names = []
for entry in importlib.metadata.entry_points(group="llmos.programs"):
    if entry.value.startswith("llmos."):
        schema = describe(entry.load())
        assert schema["name"] == entry.name, (schema["name"], entry.name)
        assert all(a["help"] for a in schema["args"]), schema
        names.append(entry.name)
import llmos.services.model.registry
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
print(*sorted(names))
"""


def test_all_programs_and_the_registry_are_described_without_torch() -> None:
    out = subprocess.run([sys.executable, "-P", "-c", CODE], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    expected = {"chat", "engine", "finetune", "gan", "infer", "pretrain", "pull", "spin"}
    assert expected <= set(out.stdout.split())
