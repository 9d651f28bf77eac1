"""`llmos call`: call a service, ours or a plugin's."""

from __future__ import annotations

import json
from typing import Any

from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Usage, Values


def run(ctx: Context, values: Values) -> int:
    arguments: dict[str, Any] = {}
    for word in values.get("arguments", []):
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise Usage(f"an argument is written name=value, not {word!r}")
        arguments[name] = value
    with ctx.client() as client:
        types = _types(client.programs(), values["method"])
        typed = {name: _value(types.get(name, ""), v) for name, v in arguments.items()}
        found = client.call(values["method"], values.get("timeout", 60.0), **typed)
    ctx.json(found)
    return 0


def _types(manifest: dict[str, Any], method: str) -> dict[str, str]:
    """The types of a call's arguments, as far as the manifest knows them."""
    service, _, call = method.partition(".")
    described = manifest.get("services", {}).get(service, {}).get("calls", {}).get(call, {})
    return {a["name"]: a["type"] for a in described.get("args", [])}


def _value(kind: str, text: str) -> Any:
    """Text stays text where text is wanted; everything else is JSON where it can be."""
    if kind == "str":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


COMMAND = Command(
    name="call",
    summary="Call a service and print what it returns, as JSON",
    run=run,
    options=(
        Option("method", "SERVICE.CALL", positional=True, required=True, metavar="METHOD",
               complete="method"),
        Option("arguments", "name=value", positional=True, many=True, metavar="NAME=VALUE"),
        Option("timeout", "how long the service may take", type="duration", metavar="TIME"),
    ),
    examples=("llmos call models.ls", "llmos call models.show name=shakespeare"),
)  # fmt: skip
