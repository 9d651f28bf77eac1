"""The table of docs/concepts/survival.md: where a training may be killed and keep its bits.

python tests/bench/exact_table.py [WORDS]      rows with all of WORDS in their name
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.exact import PLACES, differences, rows


def main(words: list[str]) -> int:
    """Print it as Markdown. -> 1 when something is not exact."""
    print("| program | " + " | ".join(PLACES) + " |")
    print("| --- |" + " --- |" * len(PLACES))
    failed = 0
    for row in rows():
        if not all(word in row.name for word in words):
            continue
        cells = []
        for place in PLACES:
            if place not in row.places():
                cells.append("")
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = differences(row, place, Path(folder))
            failed += bool(found)
            cells.append("; ".join(found) or "same bits")
        print(f"| {row.name} | " + " | ".join(cells) + " |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
