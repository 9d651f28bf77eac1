"""Server-sent events, as bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

DONE = b"data: [DONE]\n\n"

Events = AsyncGenerator[bytes, None]


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(value: Any, kind: str = "") -> bytes:
    """One event of a stream."""
    head = f"event: {kind}\n" if kind else ""
    return f"{head}data: {_encode(value)}\n\n".encode()
