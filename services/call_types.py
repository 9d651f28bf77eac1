"""The arguments of a service's calls as data, from their annotations.

    def forecast(self, city: Annotated[str, "a city"], days: int = 1,
                 unit: Literal["C", "F"] = "C") -> dict: ...

An argument is str, int, float, bool, bytes, list, list[X], dict, dict[str, X] or Any; a Literal of
texts or of whole numbers is one of these with choices; `| None` lets None in. `Annotated[X, "..."]`
gives it a line of help. Whoever calls is checked against this by the kernel.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_SIMPLE = {str: "str", int: "int", float: "float", bool: "bool", bytes: "bytes", Any: "any"}
_KNOWN = "str, int, float, bool, bytes, list, dict, Literal, or one of them | None"


def describe_arguments(fn: Callable[..., Any]) -> list[dict[str, Any]]:
    """The arguments of a method but `self`. Raises TypeError with the name of a wrong one."""
    hints = get_type_hints(fn, include_extras=True)
    parameters = list(inspect.signature(fn).parameters.values())[1:]
    return [_describe(fn.__name__, p, hints.get(p.name, Any)) for p in parameters]


def _describe(method: str, p: inspect.Parameter, hint: Any) -> dict[str, Any]:
    if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
        raise TypeError(f"{method}: {p} cannot be given by name")
    hint, text = _without_help(hint)
    try:
        kind, items, choices = _kind(hint)
        required = p.default is p.empty
        json.dumps(None if required else p.default)  # the manifest is JSON
    except TypeError as exc:
        raise TypeError(f"{method}: argument {p.name!r}: {exc}") from None
    return {
        "name": p.name,
        "type": kind,
        "items": items,
        "choices": choices,
        "required": required,
        "default": None if required else p.default,
        "help": text,
    }


def _without_help(hint: Any) -> tuple[Any, str]:
    if get_origin(hint) is not Annotated:
        return hint, ""
    inner, *notes = get_args(hint)
    return inner, next((n for n in notes if isinstance(n, str)), "")


def _kind(hint: Any) -> tuple[str, str, list[Any]]:
    """-> type (with a `?` where None is allowed), type of the items of a list, choices."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        if len(inner) == 1 and len(inner) < len(get_args(hint)):
            kind, items, choices = _kind(inner[0])
            return kind + "?", items, choices
    if hint in _SIMPLE:
        return _SIMPLE[hint], "", []
    if origin is Literal:
        return _literal(list(get_args(hint)))
    if hint is list or origin is list:
        of = get_args(hint)
        return "list", _items(of[0]) if of else "any", []
    if hint is dict or (origin is dict and get_args(hint)[0] is str):
        return "dict", "", []
    raise TypeError(f"{hint} cannot be sent; a call takes {_KNOWN}")


def _items(hint: Any) -> str:
    """Lists of simple values are checked item by item, others are lists."""
    return _SIMPLE.get(hint, "any")


def _literal(choices: list[Any]) -> tuple[str, str, list[Any]]:
    for kind, name in ((str, "str"), (int, "int")):
        if all(type(c) is kind for c in choices):
            return name, "", choices
    raise TypeError("a Literal is of texts or of whole numbers")
