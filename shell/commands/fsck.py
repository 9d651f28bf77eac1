"""`llmos fsck`: check a home and repair it. No kernel may run on it."""

from __future__ import annotations

import subprocess
import sys

from llmos.shell.context import Context
from llmos.shell.home import Home
from llmos.shell.options import JSON, Command, Option, Values


def run(ctx: Context, values: Values) -> int:
    home = Home.find(values["home"]) if values.get("home") else ctx.home
    # -P: a file in the user's folder must not shadow a module.
    command = [sys.executable, "-P", "-m", "llmos.kernel.fsck.main", "--home", str(home.path)]
    command += [f"--{name}" for name in ("repair", "json") if values.get(name)]
    return subprocess.run(command, check=False).returncode


COMMAND = Command(
    name="fsck",
    summary="Check a home, and repair it",
    run=run,
    options=(
        Option("home", "which one; default: $LLMOS_HOME or ~/.llmos", metavar="FOLDER",
               complete="path"),
        Option("repair", "repair what is found, and say what was done", type="bool"),
        JSON,
    ),
    details="Looks at the journal and its rows, at streams, checkpoints, models, what dead workers "
    "left, and modes. What is taken out goes to lost+found in the home. Refuses while a kernel "
    "runs. Exit status: 0 clean, 1 repaired, 4 problems are left, 8 not checked.",
    examples=("llmos fsck", "llmos fsck --repair"),
)  # fmt: skip
