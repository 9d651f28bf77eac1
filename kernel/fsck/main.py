"""Check a home, and repair it: `llmos fsck` runs this.

    python -P -m llmos.kernel.fsck.main --home HOME [--repair] [--json]

Nothing is deleted that somebody could miss: it goes to `lost+found` in the home. Every repair is a
rename, a truncation or a removal that a kill in its middle leaves to be done again, so fsck may be
killed at any moment and run again. Exit status, as of fsck(8): 0 clean, 1 repaired, 4 problems are
left, 8 not checked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmos.kernel.errors import HomeUnusable, LlmosError
from llmos.kernel.fsck import rest, table
from llmos.kernel.fsck.report import NOT_CHECKED, Report
from llmos.kernel.fsck.work import Folders
from llmos.kernel.home import Home


def check(home: Home, repair: bool) -> Report:
    """Raises Busy while a kernel serves the home, HomeUnusable when it cannot be looked at."""
    if not (home.path / "procs").is_dir() and not home.journal.exists():
        raise HomeUnusable(f"{home.path} is no home of llmos", "say which one with --home")
    with home.held():
        return check_held(home, repair)


def check_held(home: Home, repair: bool) -> Report:
    report = Report(repair)
    rest.check_modes(home, report)
    rest.check_identity(home, report)
    alive = rest.living_workers(home)
    found = table.check(home, report)
    Folders(home, found, report, alive).check()
    if found.changed:
        table.write(home, found)
    rest.check_workers(home, found, report)
    rest.check_models(home, report, alive)
    rest.check_caches(home, report)
    return report


def say(home: Home, report: Report) -> None:
    for note in report.notes:
        _print(f"note: {note}")
    for p in report.problems:
        done = f"repaired: {p.repair}" if p.repaired else "found"
        _print(f"{p.path}: {p.what}\n  {done}")
    count, repaired = len(report.problems), sum(p.repaired for p in report.problems)
    if not count:
        _print(f"{home.path}: clean")
    else:
        plural = "" if count == 1 else "s"
        _print(f"{home.path}: {count} problem{plural}, {repaired} repaired")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="llmos fsck")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    home = Home(given.home.absolute())
    try:
        report = check(home, given.repair)
    except (LlmosError, OSError) as exc:
        hint = getattr(exc, "hint", "")
        sys.stderr.write(
            f"llmos: {getattr(exc, 'message', exc)}\n" + (f"  {hint}\n" if hint else "")
        )
        return NOT_CHECKED
    if given.json:
        _print(json.dumps(report.to_json(str(home.path)), indent=2))
    else:
        say(home, report)
        if report.status and not given.repair:
            sys.stderr.write("  `llmos fsck --repair` repairs what can be repaired\n")
    return report.status


if __name__ == "__main__":
    raise SystemExit(main())
