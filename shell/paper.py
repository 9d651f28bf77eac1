"""The last rows of a terminal, which may still change: what stands is left alone, what differs is
written again.

A row that has scrolled off the screen cannot be changed any more, and after the terminal has become
narrower nobody knows where its rows are: both are printed anew further down rather than lost. Knows
cursor movements, not what the rows mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmos.shell.render import cell_len

# A piece of text and how it looks: parameters of SGR such as "1;35", or nothing.
Span = tuple[str, str]

_ERASE_LINE = "\x1b[K"
_ERASE_BELOW = "\x1b[J"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the screen. `soft`: it is full, and its text goes on in the next row without a
    newline, so that a terminal copies both as one line."""

    spans: tuple[Span, ...] = ()
    soft: bool = False

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)

    @property
    def cells(self) -> int:
        return sum(cell_len(text) for text, _ in self.spans)


class Paper:
    """Rows at the end of what a terminal shows; the cursor is behind the last of them."""

    def __init__(self, write: Callable[[str], None], size: Callable[[], tuple[int, int]]) -> None:
        """`size` gives the terminal's columns and lines as they are now."""
        self._write = write
        self._size = size
        self._rows: list[Row] = []
        self._fixed = 0  # so many of the rows cannot be reached any more
        self._columns = size()[0]

    @property
    def columns(self) -> int:
        """How many a row may have."""
        return max(1, self._size()[0])

    @property
    def lines(self) -> int:
        return max(1, self._size()[1])

    @property
    def is_blank(self) -> bool:
        """Is the cursor at the beginning of a row of its own?"""
        return not self._rows

    def lost_its_place(self) -> bool:
        """Has the terminal another width now, so that the rows may not be where they were?"""
        before, self._columns = self._columns, self.columns
        if before == self._columns:
            return False
        return any(row.soft or row.cells > self._columns for row in self._rows)

    def update(self, rows: Sequence[Row]) -> None:
        """Show these instead of the rows that may still change."""
        old, new = self._rows, list(rows)
        first = _first_difference(old, new)
        if first == len(old) == len(new):
            return
        if first == len(new):  # the cursor goes back behind the last row that is left
            first = max(0, first - 1)
        self._rows = new
        reachable = max(self._fixed, len(old) - self.lines)
        if first < reachable:
            texts = [[row.text for row in rows[first:reachable]] for rows in (old, new)]
            if texts[0] == texts[1] and reachable < len(new):
                first = reachable  # they only look different
            else:
                self._fixed = first
                self._write("\n" + _lines(new[first:], self._columns))
                return
        last = len(old) - 1
        if old and first >= last:
            more = _behind(old[last].spans, new[last].spans) if len(new) > last else None
            if more is not None:
                self._write(_continued(more, new[last:], self._columns))
                return
        self._write(
            _to_row(len(old) - 1 - first if old else 0)
            + (_ERASE_BELOW if len(new) < len(old) else "")
            + _lines(new[first:], self._columns)
        )

    def commit(self) -> None:
        """The rows stay as they are; what comes begins below them."""
        self._write("\n")
        self.forget()

    def leave(self) -> None:
        """As `commit`, where there is anything: somebody else wants to print."""
        if self._rows:
            self.commit()

    def forget(self) -> None:
        """The cursor is at the beginning of a row, whatever stood here."""
        self._rows = []
        self._fixed = 0
        self._columns = self.columns


def _first_difference(old: list[Row], new: list[Row]) -> int:
    for i, (one, other) in enumerate(zip(old, new, strict=False)):
        if one != other:
            return i
    return min(len(old), len(new))


def _continued(more: Sequence[Span], rows: Sequence[Row], columns: int) -> str:
    """What is written behind the cursor: the rest of its row, then all but the first of `rows`."""
    text = "".join(styled(*span) for span in more)
    goes_on = len(rows) > 1 and not rows[0].soft
    return text + ("\n" if goes_on else "") + _lines(rows[1:], columns)


def _behind(old: Sequence[Span], new: Sequence[Span]) -> list[Span] | None:
    """The spans that `new` has behind `old`; None when it does not begin with it."""
    for i, (text, style) in enumerate(old):
        if i >= len(new) or new[i][1] != style or not new[i][0].startswith(text):
            return None
        if new[i][0] != text:
            if i != len(old) - 1:
                return None
            return [(new[i][0][len(text) :], style), *new[i + 1 :]]
    return list(new[len(old) :])


def _to_row(up: int) -> str:
    return "\r" + (f"\x1b[{up}A" if up else "")


def _lines(rows: Sequence[Row], columns: int) -> str:
    """The rows as bytes for the terminal, from the beginning of the first one."""
    parts = []
    for i, row in enumerate(rows):
        parts += [styled(*span) for span in row.spans]
        # Behind a full row the cursor still stands on its last column: that would be erased.
        parts += [_ERASE_LINE] if row.cells < columns else []
        parts += ["\n"] if i < len(rows) - 1 and not row.soft else []
    return "".join(parts)


def styled(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text
