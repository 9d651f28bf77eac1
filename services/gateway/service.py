"""The gateway as a service of llmos: OpenAI's HTTP API. Its server is `main.py` beside it."""

from __future__ import annotations

from importlib import metadata
from typing import Any, ClassVar

from llmos.services.base import call
from llmos.services.daemon import Daemon
from llmos.services.gateway.settings import FILE


class Gateway(Daemon):
    name = "gateway"
    summary = "OpenAI's HTTP API; `llmos serve` starts it"
    at_boot = False
    module: ClassVar[str] = "llmos.services.gateway.main"

    def wanted(self) -> dict[str, Any]:
        path = self.folder / FILE
        told = path.read_text() if path.exists() else ""
        return {"settings": told, "version": metadata.version("llmos")}

    @call
    def status(self) -> dict[str, Any]:
        """Where it listens, and how many requests run and wait."""
        return self.ask("status")
