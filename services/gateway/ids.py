"""Names of what the gateway makes."""

from __future__ import annotations

import secrets


def new_id(kind: str) -> str:
    """ "chatcmpl-", "file-", "batch_": the API has a style of its own for each."""
    dash = "_" if kind in ("batch", "batch_req", "req", "resp", "msg") else "-"
    return f"{kind}{dash}{secrets.token_hex(12)}"
