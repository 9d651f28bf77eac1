"""fsck: random damage to a home, and what is there after a repair."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos.drivers.worker import checkpoint
from llmos.drivers.worker.stream import Stream, whole_records
from llmos.kernel import protocol as p
from llmos.kernel.errors import Busy, HomeUnusable
from llmos.kernel.fsck import work
from llmos.kernel.fsck.main import check
from llmos.kernel.fsck.report import CLEAN, LEFT, REPAIRED, Report
from llmos.kernel.home import Home
from llmos.kernel.journal import LOST_AND_FOUND, Journal
from llmos.kernel.process import Process, Role, State
from llmos.kernel.rows import SIGNATURE
from support.live import Live, short_home

PIDS = range(1, 31)


def make_home(path: Path) -> Home:
    """As kernels and workers leave one: 30 processes, every third with a folder."""
    home = Home(path)
    home.prepare()

    held = home.journal.with_suffix(".held")

    async def fill() -> None:
        journal = Journal(home.journal)
        journal.open()
        for pid in PIDS:
            journal.save(process(home, pid), {})
            if pid % 7 == 0:
                await journal.flushed()
        await journal.flushed()
        # As after a kill: what was written lies in the log.
        for end in ("", "-wal"):
            shutil.copyfile(f"{home.journal}{end}", f"{held}{end}")
        journal.close()

    asyncio.run(fill())
    for pid in PIDS[::3]:
        make_work(home.work(pid))
    for end in ("", "-wal"):
        Path(f"{held}{end}").rename(f"{home.journal}{end}")
    home.manifest.write_text("{}")
    home.profiles.write_text("{}")
    (home.models / "m").mkdir()
    return home


def process(home: Home, pid: int) -> Process:
    ended = pid % 2 == 0
    story = [(float(n), "told", "x" * 40) for n in range(3 * pid)]  # the last rows are long
    made = Process(pid, "spin", {"steps": pid}, "u", os.getuid(), 1.0, story=story)
    made.role, made.started_at = Role.PROCESS, 2.0 if pid % 3 == 1 else None
    if ended:
        made.state, made.exit_status, made.ended_at = State.EXITED, 0, 1e9
    else:
        made.state = State.WAITING
    if pid % 3 == 1:
        folder = home.work(pid) / "checkpoints" / "step-000000009"
        made.checkpoint = {"folder": str(folder), "step": 9, "at": 1.0}
    return made


def make_work(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    stream = Stream(folder / "stream")
    for step in range(10):
        stream.append("progress", {"step": step})
    stream.close()
    for step in (5, 9):

        def fill(to: Path, step: int = step) -> None:
            (to / "state.json").write_text(json.dumps({"step": step}))

        checkpoint.write(folder / "checkpoints", step, fill)


def rows(home: Home) -> dict[int, Process]:
    """As a boot has them."""

    async def go() -> dict[int, Process]:
        journal = Journal(home.journal)
        found = journal.open()
        journal.close()
        assert journal.aside == {}
        return {proc.pid: proc for proc, _ in found}

    return asyncio.run(go())


@pytest.fixture(scope="module")
def pattern() -> Iterator[Home]:
    path = short_home()
    yield make_home(path)
    shutil.rmtree(path)


def copied(pattern: Home, to: str) -> Home:
    path = Path(to, "h")
    shutil.copytree(pattern.path, path)
    path.chmod(0o700)
    home = Home(path)
    return home


@pytest.fixture
def home(pattern: Home, tmp_path: Path) -> Home:
    return copied(pattern, str(tmp_path))


def repaired(home: Home) -> Report:
    """Repair; then nothing may be left to find."""
    report = check(home, repair=True)
    again = check(home, repair=True)
    assert [p.what for p in again.problems] == []
    return report


def test_a_home_without_damage_is_clean_and_not_changed(home: Home) -> None:
    point_inside(home)
    before = {p: p.read_bytes() for p in home.path.rglob("*") if p.is_file()}
    report = check(home, repair=False)
    assert (report.status, report.problems) == (CLEAN, [])
    after = {p: p.read_bytes() for p in home.path.rglob("*") if p.is_file() and p != home.lock}
    before.pop(home.lock, None)
    assert after == before
    assert sorted(rows(home)) == list(PIDS)


def point_inside(home: Home) -> None:
    """The rows of a copied home name folders of the first one: a copy is repaired, too."""
    check(home, repair=True)
    shutil.rmtree(home.path / LOST_AND_FOUND, ignore_errors=True)


def test_a_copied_home_names_its_own_checkpoints_after_a_repair(home: Home) -> None:
    shutil.rmtree(home.work(1) / "checkpoints" / "step-000000009")
    repaired(home)
    made = rows(home)[1].checkpoint
    assert made is not None
    assert (made["folder"], made["step"]) == (str(home.work(1) / "checkpoints/step-000000005"), 5)


@dataclass(frozen=True)
class Damage:
    kind: str
    file: float  # which of the files, and where in it: a part of one
    at: float
    byte: int

    def do(self, home: Home) -> None:
        files = sorted(p for p in home.path.rglob("*") if p.is_file() and p != home.lock)
        path = files[int(self.file * len(files))]
        data = bytearray(path.read_bytes())
        at = int(self.at * len(data))
        if self.kind == "delete":
            path.unlink()
        elif self.kind == "cut":
            path.write_bytes(data[:at])
        elif self.kind == "zero":
            data[at : at + 5000] = bytes(len(data[at : at + 5000]))
            path.write_bytes(data)
        elif self.kind == "add":
            path.write_bytes(data + os.urandom(100))
        elif data:
            data[at] ^= self.byte
            path.write_bytes(data)


parts = st.floats(0, 1, exclude_max=True)
damages = st.builds(
    Damage, st.sampled_from(["flip", "flip", "flip", "delete", "cut", "zero", "add"]), parts, parts,
    st.integers(1, 255),
)  # fmt: skip


def whole(home: Home) -> set[int]:
    """Whose rows are untouched in the files, found without any of the code under test."""
    data = b"".join(Path(f"{home.journal}{e}").read_bytes() for e in ("", "-wal")
                    if Path(f"{home.journal}{e}").exists())  # fmt: skip
    return {pid for pid, row in PACKED.items() if row in data}


PACKED: dict[int, bytes] = {}


def remember(home: Home) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for end in ("", "-wal"):
            shutil.copyfile(f"{home.journal}{end}", f"{folder}/j{end}")
        db = sqlite3.connect(f"{folder}/j")
        PACKED.update(dict(db.execute("SELECT pid, row FROM process")))
        db.close()
    assert all(row.startswith(SIGNATURE) for row in PACKED.values())


def hurts(max_examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        many = st.lists(damages, min_size=1, max_size=4)
        return settings(
            max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck)
        )(given(hurt=many)(test))

    return decorate


@hurts(15)
def test_after_random_damage_whoever_was_whole_is_there(pattern: Home, hurt: list[Damage]) -> None:
    check_damaged(pattern, hurt)


@pytest.mark.long
@hurts(400)
def test_after_much_random_damage_too(pattern: Home, hurt: list[Damage]) -> None:
    check_damaged(pattern, hurt)


def check_damaged(pattern: Home, hurt: list[Damage]) -> None:
    if not PACKED:
        remember(pattern)
    with tempfile.TemporaryDirectory(prefix="f") as folder:
        home = copied(pattern, folder)
        for damage in hurt:
            damage.do(home)
        intact = whole(home)
        assert check(home, repair=False).status in (CLEAN, LEFT)
        repaired(home)
        found = rows(home)
        assert intact <= set(found)
        for pid, proc in found.items():
            assert (proc.pid, proc.args) == (pid, {"steps": pid})
            if proc.live and proc.checkpoint:
                assert checkpoint.damage(Path(proc.checkpoint["folder"])) is None
        for pid in PIDS[::3]:
            stream = home.work(pid) / "stream"
            if stream.exists():
                assert whole_records(stream)[0] == stream.stat().st_size


def add(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


DAMAGES: dict[str, tuple[Callable[[Home], object], str]] = {
    "a torn stream": (
        lambda h: add(h.work(1) / "stream", b"\0\0\1\0torn"), "procs/1/stream"),
    "a checkpoint being written": (
        lambda h: (h.work(1) / "checkpoints/.writing").mkdir(), "procs/1/checkpoints/.writing"),
    "a checkpoint half replaced": (
        lambda h: (h.work(1) / "checkpoints/step-000000009").rename(
            h.work(1) / "checkpoints/.replaced-step-000000009"),
        "procs/1/checkpoints/.replaced-step-000000009"),
    "a checkpoint that differs": (
        lambda h: (h.work(4) / "checkpoints/step-000000009/state.json").write_text("{}"),
        "procs/4/checkpoints/step-000000009"),
    "a folder without a row": (lambda h: h.work(99).mkdir(0o700), "procs/99"),
    "last words torn": (
        lambda h: (h.work(1) / "result.json").write_text("{"), "procs/1/result.json"),
    "a row without its folder": (lambda h: shutil.rmtree(h.work(1)), "procs/1"),
    "a dead worker": (lambda h: h.worker("w5-1").mkdir(0o700), "w/w5-1"),
    "a dead socket": (lambda h: (h.path / "zygote.sock").touch(), "zygote.sock"),
    "a model half written": (lambda h: (h.models / ".partial-3").mkdir(), "models/.partial-3"),
    "a model half replaced": (
        lambda h: (h.models / "m").rename(h.models / ".replaced-m"), "models/.replaced-m"),
    "profiles torn": (lambda h: h.profiles.write_text("{"), "profiles.json"),
    "a manifest torn": (lambda h: h.manifest.write_text(""), "manifest.json"),
    "packing torn": (lambda h: h.packing.write_text("]"), "packing.json"),
    "no identity": (lambda h: (h.path / "id").write_text("x"), "id"),
    "open to others": (lambda h: (h.path / "procs").chmod(0o755), "procs"),
    "no journal": (lambda h: [p.unlink() for p in h.path.glob("journal.db*")], "journal.db"),
    "a repair that was killed": (
        lambda h: shutil.copyfile(h.journal, f"{h.journal}.repaired"), "journal.db"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_each_damage_is_named_and_repaired(home: Home, what: str) -> None:
    point_inside(home)
    harm, path = DAMAGES[what]
    harm(home)
    seen = check(home, repair=False)
    assert seen.status == LEFT
    assert path in [p.path for p in seen.problems], seen.problems
    report = repaired(home)
    assert report.status == REPAIRED
    assert all(p.repaired for p in report.problems), report.problems
    if what == "a model half replaced":
        assert (home.models / "m").is_dir()
    rows(home)


@pytest.mark.parametrize("seed", range(8))
def test_killed_anywhere_it_is_done_by_the_next(
    home: Home, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of a file's name is a place to die in."""
    generator = random.Random(seed)
    for _ in range(3):
        Damage("flip", 0, generator.random(), 7).do(home)  # (files are sorted: `id`, journal, ...)
    data = bytearray(home.journal.read_bytes())
    data[100:108] = bytes(8)
    home.journal.write_bytes(data)
    intact = whole(home)
    real, left = Path.rename, generator.randrange(6)

    def dies(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with contextlib.suppress(KeyboardInterrupt):
        check(home, repair=True)
    monkeypatch.setattr(Path, "rename", real)
    repaired(home)
    assert intact <= set(rows(home))


def test_streams_and_checkpoints_are_judged_as_their_writers_do(home: Home) -> None:
    folder = home.work(1)
    for path in (folder / "checkpoints").iterdir():
        assert work.damage(path) is checkpoint.damage(path) is None
    add(folder / "stream", b"\0\0")
    assert work.whole_until(folder / "stream") == whole_records(folder / "stream")[0]


def test_a_home_that_was_shut_down_is_clean(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        await fresh.ask(p.Services())
        await fresh.wait(await fresh.spin(steps=2))
        await fresh.down()

    fresh.run(go())
    report = check(Home(fresh.path), repair=False)
    # (The kernel's own process removes its socket; here it is the test's.)
    assert [p.path for p in report.problems if p.path != "kernel.sock"] == []


def test_a_boot_on_a_damaged_journal_leaves_its_log_to_fsck(home: Home) -> None:
    """SQLite itself would remove it."""
    wal = Path(f"{home.journal}-wal")
    assert wal.stat().st_size
    data = home.journal.read_bytes()
    home.journal.write_bytes(b"x" * 120 + data[120:])
    log = wal.read_bytes()
    for _ in range(2):
        with pytest.raises(HomeUnusable) as refused:
            asyncio.run(opened(home))
        assert "llmos fsck --repair" in refused.value.hint
    assert wal.read_bytes() == log
    repaired(home)
    assert sorted(rows(home)) == list(PIDS)


async def opened(home: Home) -> None:
    Journal(home.journal).open()


def test_it_refuses_while_a_kernel_runs_and_where_there_is_no_home(
    home: Home, tmp_path: Path
) -> None:
    with home.held(), pytest.raises(Busy):
        check(home, repair=True)
    with pytest.raises(HomeUnusable, match="no home"):
        check(Home(tmp_path / "nothing"), repair=True)
    assert not (tmp_path / "nothing").exists()


def test_the_command_says_what_it_did(home: Home) -> None:
    point_inside(home)
    home.profiles.write_text("{")

    def fsck(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "llmos.shell", "fsck", "--home", str(home.path)]
        return subprocess.run([*command, *words], capture_output=True, text=True, check=False)

    found = fsck()
    assert found.returncode == 4
    assert "profiles.json: it cannot be read" in found.stdout
    assert "llmos fsck --repair" in found.stderr
    told = json.loads(fsck("--repair", "--json").stdout)
    assert (told["status"], [p["repaired"] for p in told["problems"]]) == (1, [True])
    assert fsck().stdout == f"{home.path}: clean\n"
    with home.held():
        busy = fsck()
    assert (busy.returncode, busy.stderr.split(str(home.path))[0]) == (8, "llmos: a kernel serves ")
