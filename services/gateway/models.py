"""/v1/models: the registry of the home, as OpenAI lists models."""

from __future__ import annotations

import os
import pwd
from typing import Any

from llmos.services.gateway.errors import no_model
from llmos.services.gateway.kernel import Kernel, Record
from llmos.services.gateway.run import Whose

# What no request can be made of.
NOT_SERVED = ("gan",)


async def listed(kernel: Kernel, whose: Whose) -> Record:
    models = [m for m in await kernel.call("models.ls") if _is_seen(m, whose)]
    return {"object": "list", "data": [_shown(m) for m in models]}


async def one(kernel: Kernel, name: str, whose: Whose) -> Record:
    """Raises ApiError (404)."""
    for model in await kernel.call("models.ls"):
        if model["name"] == name and _is_seen(model, whose):
            return _shown(model)
    raise no_model(name)


def _is_seen(model: Record, whose: Whose) -> bool:
    """Does the registry show it to whoever asks? The gateway itself may see all."""
    if model["kind"] in NOT_SERVED:
        return False
    if not whose.user or model["shared"]:
        return True
    try:
        return os.stat(model["folder"]).st_uid == pwd.getpwnam(whose.user).pw_uid
    except (OSError, KeyError):
        return False


def _shown(model: Record) -> Record:
    made: dict[str, Any] = {
        "id": model["name"],
        "object": "model",
        "created": int(model["created_at"]),
        "owned_by": _owner(model),
    }
    return {**made, "parameters": model.get("parameters"), "kind": model["kind"]}


def _owner(model: Record) -> str:
    try:
        return pwd.getpwuid(os.stat(model["folder"]).st_uid).pw_name
    except (OSError, KeyError):
        return "llmos"
