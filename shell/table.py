"""A markdown table as rows of a terminal: columns as wide as their text, if there is room."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llmos.shell.inline import BOLD, DIM, inline
from llmos.shell.paper import Row, Span
from llmos.shell.render import cell_len
from llmos.shell.wrap import wrap

_NARROWEST = 4  # a column below that shows syllables
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_DELIMITER = re.compile(r"\s*:?-+:?\s*$")


def cells_of(line: str) -> list[str]:
    """The texts between the bars of a line."""
    line = line.strip().removeprefix("|")
    if line.endswith("|") and not line.endswith("\\|"):
        line = line[:-1]
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)]


def is_delimiter(line: str, header: str) -> bool:
    """Does this line under `header` make both the beginning of a table?"""
    cells = cells_of(line)
    return (
        "-" in line
        and all(_DELIMITER.match(cell) for cell in cells)
        and len(cells) == len(cells_of(header))
    )


class Table:
    """The lines of a table so far: header, delimiters, rows."""

    def __init__(self, lines: Sequence[str], encode: Callable[[str], str]) -> None:
        self._encode = encode
        self._lines = lines
        texts = [cells_of(line) for line in (lines[0], *lines[2:])]
        self._n = max(len(row) for row in texts)
        marks = cells_of(lines[1])
        self._right = [m.endswith(":") and not m.startswith(":") for m in marks]
        self._centred = [m.endswith(":") and m.startswith(":") for m in marks]
        self._right += [False] * (self._n - len(marks))
        self._centred += [False] * (self._n - len(marks))
        self._cells = [
            [_cell(text, BOLD if i == 0 else "") for text in row + [""] * (self._n - len(row))]
            for i, row in enumerate(texts)
        ]
        self._columns = 0
        self._widths: list[int] = []

    def fit(self, columns: int) -> None:
        """Choose the widths for a terminal of so many columns."""
        self._columns = columns
        widths = [max(1, *(_width(row[i]) for row in self._cells)) for i in range(self._n)]
        room = columns - 3 * (self._n - 1)
        while sum(widths) > room and max(widths) > _NARROWEST:
            widest = widths.index(max(widths))
            widths[widest] -= 1
        self._widths = widths if sum(widths) <= room else []

    def spread(self) -> None:
        """Give the columns what room there is, for rows to come."""
        free = self._columns - 3 * (self._n - 1) - sum(self._widths)
        self._widths = [w + min(w, free // self._n) for w in self._widths]

    def keep_widths(self, other: Table) -> None:
        """Those of what has been shown of the same table."""
        if other._n == self._n and other._columns == self._columns:
            self._widths = other._widths

    def rows(self) -> list[Row]:
        if not self._widths:  # too many columns for this terminal: the source
            return [row for line in self._lines for row in wrap([(line, "")], self._columns)]
        header, *body = self._cells
        line = self._encode("─┼─").join(self._encode("─" * w) for w in self._widths)
        rows = [*self._row(header), Row(((line, DIM),))]
        for cells in body:
            rows += self._row(cells)
        return rows

    def _row(self, cells: Sequence[Sequence[list[Span]]]) -> list[Row]:
        columns = [
            [row for line in cell for row in wrap(line, width)]
            for cell, width in zip(cells, self._widths, strict=True)
        ]
        rows = []
        for k in range(max(len(column) for column in columns)):
            spans: list[Span] = []
            for i, column in enumerate(columns):
                spans += [(self._encode(" │ "), DIM)] if i else []
                spans += self._padded(column[k] if k < len(column) else Row(), i)
            rows.append(Row(tuple(span for span in spans if span[0])))
        return rows

    def _padded(self, row: Row, i: int) -> list[Span]:
        free = max(0, self._widths[i] - row.cells)
        left = free if self._right[i] else free // 2 if self._centred[i] else 0
        right = free - left if i < self._n - 1 else 0  # no blanks at the end of a row
        return [(" " * left, ""), *row.spans, (" " * right, "")]


def _cell(text: str, style: str) -> list[list[Span]]:
    """The lines of a cell."""
    return [inline(part.strip(), style) for part in _BREAK.split(text)]


def _width(cell: Sequence[list[Span]]) -> int:
    return max(sum(cell_len(text) for text, _ in line) for line in cell)
