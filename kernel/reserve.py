"""The share that batch keeps against interactive work that never ends.

An average over a minute: credit grows by `share` of each second in which batch wants the device
and interactive work has it, and is paid with what batch gets anyway, in the gaps between requests.
Only when that was not enough does interactive work give way, for one long turn: of a stream's
token gaps at most one in a hundred is touched.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos.kernel.process import Class

WINDOW_S = 60.0
TOUCHED = 0.01  # of a stream's gaps


@dataclass(slots=True)
class Reserve:
    share: float  # of the device, 0: none
    slice_s: float
    gap_s: float = 0.0  # between two tokens of the stream that has the device
    credit_s: float = 0.0
    pending: bool = False  # a turn of it comes next
    _turn_s: float = 0.0

    def account(self, cls: Class, seconds: float, wanted: bool) -> None:
        """The device worked `seconds` for `cls`; `wanted`: batch wanted it too."""
        if not self.share:
            return
        if wanted:
            self.credit_s += self.share * seconds
        if cls is Class.BATCH:
            self.credit_s -= seconds
        floor = -self.share * WINDOW_S
        self.credit_s = max(floor, min(self.credit_s, max(-floor, self.turn_s())))

    def turn_s(self) -> float:
        """One turn of the share: a slice, or so long that the next is far enough away.

        One gap a turn is touched; turns of T seconds at a share s come every T / s seconds, in
        which the stream has (T / s - T) / gap others.
        """
        if not self.share or self.share >= 1:
            return self.slice_s
        return max(self.slice_s, self.share / (1 - self.share) * self.gap_s / TOUCHED)

    def due(self) -> bool:
        return self.share > 0 and not self.pending and self.credit_s >= self.turn_s() - 1e-9

    def due_in_s(self) -> float | None:
        """Seconds of interactive work until a turn is due; None: never."""
        if not self.share or self.pending:
            return None
        return max(0.0, self.turn_s() - self.credit_s) / self.share

    def begin(self) -> float:
        """Batch gets the device -> for how long nobody may preempt it."""
        if not self.pending:
            return 0.0
        self.pending = False
        return self.turn_s()
