"""Check the arguments of a call against what its service declares, before anybody is called.

Knows only data: the description in the manifest.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from llmos.kernel.errors import BadArgument, NoSuchThing

_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false",
          "list": "a list", "dict": "a map", "bytes": "bytes"}  # fmt: skip
_TYPES: dict[str, Any] = {"str": str, "int": int, "float": int | float, "bool": bool,
                          "list": list, "dict": dict, "bytes": bytes, "any": object}  # fmt: skip


def find_call(service: str, described: dict[str, Any], name: str) -> dict[str, Any]:
    """The description of a call. Raises NoSuchThing with the nearest name."""
    calls: dict[str, dict[str, Any]] = described.get("calls", {})
    if name not in calls:
        shown = f"no call {name!r}" if name else "to be called by SERVICE.CALL"
        raise NoSuchThing(f"service {service} has {shown}", near(name, calls, "it has"))
    return calls[name]


def check(method: str, described: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises BadArgument with the name of the first argument that is wrong."""
    arguments = {a["name"]: a for a in described["args"]}
    for name, value in given.items():
        if name not in arguments:
            raise BadArgument(f"{method} has no argument {name!r}", near(name, arguments, "it has"))
        _check_value(method, arguments[name], value)
    missing = [a["name"] for a in arguments.values() if a["required"] and a["name"] not in given]
    if missing:
        raise BadArgument(f"{method} needs {', '.join(missing)}", f"`llmos help {method}`")


def near(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint: the nearest of the names that are known, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"{otherwise} {', '.join(known) or 'none'}"


def _check_value(method: str, argument: dict[str, Any], value: Any) -> None:
    kind = argument["type"]
    if value is None and (kind.endswith("?") or kind == "any"):
        return
    kind, called = kind.removesuffix("?"), f"{method}: {argument['name']}"
    if not _fits(kind, value):
        raise BadArgument(f"{called} is {_WORDS[kind]}, not {value!r}"[:300])
    choices = argument.get("choices")
    if choices and value not in choices:
        shown = [str(c) for c in choices]
        close = difflib.get_close_matches(str(value), shown, 1)
        hint = f"did you mean {close[0]}?" if close else ""
        raise BadArgument(f"{called} is one of {', '.join(shown)}, not {value!r}"[:300], hint)
    items = str(argument.get("items") or "")
    for item in value if kind == "list" and items else ():
        if not _fits(items, item):
            raise BadArgument(f"{called}: each item is {_WORDS[items]}, not {item!r}"[:300])


def _fits(kind: str, value: Any) -> bool:
    if kind in ("int", "float") and isinstance(value, bool):
        return False
    return isinstance(value, _TYPES[kind])
