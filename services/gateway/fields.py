"""The fields of a request: taken one by one, by name and type; what nobody took is refused.

A field that is null counts as one that is not there, as at OpenAI.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from llmos.services.gateway.errors import ApiError, bad

# What MessagePack, and a file offset, can hold.
_WIDE = 1 << 63


class Fields:
    """`at` is where the object stands in the request, for messages: "messages[0].", or nothing."""

    def __init__(self, body: Any, at: str = "") -> None:
        if not isinstance(body, dict):
            raise bad(
                at.rstrip(".") or None, f"{at.rstrip('.') or 'the request'} must be an object"
            )
        self._left = {str(key): value for key, value in body.items() if value is not None}
        self._at = at
        self._taken: set[str] = set()

    # ---- by type ----

    def any(self, name: str, default: Any = None) -> Any:
        self._taken.add(name)
        return self._left.pop(name, default)

    def required(self, name: str) -> Any:
        if name not in self._left:
            raise bad(
                self._at + name,
                f"Missing required parameter: '{self._at}{name}'.",
                "missing_required_parameter",
            )
        return self.any(name)

    def text(self, name: str, default: str = "", *, required: bool = False) -> str:
        value = self.required(name) if required else self.any(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def integer(
        self, name: str, default: int | None = None, low: int | None = None, high: int | None = None
    ) -> int | None:
        value = self.any(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not -_WIDE <= value < _WIDE:
            raise self.wrong(name, "an integer", value)
        self._check(name, value, low, high)
        return value

    def count(self, name: str, default: int, low: int = 0, high: int | None = None) -> int:
        value = self.integer(name, default, low, high)
        assert value is not None
        return value

    def number(
        self, name: str, default: float, low: float | None = None, high: float | None = None
    ) -> float:
        value = self.any(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not _finite(value):
            raise self.wrong(name, "a number", value)
        self._check(name, value, low, high)
        return float(value)

    def choice(self, name: str, choices: Iterable[str], default: str) -> str:
        value = self.any(name, default)
        if value not in choices:
            raise self.wrong(name, f"one of {', '.join(map(repr, choices))}", value)
        return str(value)

    def texts(self, name: str, most: int) -> list[str]:
        """A string, or a list of some."""
        value = self.any(name, [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
            raise self.wrong(name, "a string or a list of strings", value)
        if len(found) > most:
            raise bad(
                self._at + name,
                f"'{self._at}{name}' has {len(found)} entries; at most {most} are taken.",
                "array_above_max_length",
            )
        return list(found)

    def items(self, name: str) -> list[Any]:
        value = self.any(name, [])
        if not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

    def map(self, name: str) -> dict[str, Any]:
        value = self.any(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return value

    # ---- what is not served ----

    def ignore(self, *names: str) -> None:
        """They change nothing here, and nothing that the caller could rely on."""
        for name in names:
            self.any(name)

    def only(self, name: str, *values: Any) -> None:
        """A field that is taken as long as it asks for what is done anyway."""
        value = self.any(name)
        if value is not None and value not in values:
            shown = " or ".join(repr(v) for v in values)
            raise bad(
                self._at + name,
                f"'{self._at}{name}' is not supported here"
                + (f", but for {shown}." if values else "."),
                "unsupported_parameter",
            )

    def refuse(self, name: str, why: str) -> None:
        if self.any(name) is not None:
            raise bad(
                self._at + name,
                f"'{self._at}{name}' is not supported here: {why}.",
                "unsupported_parameter",
            )

    def rest(self) -> dict[str, Any]:
        """Everything that nobody has taken yet: for whoever reads on."""
        left, self._left = self._left, {}
        return left

    def done(self) -> None:
        """Raise for the first field that nobody has taken."""
        for name in self._left:
            longer = sorted(n for n in self._taken if n.startswith(name))
            near = longer or difflib.get_close_matches(name, self._taken, 1, 0.75)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise bad(
                self._at + name,
                f"Unrecognized request argument supplied: {self._at}{name}.{hint}",
                "unknown_parameter",
            )

    # ---- errors ----

    def wrong(self, name: str, wanted: str, value: Any) -> ApiError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return bad(
            self._at + name,
            f"Invalid value for '{self._at}{name}': expected {wanted}, got {shown}.",
            "invalid_value",
        )

    def _check(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if low is not None and value < low:
            raise bad(
                self._at + name,
                f"Invalid value for '{self._at}{name}': {value} is less than the minimum of {low}.",
                "below_min_value",
            )
        if high is not None and value > high:
            raise bad(
                self._at + name,
                f"Invalid value for '{self._at}{name}': {value} is above the maximum of {high}.",
                "above_max_value",
            )


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
