"""What people touch. `Client` and `AsyncClient` are the Python API, loaded when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmos.shell.aclient import AsyncClient
    from llmos.shell.client import Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    # The command line must start in milliseconds: asyncio is loaded only by who wants it.
    if name == "Client":
        from llmos.shell.client import Client

        return Client
    if name == "AsyncClient":
        from llmos.shell.aclient import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
