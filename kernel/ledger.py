"""The books of device memory, in bytes: what was promised, what was measured, who holds it.

The kernel promises memory here before a worker touches the device, so two processes never
race for the last gigabyte. A promise stands until the measured peak plus a margin replaces
it. Shared segments (a mapped weight file) are counted once, whoever maps them.

    foreign + promised + free = capacity        for each device, always

`free` may be negative: then something outside llmos took what was promised inside.
Knows no driver and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmos.kernel.errors import NoMemory

# What a measured peak may be exceeded by before the next measurement.
MARGIN_SHARE = 0.10
MARGIN_BYTES = 64 * 1024 * 1024

SYSTEM_PID = 0  # the kernel, the zygotes and the services


def with_margin(peak_bytes: int) -> int:
    return int(peak_bytes * (1 + MARGIN_SHARE)) + MARGIN_BYTES


@dataclass(slots=True)
class _Account:
    device: str
    private: dict[str, int]  # promised bytes by kind
    shared: dict[str, tuple[str, int]]  # key -> (kind, bytes)
    measured_bytes: int = 0
    peak_bytes: int = 0
    residency: str = "device"

    @property
    def private_bytes(self) -> int:
        return sum(self.private.values())


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


class Ledger:
    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        self._accounts: dict[int, _Account] = {}

    def add_device(self, device: str, kind: str, capacity_bytes: int) -> None:
        self._devices[device] = _Device(capacity_bytes, kind, available_bytes=capacity_bytes)

    def capacity(self, device: str) -> int:
        return self._devices[device].capacity_bytes

    def promised(self, device: str) -> int:
        d = self._devices[device]
        return d.private_bytes + d.shared_bytes

    def free(self, device: str) -> int:
        d = self._devices[device]
        return d.capacity_bytes - d.foreign_bytes - self.promised(device)

    def need(self, device: str, segments: list[dict[str, Any]]) -> int:
        """What these segments would add: shared ones that are already there cost nothing."""
        held = self._devices[device].shared
        return sum(s["bytes"] for s in segments if not s.get("shared") or s["shared"] not in held)

    def can_ever_reserve(self, device: str, segments: list[dict[str, Any]]) -> bool:
        """Would it fit if nothing but the system were there?"""
        system = 0
        if SYSTEM_PID in self._accounts and self._accounts[SYSTEM_PID].device == device:
            system = self._accounts[SYSTEM_PID].private_bytes
        need = sum(int(s["bytes"]) for s in segments)
        return need <= self.capacity(device) - system

    def can_reserve(self, device: str, segments: list[dict[str, Any]]) -> bool:
        return self.need(device, segments) <= self.free(device)

    def reserve(self, device: str, pid: int, segments: list[dict[str, Any]]) -> None:
        """Promise memory to `pid`. Raises NoMemory when it does not fit now."""
        if not self.can_reserve(device, segments):
            need, free = self.need(device, segments), self.free(device)
            raise NoMemory(f"{device}: wanted {need:,} bytes, {free:,} are free")
        self.adopt(device, pid, segments)

    def adopt(self, device: str, pid: int, segments: list[dict[str, Any]]) -> None:
        """Enter memory that is taken already (a worker found at boot): always possible."""
        assert pid not in self._accounts, f"{pid} has an account"
        private: dict[str, int] = {}
        shared: dict[str, tuple[str, int]] = {}
        for s in segments:
            if s.get("shared"):
                shared[s["shared"]] = (s["kind"], s["bytes"])
            else:
                private[s["kind"]] = private.get(s["kind"], 0) + s["bytes"]
        account = _Account(device, private, shared)
        self._accounts[pid] = account
        d = self._devices[device]
        d.pids.add(pid)
        d.private_bytes += account.private_bytes
        for key, (kind, nbytes) in shared.items():
            if key not in d.shared:
                d.shared[key] = (kind, nbytes, set())
                d.shared_bytes += nbytes
            d.shared[key][2].add(pid)

    def release(self, pid: int) -> None:
        """The worker is gone and its memory with it. Twice is harmless."""
        account = self._accounts.pop(pid, None)
        if account is None:
            return
        d = self._devices[account.device]
        d.pids.discard(pid)
        d.private_bytes -= account.private_bytes
        for key in account.shared:
            _, nbytes, holders = d.shared[key]
            holders.discard(pid)
            if not holders:
                del d.shared[key]
                d.shared_bytes -= nbytes

    def measure(self, pid: int, measured_bytes: int, settled: bool) -> None:
        """What a driver measured for `pid`. Once `settled`, the peak replaces the promise.

        The kinds are scaled alike: a measurement says how much, not what for.
        """
        account = self._accounts.get(pid)
        if account is None:
            return
        account.measured_bytes = measured_bytes
        account.peak_bytes = max(account.peak_bytes, measured_bytes)
        target = with_margin(account.peak_bytes)
        if pid == SYSTEM_PID:
            target = measured_bytes  # it is not a guess: the system is what it is
        elif not settled and target <= account.private_bytes:
            return
        before = account.private_bytes
        if before:
            account.private = {k: v * target // before for k, v in account.private.items()}
        kind = max(account.private, key=lambda k: account.private[k], default="system")
        account.private[kind] = account.private.get(kind, 0) + target - account.private_bytes
        self._devices[account.device].private_bytes += account.private_bytes - before

    def observe(self, device: str, available_bytes: int, foreign_bytes: int) -> None:
        """What the system says is available, and what others than llmos hold."""
        d = self._devices[device]
        d.available_bytes, d.foreign_bytes = available_bytes, foreign_bytes

    def memory_of(self, pid: int) -> tuple[int, int, int, dict[str, int]]:
        """promised, measured, peak, promised by kind; a shared segment counts for each holder."""
        account = self._accounts.get(pid)
        if account is None:
            return 0, 0, 0, {}
        kinds = dict(account.private)
        for kind, nbytes in account.shared.values():
            kinds[kind] = kinds.get(kind, 0) + nbytes
        return sum(kinds.values()), account.measured_bytes, account.peak_bytes, kinds

    def holders(self, device: str) -> list[tuple[int, int]]:
        """(pid, promised bytes) of who holds memory on a device, largest first."""
        found = [(pid, self.memory_of(pid)[0]) for pid in self._devices[device].pids]
        return sorted(found, key=lambda h: -h[1])

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
            "measured_bytes": sum(self._accounts[p].measured_bytes for p in d.pids),
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
            assert all(self._accounts[p].device == name for p in d.pids)
