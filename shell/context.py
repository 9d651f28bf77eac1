"""What a command is given: the home, a connection on demand, and where to print.

Data goes to stdout, messages to stderr. Knows no command.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llmos.kernel.errors import NoKernel
from llmos.shell.client import Client
from llmos.shell.home import Home
from llmos.shell.render import ascii_only


class Context:
    """One per invocation; the interactive shell makes one for each line."""

    def __init__(self, home: Home | None = None, interactive: bool = False) -> None:
        self.home = home or Home.find()
        self.interactive = interactive  # inside the interactive shell
        self._manifest: dict[str, Any] | None = None
        self.in_background = False  # the line ended with &
        self.on_submit: Callable[[int, str], None] | None = None  # it keeps its jobs by this

    @contextlib.contextmanager
    def client(self, auto_boot: bool = True) -> Iterator[Client]:
        """A connection for one command. Raises NoKernel."""
        with Client(self.home.path, auto_boot=auto_boot) as client:
            yield client

    def manifest(self, checked: bool = False) -> dict[str, Any] | None:
        """The manifest of the running kernel, else the one that the last kernel left.

        `checked`: look again, at what is installed now.
        """
        if self._manifest is None or checked:
            try:
                with self.client() as client:
                    self._manifest = client.programs(checked)
            except NoKernel:
                self._manifest = self.home.manifest()
        return self._manifest

    # ---- printing ----

    @property
    def stdout_is_terminal(self) -> bool:
        return sys.stdout.isatty()

    @property
    def stderr_is_terminal(self) -> bool:
        return sys.stderr.isatty()

    @property
    def width(self) -> int:
        """Columns of the output: the terminal's, else COLUMNS, else 80."""
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(sys.stdout.fileno()).columns or 80
        columns = os.environ.get("COLUMNS", "")
        return int(columns) if columns.isdigit() and int(columns) > 0 else 80

    def print(self, text: str = "") -> None:
        print(encodable(text, sys.stdout.encoding), flush=True)

    def lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            print(encodable(line, sys.stdout.encoding))
        sys.stdout.flush()

    def json(self, value: Any) -> None:
        print(json.dumps(value, indent=2, ensure_ascii=True), flush=True)

    def say(self, text: str) -> None:
        """A message to the person, not data."""
        print(encodable(text, sys.stderr.encoding), file=sys.stderr, flush=True)


def encodable(text: str, encoding: str | None) -> str:
    """`text` as a stream of that encoding can show it."""
    is_utf8 = (encoding or "").lower().replace("-", "") == "utf8"
    return text if is_utf8 else ascii_only(text)
