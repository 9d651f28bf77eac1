"""What a worker says of an error that ends its process: one line, and what a caller can use."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from llmos.drivers.worker import memory
from llmos.kernel.errors import LlmosError


@dataclass(frozen=True, slots=True)
class Where:
    """In what an error was raised; `promised_bytes` is 0 when the kernel has said nothing."""

    program: str
    device: str
    promised_bytes: int = 0


def last_words(exc: Exception, where: Where) -> tuple[str, dict[str, Any], bool]:
    """(reason, result, whether that is surely the cause). A traceback goes to the log.

    What is not sure may be the echo of another rank's death.
    """
    short = memory.shortage(exc)
    if short is not None:
        memory.take_reserve()  # else the last words would meet the same wall
        traceback.print_exception(exc)
        result = memory.account(short, where.program, where.device, where.promised_bytes)
        return line_of(result["error"]), result, True
    if isinstance(exc, LlmosError):
        return line_of(exc.to_wire()), {"error": exc.to_wire()}, True
    traceback.print_exception(exc)
    text = str(exc).splitlines()[0] if str(exc) else ""
    return f"{type(exc).__name__}: {text}", {"traceback": "in its log"}, False


def line_of(error: dict[str, Any]) -> str:
    """An error as LlmosError.to_wire has it, in one line."""
    return f"{error['message']} ({error['hint']})" if error["hint"] else str(error["message"])
