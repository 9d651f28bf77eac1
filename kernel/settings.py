"""What a configuration may set of the core's behaviour: plain numbers, with reasons.

`kernel/config.py` makes one from `config.toml` and the flags of `boot`; tests and the simulation
make their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmos.kernel.ledger import MARGIN_BYTES, MARGIN_SHARE
from llmos.kernel.process import Class
from llmos.kernel.sched import SLICE_S


@dataclass(frozen=True, slots=True)
class Settings:
    # The average over a minute that batch keeps of a device against interactive work.
    batch_share: float = 0.05
    slices: Mapping[Class, float] = field(default_factory=lambda: SLICE_S)
    margin_share: float = MARGIN_SHARE
    margin_bytes: int = MARGIN_BYTES
    # Nobody is moved out before it was there so long, nor before ten times what moving it costs:
    # then moving loses a tenth of the time at most.
    min_residency_s: float = 30.0
    residency_moves: float = 10.0
    # How long smaller ones of its class may pass a process that does not fit. On the Philly traces
    # a minute costs 7 % of the mean completion time against never, ten minutes 3 %.
    passing_s: float = 600.0
    # After so long in the line for memory a process goes before all others of its class, whatever
    # the policy says. On clusters where jobs wait for days, a day makes the order that of arrival.
    aging_s: float = 7 * 86_400.0

    # Who has a device and gives no sign of life for so long hangs; 0: nobody is watched.
    hang_s: float = 0.0
    # What one user may have: a part of the memory of each device, and device-seconds in a window
    # (0: as many as there are). On a machine of one user there is nobody to keep anything for.
    user_memory: float = 1.0
    user_device_s: float = 0.0
    user_window_s: float = 86_400.0

    def slice_of(self, cls: Class) -> float:
        return self.slices[cls]
