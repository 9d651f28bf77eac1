"""Distributions as `pip` would leave them, in a folder that is put on PYTHONPATH, without pip.

What is found by the children of this process (the maker of the manifest, the hosts) is found in
the environment, so a kernel inside the test sees them too.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SERVICES = "llmos.services"


def install(site: Path, name: str, text: str, version: str = "1", **groups: dict[str, str]) -> None:
    """A distribution of one module. `services={"weather": "weather_mod:Weather"}`, and so on."""
    uninstall(site, name)
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(text)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in groups.items():
        lines += [f"[llmos.{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def uninstall(site: Path, name: str) -> None:
    for path in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(path)
    (site / f"{name}.py").unlink(missing_ok=True)


def on_path(site: Path) -> str:
    """PYTHONPATH with `site` in front."""
    return os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))


GOOD = '''
from typing import Annotated, Any, Literal
from llmos.services.base import Service, call

class Weather(Service):
    name = "weather"
    summary = "Forecasts"
    calls_made = 0

    @call
    def forecast(
        self,
        city: Annotated[str, "a city"],
        days: Annotated[int, "how many days"] = 1,
        unit: Annotated[Literal["C", "F"], "of the temperature"] = "C",
        hints: list[str] | None = None,
        exact: bool = False,
    ) -> dict[str, Any]:
        """The forecast for a city."""
        return {"city": city, "days": days, "unit": unit, "hints": hints, "exact": exact}

    @call
    def count(self) -> int:
        """How often this was called in the life of the process."""
        self.calls_made += 1
        return self.calls_made

    @call(limit_s=5)
    def relay(self, method: str, args: dict[str, Any]) -> Any:
        """Call somebody else."""
        return self.call(method, **args)
'''

ROGUE = """
import ctypes, os, signal, time
from llmos.services.base import Service, call

class Rogue(Service):
    name = "rogue"
    summary = "Does what it should not"
    memory = "100MiB"

    @call
    def ok(self) -> str:
        return "ok"

    @call
    def raises(self) -> None:
        raise ZeroDivisionError("oops\\nsecond line")

    @call(limit_s=0.4)
    def hangs(self) -> None:
        while True:
            time.sleep(60)

    @call(limit_s=0.4)
    def hangs_in_c(self) -> None:
        ctypes.PyDLL(None).pause()  # holds the GIL: no signal handler of Python's runs

    @call
    def exits(self) -> None:
        os._exit(3)

    @call
    def exits_politely(self) -> None:
        raise SystemExit(4)

    @call
    def is_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @call
    def crashes(self) -> None:
        ctypes.string_at(0)

    @call
    def leaks(self, mib: int = 150) -> None:
        self.kept = [b"x" * 2**20 for _ in range(mib)]
        time.sleep(60)

    @call
    def asks_for_too_much(self) -> int:
        return len(bytearray(2**40))

    @call
    def returns_a_set(self) -> set:
        return {1}

    @call
    def returns_too_much(self) -> bytes:
        return bytes(17 * 2**20)

    @call
    def floods_its_log(self, lines: int) -> str:
        for n in range(lines):
            print(f"{n:0200}")
        return "done"

    @call
    def writes_on_its_connection(self) -> None:
        for fd in range(3, 256):
            try:
                os.write(fd, b"garbage, and more of it")
            except OSError:
                pass
        time.sleep(60)

    @call
    def leaves_a_child(self) -> int:
        if not (pid := os.fork()):
            time.sleep(600)
        return pid
"""

# Spy works as its callers; Handler, which calls others, does not.
SPY = """
import ctypes, os, signal, threading, time
from pathlib import Path
from typing import Any
from llmos.services.base import Service, call

class Handler(Service):
    name = "handler"
    summary = "Calls others"

    def __init__(self, home):
        super().__init__(home)
        self.began_as = self.call("spy.who")

    @call
    def began(self) -> int:
        return self.began_as

    @call
    def relay(self, method: str, args: dict[str, Any]) -> Any:
        return self.call(method, **args)

class Spy(Service):
    name = "spy"
    summary = "Reads what it is told to"
    as_caller = True
    memory = "100MiB"
    seen = 0

    @call
    def who(self) -> int:
        self.seen += 1
        assert os.getresuid() == (os.getuid(),) * 3
        return os.getuid()

    @call
    def has_seen(self) -> list:
        return [self.seen, os.getppid()]

    @call
    def read(self, path: str) -> str:
        return Path(path).read_text()

    @call
    def relay(self, method: str, args: dict[str, Any]) -> Any:
        return self.call(method, **args)

    @call
    def raises(self) -> None:
        raise ZeroDivisionError("oops")

    @call
    def is_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @call(limit_s=1.5)  # its child must have come so far
    def hangs(self) -> None:
        while True:
            time.sleep(60)

    @call
    def asks_for_more_and_more(self) -> None:
        self.kept = [bytearray(2**20) for _ in range(2**20)]

    @call
    def garbles(self) -> None:
        for fd in range(3, 256):
            try:
                os.write(fd, b"garbage, and more of it")
            except OSError:
                pass
        time.sleep(60)
"""
