"""Check a program's arguments against its schema in the manifest, and fill in the defaults.

Knows only data: names, types, limits. What is in the files is for the program's plan to say.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from llmos.kernel.errors import BadArgument
from llmos.kernel.units import Interval, parse_duration, parse_interval

_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false",
          "list": "a list of texts"}  # fmt: skip


def check(
    schema: dict[str, Any],
    given: dict[str, Any],
    cwd: str,
    resolve_model: Callable[[str], str],
    defaults: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    planning: bool = False,
) -> dict[str, Any]:
    """-> all arguments of the program. Raises BadArgument with the flag's name.

    `defaults` are the configuration's own, by name; they win over those of the schema. `env` is
    the client's environment, for arguments that are read from it. With `planning` an argument
    that a plan can be made without may be missing; it is "" then.
    """
    fields = {f["name"]: f for f in schema["args"]}
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {flag(near[0])}?" if near else f"`llmos {schema['name']} --help`"
            raise BadArgument(f"{schema['name']} has no argument {flag(name)}", hint)
    checked = {}
    for name, f in fields.items():
        if name not in given:
            left_out = planning and f.get("plan_without")
            if f["required"] and not left_out:
                raise BadArgument(f"{schema['name']} needs {_called(f)}: {f['help']}")
            empty = left_out and f["required"]
            checked[name] = "" if empty else _default(f, defaults or {}, env or {})
        else:
            checked[name] = _value(f, given[name])
        value = checked[name]
        if isinstance(value, str) and value:
            if f.get("model"):
                checked[name] = resolve_model(value)
            elif f.get("path"):
                checked[name] = os.path.normpath(os.path.join(cwd or "/", value))
    return checked


def _default(f: dict[str, Any], defaults: Mapping[str, Any], env: Mapping[str, str]) -> Any:
    """What an argument is that was not given: the client's variable, the configuration's value,
    the schema's."""
    if f.get("env") and f["env"] in env:
        return env[f["env"]]
    return defaults.get(f["name"], f["default"])


def flag(name: str, f: Mapping[str, Any] | None = None) -> str:
    if f and f.get("duration"):
        name = name.removesuffix("_s")  # its unit is part of what is written
    return "--" + name.replace("_", "-")


def _interval(f: dict[str, Any], value: Any) -> str:
    """It stays a text: plain steps may be given as a number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadArgument(f"{_called(f)} is an interval, not {value!r}"[:300])
    try:
        every = parse_interval(value)
    except BadArgument as exc:
        raise BadArgument(f"{_called(f)}: {exc.message}", exc.hint) from None
    if every == Interval():
        raise BadArgument(
            f"{_called(f)} {value}: an interval is at least one step",
            "write it in steps or in time: 500, 90s, 10min; a very long one (365d) is nearly never",
        )
    return str(value)


def _called(f: dict[str, Any]) -> str:
    return f["name"].upper() if f.get("positional") else flag(f["name"], f)


def _duration(f: dict[str, Any], value: str) -> float:
    try:
        return parse_duration(value)
    except BadArgument as exc:
        raise BadArgument(f"{_called(f)} is a time: {exc.message}", exc.hint) from None


def _value(f: dict[str, Any], value: Any) -> Any:
    kind = f["type"].rstrip("?")
    if f.get("interval"):
        return _interval(f, value)
    if (value is None and f["type"].endswith("?")) or kind == "any":
        return value
    if f.get("duration") and isinstance(value, str):
        value = _duration(f, value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    expected = {"str": str, "int": int, "float": float, "bool": bool, "list": list}[kind]
    fits = isinstance(value, expected) and not (kind == "int" and isinstance(value, bool))
    if kind == "list" and fits:
        fits = all(isinstance(item, str) for item in value)
    if kind == "float" and fits:
        fits = math.isfinite(value)
    if not fits:
        raise BadArgument(f"{_called(f)} is {_WORDS[kind]}, not {value!r}"[:300])
    if kind == "str" and "\0" in value:
        raise BadArgument(f"{_called(f)} has a zero byte in it")
    choices = f.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise BadArgument(f"{_called(f)} is one of {', '.join(choices)}, not {value!r}", hint)
    low, high = f.get("minimum"), f.get("maximum")
    if low is not None and value < low:
        raise BadArgument(f"{_called(f)} is at least {low:g}, not {value:g}")
    if high is not None and value > high:
        raise BadArgument(f"{_called(f)} is at most {high:g}, not {value:g}")
    return value
