"""What is installed: the manifest of the home, made by a process of its own.

The kernel never imports a plugin: it reads what `llmos.services.manifest` wrote. The one of the
last boot is good enough to begin with; meanwhile it is compared with what is installed now.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from llmos.kernel.errors import ServiceFailed
from llmos.kernel.log import log

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# Importing a plugin may take 20 s each (services/isolated.py), several at a time.
MAKE_S = 120.0


class Installed:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self._one = asyncio.Lock()
        self.ready = asyncio.Event()  # there is a manifest
        self.checked = asyncio.Event()  # it is that of what is installed now

    async def boot(self) -> None:
        """Read the cached manifest at once, then have it checked and follow what has changed."""
        self._read()
        try:
            await self.check()
        except ServiceFailed as exc:
            log(exc.message)
        finally:
            self.ready.set()
            self.checked.set()

    async def check(self) -> dict[str, list[str]]:
        """Compare with what is installed -> {added, removed, changed, broken}, as "kind name"s."""
        async with self._one:
            before = self._k.manifest
            if await self._make():
                self._read()
                for text in self._k.manifest.get("errors", []):
                    log(f"plugin left out: {text}")
            if self._k.services.started.is_set():
                await self._k.services.follow()
            return difference(before, self._k.manifest)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or a torn one
            manifest = json.loads(self._k.home.manifest.read_text())
            if "broken" in manifest:  # else an older llmos made it: it is made anew
                self._k.manifest = manifest
                self.ready.set()

    async def _make(self) -> bool:
        """Have the file made -> is it another one? ServiceFailed when that cannot be told."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "llmos.services.manifest", str(self._k.home.manifest),
            stdout=asyncio.subprocess.PIPE, cwd="/", start_new_session=True,
        )  # fmt: skip
        said = b""
        try:
            async with asyncio.timeout(MAKE_S):
                assert process.stdout is not None
                async for said in process.stdout:
                    if said == b"begun\n":
                        self._read()
                await process.wait()
        except TimeoutError:
            raise ServiceFailed(f"looking at what is installed took more than {MAKE_S:g} s",
                                "the list that there was before is used") from None  # fmt: skip
        finally:  # also when the kernel ends before it has begun
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode != 0:
            raise ServiceFailed(f"looking at what is installed failed (status "
                                f"{process.returncode})", f"see {self._k.home.log}")  # fmt: skip
        return said == b"made\n"


def difference(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str]]:
    """What came, went and changed between two manifests: "service weather", ..."""
    told: dict[str, list[str]] = {"added": [], "removed": [], "changed": []}
    for kinds in ("programs", "services", "sources", "optimizers"):
        kind = kinds.removesuffix("s")
        old, new = before.get(kinds, {}), now.get(kinds, {})
        told["added"] += [f"{kind} {n}" for n in sorted(new.keys() - old.keys())]
        told["removed"] += [f"{kind} {n}" for n in sorted(old.keys() - new.keys())]
        both = sorted(old.keys() & new.keys())
        told["changed"] += [f"{kind} {n}" for n in both if old[n].get("code") != new[n]["code"]]
    told["broken"] = [
        f"{b['kind'].removesuffix('s')} {b['name']}: {b['error']}" for b in now.get("broken", ())
    ]
    return told
