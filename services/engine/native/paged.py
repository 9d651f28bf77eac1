"""Attention in C++, for which torch has no fast operator, built where a compiler is.

Where there is none, or what it made does not compute what it should, attention runs in torch alone;
`why_not` then says so in one line.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from llmos.services.engine.native.build import FLAGS, Unavailable, built

SOURCE = Path(__file__).with_name("paged.cpp")

_FLAGS = (*FLAGS, "-fassociative-math", "-freciprocal-math", "-fno-signed-zeros")

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class Library:
    """The functions of `paged.cpp`; what they take is written there."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self.store = loaded.llmos_store
        self.store.argtypes = [_P, _P, _P, _I, _I, _I, _I, _L, _L, _L, _I]
        self.store.restype = None
        self.decode = loaded.llmos_decode
        self.decode.argtypes = [
            _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _L, _L, _L, _L, _F, _F, _I, _I, _I,
        ]  # fmt: skip
        self.decode.restype = None


_state: dict[str, Library | str] = {}


def library() -> Library | None:
    """The library, built at the first call; None where it cannot be (see `why_not`)."""
    if "found" not in _state:
        try:
            _state["found"] = Library(built(SOURCE, _FLAGS))
        except (Unavailable, OSError, AttributeError) as exc:
            _state["found"] = str(exc) or type(exc).__name__
    found = _state["found"]
    return found if isinstance(found, Library) else None


def why_not() -> str:
    """Why there is no library; empty when there is one."""
    library()
    found = _state["found"]
    return found if isinstance(found, str) else ""
