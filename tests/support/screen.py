"""A terminal's screen: text and the movements that the shell uses go in, rows come out.

Knows carriage return, newline, cursor up, erase line, erase below, styles, and how a terminal
wraps: behind a full row the cursor stays on its last column until more comes. Anything else is a
failure.
"""

from __future__ import annotations

import re

from llmos.shell.render import cell_len

_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen:
    """`rows` has everything from the first row on; what has scrolled off cannot be changed."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self._rows: list[list[str]] = [[]]  # a cell each; the second half of a wide one is ""
        self._row = self._column = 0
        self._wraps = False  # the cursor is behind the last column
        self._soft: set[int] = set()  # rows whose text goes on in the next one
        self.changes_of_old_rows = 0  # how often a row above the cursor's was gone back to

    def size(self) -> tuple[int, int]:
        return self.columns, self.lines

    @property
    def rows(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._rows]

    @property
    def text(self) -> str:
        """What somebody copies: rows that were full only because of the width are one line."""
        parts = []
        for i, row in enumerate(self._rows):
            parts.append("".join(row) if i in self._soft else "".join(row).rstrip() + "\n")
        return "".join(parts).rstrip("\n")

    def write(self, text: str) -> None:
        i = 0
        while i < len(text):
            found = _SEQUENCE.match(text, i)
            if found is not None:
                self._sequence(found[1], found[2])
                i = found.end()
                continue
            self._character(text[i])
            i += 1

    def narrow(self, columns: int) -> None:
        """The terminal gets other columns; rows that do not fit any more are broken, as most
        terminals do, and the cursor stays at the end of its text."""
        self.columns = columns
        rows: list[list[str]] = []
        for row in self._rows:
            while len(row) > columns:
                rows.append(row[:columns])
                row = row[columns:]
            rows.append(row)
        self._rows = rows
        self._row, self._column, self._wraps = len(rows) - 1, len(rows[-1]), False

    def _sequence(self, numbers: str, letter: str) -> None:
        if letter == "m":
            return
        self._wraps = False
        match letter:
            case "A":
                self.changes_of_old_rows += 1
                top = max(0, len(self._rows) - self.lines)
                self._row = max(top, self._row - int(numbers or 1))
            case "K" if not numbers:
                del self._rows[self._row][self._column :]
            case "J" if not numbers:
                del self._rows[self._row][self._column :]
                del self._rows[self._row + 1 :]
            case _:
                raise AssertionError(f"the screen knows no {numbers}{letter}")

    def _character(self, c: str) -> None:
        if c == "\r":
            self._column, self._wraps = 0, False
        elif c == "\n":
            self._soft.discard(self._row)
            self._next_row()
        elif c.isprintable() or c == "\u3000":
            self._put(c, cell_len(c))
        else:
            raise AssertionError(f"the screen knows no {c!r}")

    def _put(self, c: str, cells: int) -> None:
        row = self._rows[self._row]
        if cells == 0:
            if row:
                row[self._column - 1] += c
            return
        if self._wraps or self._column + cells > self.columns:
            self._soft.add(self._row)
            self._next_row()
            row = self._rows[self._row]
        row.extend([" "] * (self._column - len(row)))
        row[self._column : self._column + cells] = [c, *[""] * (cells - 1)]
        self._column += cells
        if self._column == self.columns:
            self._column, self._wraps = self.columns - 1, True

    def _next_row(self) -> None:
        self._row, self._column, self._wraps = self._row + 1, 0, False
        if self._row == len(self._rows):
            self._rows.append([])
