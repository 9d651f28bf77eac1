"""Check what else lies in a home: dead workers and sockets, models, caches, modes, its identity."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from llmos.kernel import database
from llmos.kernel.fsck.report import Report
from llmos.kernel.fsck.table import Table
from llmos.kernel.home import Home
from llmos.kernel.journal import LOST_AND_FOUND

# Written aside and renamed; a kill leaves them.
_TEMPORARY = re.compile(r"\.probe-\d+|\.(profiles|manifest)\.json\..*|packing\.new|.*\.json\.new")
_PARTIAL, _REPLACED = ".partial-", ".replaced-"
_WORKER = re.compile(r"w(\d+)-\d+")
UNIX_SOCKETS = Path("/proc/net/unix")


def listening(home: Home) -> set[Path]:
    """Sockets in this home that some OS process listens on."""
    found = set()
    for line in UNIX_SOCKETS.read_text(errors="replace").splitlines()[1:]:
        path = Path(line.split(maxsplit=7)[-1])
        if path.is_relative_to(home.path):
            found.add(path)
    return found


def living_workers(home: Home) -> set[int]:
    """Pids of processes whose worker has outlived its kernel."""
    found = set()
    for path in listening(home):
        match = _WORKER.fullmatch(path.parent.name)
        if match and path.name == "sock":
            found.add(int(match[1]))
    return found


def check_workers(home: Home, table: Table, report: Report) -> None:
    sockets = listening(home)
    # The exit status of a worker that died without a kernel is read by the next one.
    wanted = {
        str(worker.get("worker_id"))
        for _, _, proc, worker in table.rows.values() if proc.live and worker
    }  # fmt: skip
    workers = home.path / "w"
    for folder in sorted(workers.iterdir()) if workers.is_dir() else ():
        if folder / "sock" not in sockets and folder.name not in wanted:
            report.found(
                f"w/{folder.name}", "left by a worker that has ended", "removed",
                lambda folder=folder: shutil.rmtree(folder),  # type: ignore[misc]
            )  # fmt: skip
    for path in sorted(home.path.glob("*.sock")):
        # That of a kernel which has died says that somebody wants one (shell/autoboot.py).
        if path not in sockets and path != home.socket:
            report.found(path.name, "a socket that nobody listens on", "removed", path.unlink)


def check_models(home: Home, report: Report, alive: set[int]) -> None:
    for folder in sorted(home.models.iterdir()) if home.models.is_dir() else ():
        name = f"models/{folder.name}"
        if folder.name.startswith(_PARTIAL):
            pid = folder.name.removeprefix(_PARTIAL).partition("-")[0]
            if not (pid.isdigit() and int(pid) in alive):
                report.found(
                    name, "a model that was being written", "removed; its process makes it again",
                    lambda folder=folder: shutil.rmtree(folder),  # type: ignore[misc]
                )  # fmt: skip
        elif folder.name.startswith(_REPLACED):
            target = home.models / folder.name.removeprefix(_REPLACED)
            if target.exists():
                report.found(
                    name, "a model that was replaced", "removed",
                    lambda folder=folder: shutil.rmtree(folder),  # type: ignore[misc]
                )  # fmt: skip
            else:
                report.found(
                    name, "a model was being replaced, its heir is not there",
                    f"it is {target.name} again",
                    lambda folder=folder, target=target: folder.rename(target),  # type: ignore[misc]
                )  # fmt: skip


def check_caches(home: Home, report: Report) -> None:
    """What can be made again is put aside when it cannot be read."""
    aside = home.path / LOST_AND_FOUND

    def put_aside(path: Path) -> None:
        aside.mkdir(mode=0o700, exist_ok=True)
        path.rename(database.unused(aside / path.name))

    for path in (home.manifest, home.profiles, home.packing):
        try:
            json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as exc:
            report.found(
                path.name, f"it cannot be read ({type(exc).__name__})",
                f"moved to {LOST_AND_FOUND}; the kernel makes it again",
                lambda path=path: put_aside(path),  # type: ignore[misc]
            )  # fmt: skip
    for path in sorted(home.path.iterdir()):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            report.found(path.name, "left from a write that was cut off", "removed", path.unlink)


def check_identity(home: Home, report: Report) -> None:
    path = home.path / "id"
    try:
        good = re.fullmatch(rb"[0-9a-f]{16}\s*", path.read_bytes()) is not None
    except FileNotFoundError:
        good = False
    if not good:
        report.found(
            "id", "the home has no identity, or none that can be read",
            "it has a new one: workers of the old one are not adopted",
            lambda: path.write_text(secrets.token_hex(8)),
        )  # fmt: skip


def check_modes(home: Home, report: Report) -> None:
    """Nobody else may read what is in here; members of a group's kernel may pass through."""
    passable = 0o711 if _is_of_a_group(home) else 0
    for path, mode in _private(home):
        found = stat.S_IMODE(path.lstat().st_mode)
        if found & ~(mode | (passable if path.is_dir() else 0)) or found & mode != mode:
            inside = path.relative_to(home.path).as_posix()
            report.found(
                inside, f"its mode is {found:04o}", f"it is {mode:04o} now",
                lambda path=path, mode=mode: path.chmod(mode),  # type: ignore[misc]
            )  # fmt: skip


def _is_of_a_group(home: Home) -> bool:
    """`boot --group` opens the models to its members, and only that does."""
    return home.models.is_dir() and bool(home.models.stat().st_mode & 0o020)


def _private(home: Home) -> Iterator[tuple[Path, int]]:
    yield home.path, 0o700
    for name in ("procs", "w"):
        folder = home.path / name
        if not folder.is_dir():
            continue
        yield folder, 0o700
        for inner in sorted(folder.iterdir()):
            if not inner.is_dir():
                continue
            yield inner, 0o700
            for secret in ("secret", "stream", "log"):
                if (inner / secret).is_file():
                    yield inner / secret, 0o600
