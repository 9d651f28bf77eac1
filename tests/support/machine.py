"""A real machine for tests: a kernel on the CPU, driven by the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 240.0

# Words enough for a tokenizer, order enough for a loss to fall; no file of anybody's.
TEXT = " ".join(
    f"The {a} {b} sees the {c} {d} and says {n}."
    for n, (a, b, c, d) in enumerate(
        (a, b, c, d)
        for a in ("red", "blue", "old", "young")
        for b in ("cat", "dog", "bird", "horse")
        for c in ("small", "great", "quick")
        for d in ("house", "river", "tree", "stone")
    )
)

# A model so small that a step takes milliseconds.
TINY = (
    "--width", "32", "--layers", "1", "--heads", "2", "--context", "64", "--batch", "4",
    "--vocab-size", "300", "--dtype", "float32", "--threads", "1",
)  # fmt: skip


@dataclass
class Machine:
    """A home, and the `llmos` command for it."""

    home: Path
    text: Path

    def __call__(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "llmos.shell", *words], capture_output=True, text=True,
            env={**os.environ, "LLMOS_HOME": str(self.home)}, timeout=LIMIT_S,
            cwd=self.text.parent,
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
        )  # fmt: skip

    def ok(self, *words: str) -> str:
        done = self(*words)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def pretrain(self, out: str, steps: int, *more: str) -> int:
        """Submit a tiny training -> its pid."""
        return int(self.ok("pretrain", str(self.text), "--out", out, "--steps", str(steps), *TINY,
                           *more, "-d"))  # fmt: skip

    def weights(self, name: str) -> bytes:
        return (self.home / "models" / name / "model.safetensors").read_bytes()

    def process(self, pid: int) -> dict[str, Any]:
        found: dict[str, Any] = next(p for p in self.json("ps", "-a") if p["pid"] == pid)
        return found


def make_machine() -> Machine:
    home = Path(tempfile.mkdtemp(prefix="l", dir="/tmp"))
    text = home.with_name(home.name + "-data") / "text.txt"
    text.parent.mkdir()
    text.write_text(TEXT)
    return Machine(home, text)


def end(machine: Machine) -> None:
    machine("shutdown")
    shutil.rmtree(machine.home, ignore_errors=True)
    shutil.rmtree(machine.text.parent, ignore_errors=True)
