"""The functions of `weights.cpp`: products of a decoder with weights that lie in panels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmos.services.engine.native.build import Unavailable, built

SOURCE = Path(__file__).with_name("weights.cpp")

# Outputs in a panel, bytes in a line of it, and bits of neighbouring inputs of one output.
PANEL, LINE_BYTES, GROUP_BITS = 32, 128, 32

# The numbers of `Kind` in weights.cpp.
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double


class Matrix(ctypes.Structure):
    """As in weights.cpp."""

    _fields_ = (
        ("data", _P), ("scales", _P), ("sums", _P), ("bias", _P),
        ("n", _L), ("k", _L), ("kind", _L),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """As in weights.cpp."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _P) for name in ("norm", "post_norm", "q_norm", "k_norm")),
        ("dim", _L),
        ("epsilon", _D),
    )


class Stack(ctypes.Structure):
    """As in lora.h."""

    _fields_ = (("a", _P), ("b", _P), ("rank", _L), ("k", _L), ("n", _L))


class Stacks(ctypes.Structure):
    """As in lora.h."""

    _fields_ = tuple((name, Stack) for name in ("q", "k", "v", "o", "gate", "up", "down"))


class Adapted(ctypes.Structure):
    """As in lora.h."""

    _fields_ = (("stacks", _P), ("slots", _P), ("next", _P))


# A higher one does not fit the kernels' room.
MOST_RANK = 512


class Kernels:
    """What each takes is written in weights.cpp."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        loaded.llmos_layer_bytes.restype = loaded.llmos_kinds.restype = _L
        if loaded.llmos_layer_bytes() != ctypes.sizeof(Layer):
            raise Unavailable("the compiler lays a structure out in another way than ctypes")
        loaded.llmos_stacks_bytes.restype = _L
        if loaded.llmos_stacks_bytes() != ctypes.sizeof(Stacks):
            raise Unavailable("the compiler lays a structure out in another way than ctypes")
        bits = loaded.llmos_kinds()
        self.kinds = frozenset(name for name, number in KINDS.items() if bits >> number & 1)
        self.use_unit = _typed(loaded.llmos_matrix_unit, [_I])
        self.use_unit.restype = _L
        self.has_unit = bool(self.use_unit(1))  # for bfloat16, beside AVX-512
        self.linear = _typed(loaded.llmos_linear, [_P, _P, _P, _L, _I, _I, _I])
        self.before = _typed(loaded.llmos_before, [*[_P] * 8, _L, _I, _I])
        self.after = _typed(loaded.llmos_after, [*[_P] * 5, _L, _I, _I])
        self.adapt = _typed(loaded.llmos_adapt, [_P, _P, _P, _L, _P, _L, _L, _I, _I])
        self.norm = _typed(loaded.llmos_norm, [_P, _P, _D, _P, _L, _L, _I])
        self.rows = _typed(loaded.llmos_rows, [_P, _P, _P, _L, _I])
        self.rows.restype = _L


_state: dict[str, Kernels | str] = {}


def kernels() -> Kernels | None:
    """The functions, compiled at the first call; None where they cannot be had (see `why_not`)."""
    if "found" not in _state:
        try:
            _state["found"] = Kernels(built(SOURCE))
        except (Unavailable, OSError, AttributeError) as exc:
            _state["found"] = str(exc) or type(exc).__name__
    found = _state["found"]
    return found if isinstance(found, Kernels) else None


@contextmanager
def alone() -> Iterator[None]:
    """Inside, no product depends on how many tokens there are, whatever kernels are in use."""
    found = _state.get("found")
    if not isinstance(found, Kernels):
        yield
        return
    found.use_unit(0)
    try:
        yield
    finally:
        found.use_unit(1)


def why_not() -> str:
    """Why there are no such functions; empty when there are."""
    kernels()
    found = _state["found"]
    return found if isinstance(found, str) else ""


def _typed(function: Any, arguments: list[type]) -> Any:
    function.argtypes, function.restype = arguments, None
    return function
