# ruff: noqa: TID253  (imported lazily, by workers only)
"""What the bits of a run depend on beside its arguments, kept in its checkpoints.

Kernels are chosen by the processor's instruction set, sums are split among threads, and builds of
torch round differently: a run that goes on under other conditions ends in other bits, and says so.
"""

from __future__ import annotations

import platform
from typing import Any

import torch


def now(device: torch.device, dtype: str) -> dict[str, Any]:
    """The conditions of this worker; `dtype` is that of the products, as the program names it."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "compiled": False,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": _kind(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def differences(saved: dict[str, Any], here: dict[str, Any]) -> str:
    """One line about what is not as it was; "" where nothing is. A checkpoint of an earlier version
    does not know all conditions: what it does not know is not compared."""
    other = [
        f"{key} {_shown(here[key])}, saved with {_shown(saved[key])}"
        for key in here
        if key in saved and saved[key] != here[key]
    ]
    if not other:
        return ""
    return f"restored with {'; '.join(other)}: the results may differ in the last bits"


def _kind(device: torch.device) -> str:
    """The kind of device: GPUs of another model have other kernels."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_name(device)}"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
