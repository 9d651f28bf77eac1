"""The books of device memory, in bytes: what was promised, what was measured, who holds it.

The kernel promises memory here before a worker touches the device, so two processes never
race for the last gigabyte. A promise stands until the measured peak plus a margin replaces
it. Shared segments (a mapped weight file) are counted once, whoever maps them.

    foreign + promised + free = capacity        for each device, always

`free` may be negative: then something outside llmos took what was promised inside. A process on
several devices has the same promise on each. Knows no driver and no clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmos.kernel.errors import NoMemory

# What a measured peak may be exceeded by before the next measurement.
MARGIN_SHARE = 0.10
MARGIN_BYTES = 64 * 1024 * 1024

SYSTEM_PID = 0  # the kernel, the zygotes and the services


@dataclass(slots=True)
class _Account:
    devices: tuple[str, ...]
    private: dict[str, int]  # promised bytes by kind, on each device
    shared: dict[str, tuple[str, int]]  # key -> (kind, bytes)
    measured: dict[str, int] = field(default_factory=dict)  # by device
    peak_bytes: int = 0  # the largest measured on any one device
    away: dict[str, int] = field(default_factory=dict)  # by kind: moved out, to the host or disk
    left_bytes: int = 0  # what stayed on the device when it was moved out last
    residency: str = "device"

    @property
    def private_bytes(self) -> int:
        return sum(self.private.values())

    @property
    def measured_bytes(self) -> int:
        return sum(self.measured.values())


@dataclass(slots=True)
class _Device:
    capacity_bytes: int
    kind: str
    foreign_bytes: int = 0
    available_bytes: int = 0
    shared: dict[str, tuple[str, int, set[int]]] = field(default_factory=dict)
    pids: set[int] = field(default_factory=set)
    private_bytes: int = 0  # promised, of all accounts: kept, so that a question costs O(1)
    shared_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.foreign_bytes - self.private_bytes - self.shared_bytes


class Ledger:
    def __init__(
        self, margin_share: float = MARGIN_SHARE, margin_bytes: int = MARGIN_BYTES
    ) -> None:
        self._margin_share, self._margin_bytes = margin_share, margin_bytes
        self._devices: dict[str, _Device] = {}
        self._accounts: dict[int, _Account] = {}
        self._by_free: list[tuple[int, str]] = []  # sorted, so that most free is found at once

    def with_margin(self, peak_bytes: int) -> int:
        """What a process with this measured peak is promised."""
        return int(peak_bytes * (1 + self._margin_share)) + self._margin_bytes

    def add_device(self, device: str, kind: str, capacity_bytes: int) -> None:
        self._devices[device] = _Device(capacity_bytes, kind, available_bytes=capacity_bytes)
        insort(self._by_free, (capacity_bytes, device))

    def capacity(self, device: str) -> int:
        return self._devices[device].capacity_bytes

    def system(self, device: str) -> int:
        """Bytes of a device that the kernel and its helpers have."""
        account = self._accounts.get(SYSTEM_PID)
        return account.private_bytes if account and device in account.devices else 0

    def kind(self, device: str) -> str:
        return self._devices[device].kind

    def promised(self, device: str) -> int:
        d = self._devices[device]
        return d.private_bytes + d.shared_bytes

    def free(self, device: str) -> int:
        return self._devices[device].free_bytes

    def most_free(self) -> list[str]:
        """All devices, the one with the most free memory first."""
        return [name for _, name in reversed(self._by_free)]

    def with_free(self, nbytes: int, count: int = 1) -> list[str]:
        """Up to `count` devices with at least so much free, the emptiest first."""
        at = max(bisect_left(self._by_free, (nbytes, "")), len(self._by_free) - count)
        return [name for _, name in reversed(self._by_free[at:])]

    def holds_shared(self, shared: Sequence[str]) -> list[str]:
        """Devices on which one of these shared segments lies already."""
        return [n for n, d in self._devices.items() if any(k in d.shared for k in shared)]

    def need(self, device: str, segments: list[dict[str, Any]]) -> int:
        """What these segments would add: shared ones that are already there cost nothing."""
        held = self._devices[device].shared
        return sum(s["bytes"] for s in segments if not s.get("shared") or s["shared"] not in held)

    def can_ever_reserve(self, device: str, segments: list[dict[str, Any]]) -> bool:
        """Would it fit if nothing but the system were there?"""
        need = sum(int(s["bytes"]) for s in segments)
        return need <= self.capacity(device) - self.system(device)

    def can_reserve(self, device: str, segments: list[dict[str, Any]]) -> bool:
        return self.need(device, segments) <= self.free(device)

    def reserve(self, devices: tuple[str, ...], pid: int, segments: list[dict[str, Any]]) -> None:
        """Promise memory to `pid` on each device. Raises NoMemory when it does not fit now."""
        for device in devices:
            if not self.can_reserve(device, segments):
                need, free = self.need(device, segments), self.free(device)
                raise NoMemory(f"{device}: wanted {need:,} bytes, {free:,} are free")
        self.adopt(devices, pid, segments)

    def adopt(self, devices: tuple[str, ...], pid: int, segments: list[dict[str, Any]]) -> None:
        """Enter memory that is taken already (a worker found at boot): always possible."""
        assert pid not in self._accounts, f"{pid} has an account"
        private: dict[str, int] = {}
        shared: dict[str, tuple[str, int]] = {}
        for s in segments:
            if s.get("shared"):
                shared[s["shared"]] = (s["kind"], s["bytes"])
            else:
                private[s["kind"]] = private.get(s["kind"], 0) + s["bytes"]
        account = _Account(devices, private, shared)
        self._accounts[pid] = account
        for device in devices:
            d = self._devices[device]
            d.pids.add(pid)
            added = account.private_bytes
            for key, (kind, nbytes) in shared.items():
                if key not in d.shared:
                    d.shared[key] = (kind, nbytes, set())
                    d.shared_bytes += nbytes
                    added += nbytes
                d.shared[key][2].add(pid)
            d.private_bytes += account.private_bytes
            self._moved(device, d.free_bytes + added)

    def release(self, pid: int) -> None:
        """The worker is gone and its memory with it. Twice is harmless."""
        account = self._accounts.pop(pid, None)
        if account is None:
            return
        for device in account.devices:
            d = self._devices[device]
            before = d.free_bytes
            d.pids.discard(pid)
            d.private_bytes -= account.private_bytes
            for key in account.shared:
                _, nbytes, holders = d.shared[key]
                holders.discard(pid)
                if not holders:
                    del d.shared[key]
                    d.shared_bytes -= nbytes
            self._moved(device, before)

    def promise(self, pid: int, private_bytes: int) -> None:
        """Change what is promised to `pid` on each of its devices; kinds are scaled alike.

        A measurement says how much, not what for.
        """
        account = self._accounts[pid]
        before = account.private_bytes
        if before:
            account.private = {k: v * private_bytes // before for k, v in account.private.items()}
        kind = max(account.private, key=lambda k: account.private[k], default="system")
        rest = private_bytes - account.private_bytes
        account.private[kind] = account.private.get(kind, 0) + rest
        for device in account.devices:
            d = self._devices[device]
            free = d.free_bytes
            d.private_bytes += private_bytes - before
            self._moved(device, free)

    def measure(self, pid: int, device: str, measured_bytes: int, settled: bool) -> int:
        """What a driver measured for `pid` on a device -> by how much its promise had to grow.

        Once `settled`, the peak and its margin replace the promise; before that they only raise it.
        """
        account = self._accounts.get(pid)
        if account is None:
            return 0
        account.measured[device] = measured_bytes
        account.peak_bytes = max(account.peak_bytes, measured_bytes)
        before = account.private_bytes
        target = self.with_margin(account.peak_bytes)
        if pid == SYSTEM_PID:
            target = measured_bytes  # it is not a guess: the system is what it is
        elif account.away or (not settled and target <= before):
            return 0
        if target != before:
            self.promise(pid, target)
        return max(0, target - before)

    def forget_peak(self, pid: int) -> None:
        """A process has become smaller (it shrank): what it had before says nothing any more."""
        account = self._accounts.get(pid)
        if account is not None:
            account.peak_bytes = 0

    def move_out(self, pid: int, left_bytes: int, residency: str) -> int:
        """Its memory lies elsewhere now; `left_bytes` stay (a context) -> what became free."""
        account = self._accounts[pid]
        before, kinds = account.private_bytes, dict(account.private)
        self.promise(pid, min(left_bytes, before))
        account.away, account.residency = kinds, residency
        account.left_bytes = account.private_bytes
        account.private = {"context": account.private_bytes}
        return before - account.private_bytes

    def left_bytes(self, pid: int) -> int:
        """What stayed on the device when `pid` was moved out last."""
        return self._accounts[pid].left_bytes

    def away_bytes(self, pid: int) -> int:
        """What would have to be promised again to bring it back."""
        account = self._accounts[pid]
        return sum(account.away.values()) - account.private_bytes

    def move_in(self, pid: int) -> None:
        """It comes back: the promise that it had stands again."""
        account = self._accounts[pid]
        kinds = account.away
        assert kinds, f"the memory of {pid} is not away"
        self.promise(pid, sum(kinds.values()))
        account.private, account.away, account.residency = kinds, {}, "device"

    def observe(self, device: str, available_bytes: int, foreign_bytes: int) -> None:
        """What the system says is available, and what others than llmos hold."""
        d = self._devices[device]
        before = d.free_bytes
        d.available_bytes, d.foreign_bytes = available_bytes, foreign_bytes
        self._moved(device, before)

    def memory_of(self, pid: int) -> tuple[int, int, int, dict[str, int]]:
        """promised, measured, peak, promised by kind; a shared segment counts for each holder."""
        account = self._accounts.get(pid)
        if account is None:
            return 0, 0, 0, {}
        n = len(account.devices)
        kinds = {kind: nbytes * n for kind, nbytes in account.private.items()}
        for kind, nbytes in account.shared.values():
            kinds[kind] = kinds.get(kind, 0) + nbytes * n
        return sum(kinds.values()), account.measured_bytes, account.peak_bytes, kinds

    def holders(self, device: str) -> list[tuple[int, int]]:
        """(pid, promised bytes) of who holds memory on a device, largest first."""
        found = [(pid, self.on_one_device(pid)) for pid in self._devices[device].pids]
        return sorted(found, key=lambda h: -h[1])

    def on_one_device(self, pid: int) -> int:
        """What is promised to `pid` on each of its devices, shared segments included."""
        account = self._accounts.get(pid)
        if account is None:
            return 0
        return account.private_bytes + sum(n for _, n in account.shared.values())

    def private(self, pid: int) -> int:
        """What is promised to `pid` alone on each of its devices."""
        account = self._accounts.get(pid)
        return 0 if account is None else account.private_bytes

    def would_free(self, pid: int, device: str) -> int:
        """What would be free again on a device if `pid` went: also what only it maps."""
        account = self._accounts.get(pid)
        if account is None:
            return 0
        shared = self._devices[device].shared
        alone = sum(n for key, (_, n) in account.shared.items() if shared[key][2] == {pid})
        return account.private_bytes + alone

    def peak(self, pid: int) -> int:
        """The most that was measured for `pid` on one device."""
        account = self._accounts.get(pid)
        return 0 if account is None else account.peak_bytes

    def books(self, device: str) -> dict[str, Any]:
        """What `mem --json` shows of one device."""
        d = self._devices[device]
        segments = [
            {
                "kind": kind,
                "bytes": nbytes,
                "pids": [pid],
                "residency": a.residency,
                "shared": False,
            }
            for pid in sorted(d.pids)
            for a in (self._accounts[pid],)
            for kind, nbytes in sorted(a.private.items())
        ]
        segments += [
            {"kind": kind, "bytes": n, "pids": sorted(who), "residency": "device", "shared": True}
            for kind, n, who in d.shared.values()
        ]
        return {
            "device": device,
            "kind": d.kind,
            "capacity_bytes": d.capacity_bytes,
            "foreign_bytes": d.foreign_bytes,
            "promised_bytes": self.promised(device),
            "measured_bytes": sum(self._accounts[p].measured.get(device, 0) for p in d.pids),
            "free_bytes": self.free(device),
            "available_bytes": d.available_bytes,
            "segments": segments,
        }

    def check(self) -> None:
        """The invariants, for tests: the kept sums equal what the accounts say."""
        for name, d in self._devices.items():
            private = sum(self._accounts[p].private_bytes for p in d.pids)
            assert private == d.private_bytes, f"{name}: {private} != {d.private_bytes}"
            assert sum(n for _, n, _ in d.shared.values()) == d.shared_bytes
            assert all(who for _, _, who in d.shared.values())
            assert all(name in self._accounts[p].devices for p in d.pids)
        assert self._by_free == sorted((d.free_bytes, n) for n, d in self._devices.items())

    def _moved(self, device: str, before: int) -> None:
        """Keep the order of devices by what is free."""
        now = self._devices[device].free_bytes
        if now != before:
            del self._by_free[bisect_left(self._by_free, (before, device))]
            insort(self._by_free, (now, device))
