"""Values as people read them: sizes, times, tables, bars. Plain text in, plain text out.

Knows no process and no device; what belongs to a column is decided by who calls.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# What a terminal that is not UTF-8 shows instead.
_ASCII = {
    "…": "~", "█": "#", "░": ".", "·": "-", "→": "->", "│": "|", "─": "-", "┼": "+", "•": "*",
}  # fmt: skip

# Neither printable nor a danger: new lines, and the joiners of Persian, of Indic scripts, of emoji.
_HARMLESS = "\n\t\u200c\u200d"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. With `shrink` it gives up width down to that, in order of the table's
    rightmost first; `right` aligns numbers."""

    header: str
    right: bool = False
    shrink: int | None = None


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int = 0) -> list[str]:
    """The lines of a table, the header first. `width` 0: as wide as it takes."""
    texts = [[c.header for c in columns], *[[clean(cell) for cell in row] for row in rows]]
    widths = [max(cell_len(row[i]) for row in texts) for i in range(len(columns))]
    excess = sum(widths) + len(widths) - 1 - width
    for i in reversed(range(len(columns))):
        least = columns[i].shrink
        if width and excess > 0 and least is not None:
            cut = min(excess, max(0, widths[i] - least))
            widths[i] -= cut
            excess -= cut
    return [_line(columns, row, widths) for row in texts]


def _line(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [fit(cell, w, c.right) for cell, w, c in zip(row, widths, columns, strict=True)]
    return " ".join(cells).rstrip()


def cell_len(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len as measured

    return measured(text)


def fit(text: str, width: int, right: bool = False) -> str:
    """Exactly `width` columns: padded, or cut with an ellipsis."""
    if cell_len(text) > width:
        while text and cell_len(text) >= width:
            text = text[:-1]
        text = text + "…" if width > 0 else ""
    pad = " " * (width - cell_len(text))
    return pad + text if right else text + pad


def clean(text: str) -> str:
    """One line without control characters: what others wrote must not drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " for c in text)


def clean_text(text: str) -> str:
    """As `clean`, for running text: newlines and tabs stay, and so do spaces of all kinds, what
    joins letters, and characters that this Python does not know yet."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c.isprintable() or c in _HARMLESS or _is_text(c))


def _is_text(c: str) -> bool:
    return unicodedata.category(c) in ("Zs", "Cn", "Co")


def ascii_only(text: str) -> str:
    """The same text for a terminal that knows ASCII only."""
    if text.isascii():
        return text
    for special, plain in _ASCII.items():
        text = text.replace(special, plain)
    return text.encode("ascii", "replace").decode()


def size(nbytes: float | None) -> str:
    """Short, in binary units: 0, 812K, 4.0M, 1.2G."""
    if nbytes is None:
        return "-"
    value = float(nbytes)
    if abs(value) < 1024:
        return f"{value:.0f}"
    for unit in ("K", "M", "G", "T", "P"):
        value /= 1024
        if abs(value) < 9.95:
            return f"{value:.1f}{unit}"
        if abs(value) < 999.5:
            return f"{value:.0f}{unit}"
    return f"{value:.0f}E"


def duration(seconds: float | None) -> str:
    """Short: 0.4s, 12s, 3:05, 1:02:03, 2d03h."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    if seconds < 60:
        return f"{seconds:.0f}s"
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if whole >= 3600:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"


def ago(at: float | None, now: float) -> str:
    """ "3:05 ago", or "-" when it never was."""
    return "-" if at is None else f"{duration(max(0.0, now - at))} ago"


def count(n: float) -> str:
    """A number of things: 950, 15.2k, 1.1B."""
    value = float(n)
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "B"):
        if abs(value) < 999.5:
            return f"{value:.0f}{unit}" if unit == "" or value >= 99.5 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}T"


def number(value: float) -> str:
    """A metric: four significant digits, no noise."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def speed(per_s: float) -> str:
    """So many a second: three digits that mean something."""
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.3g}"


def bar(share: float, width: int) -> str:
    """A bar of `width` columns, filled to `share` (0...1)."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "█" * filled + "░" * (width - filled)


def plural(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "es" if thing.endswith("s") else "s")
