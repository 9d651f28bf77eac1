"""What the toolbar and the completion know: fetched in a thread, so that typing never waits.

A kernel that goes, hangs or comes back changes what is known, and nothing else.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from llmos.kernel.errors import LlmosError, NoKernel
from llmos.shell.client import Client, Record
from llmos.shell.home import Home

REFRESH_S = 1.0
# Models change seldom, and listing them reads their folders.
MODELS_EVERY_S = 5.0
# A poll that has lasted so long means that the kernel hangs.
HANGS_S = 5.0


@dataclass(frozen=True)
class Known:
    """The last that was heard. Replaced as a whole, so that readers need no lock."""

    status: Record | None = None
    processes: list[Record] = field(default_factory=list)
    mem: list[Record] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    manifest: Record | None = None
    trouble: str = "asking the kernel ..."


class Poller:
    """Polls from `start` until `stop`."""

    def __init__(self, home: Home, refresh_s: float = REFRESH_S) -> None:
        self._home = home
        self._refresh_s = refresh_s
        self._wake = threading.Event()
        self._stopping = False
        self._began: float | None = None  # of the poll that is under way
        self._models_at = 0.0
        self._known = Known(manifest=home.manifest())
        self._thread = threading.Thread(target=self._poll, name="poller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def refresh(self) -> None:
        """Look again now: a command has changed something."""
        self._models_at = 0.0
        self._wake.set()

    @property
    def known(self) -> Known:
        return self._known

    @property
    def hangs(self) -> bool:
        """Has the kernel not answered for a while?"""
        began = self._began
        return began is not None and time.monotonic() - began > HANGS_S

    def _poll(self) -> None:
        client: Client | None = None
        while not self._stopping:
            self._wake.clear()
            self._began = time.monotonic()
            try:
                client = client or Client(self._home.path)
                self._known = self._look(client)
            except LlmosError as exc:
                if client is not None:
                    client.close()
                    client = None
                self._lost(exc)
            self._began = None
            self._wake.wait(self._refresh_s)
        if client is not None:
            client.close()

    def _lost(self, exc: LlmosError) -> None:
        trouble = "no kernel" if isinstance(exc, NoKernel) else exc.message
        # Flags and model names stay known: they will be the same when it comes back.
        old = self._known
        self._known = Known(models=old.models, manifest=old.manifest, trouble=trouble)

    def _look(self, client: Client) -> Known:
        return Known(
            status=client.status(),
            processes=client.ps(),
            mem=client.mem(),
            manifest=self._manifest(client),
            models=self._models(client),
            trouble="",
        )

    def _manifest(self, client: Client) -> Record:
        """Asked again with the models: services come and go while a kernel runs."""
        again = time.monotonic() - self._models_at >= MODELS_EVERY_S
        return client.programs(checked=again)

    def _models(self, client: Client) -> list[str]:
        now = time.monotonic()
        if now - self._models_at < MODELS_EVERY_S:
            return self._known.models
        self._models_at = now
        try:
            found: list[dict[str, Any]] = client.call("models.ls", 2.0)
        except NoKernel:
            raise
        except LlmosError:
            return self._known.models  # the registry is down: the names are still good
        return [str(m["name"]) for m in found]
