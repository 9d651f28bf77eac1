"""What a call may know of the connection that it came over."""

from __future__ import annotations

from typing import Protocol


class Connection(Protocol):
    uid: int
    attached: set[int]  # pids that end with this connection
