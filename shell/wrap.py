"""Styled text in rows of a width: at spaces, and between the characters of scripts without them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmos.shell.paper import Row, Span
from llmos.shell.render import cell_len

# Chinese, Japanese and Korean: a line may end behind any character, but none begins with closing
# punctuation.
_WIDE = r"[\u2e80-\u303f\u3040-\u9fff\uac00-\ud7af\uf900-\ufaff\uff01-\uff60]"
_CLOSING = (
    r"[\u3001\u3002\u3009\u300b\u300d\u300f\u3011\u3015\u30fb\u30fc"
    r"\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\uff3d\uff5d\u2019\u201d\u2026]"
)
_PIECES = re.compile(rf"\s+|{_WIDE}{_CLOSING}*|(?:(?!{_WIDE})\S)+")


def wrap(
    spans: Sequence[Span], columns: int, first: Sequence[Span] = (), rest: Sequence[Span] = ()
) -> list[Row]:
    """Rows of at most `columns`; the first begins with `first`, the others with `rest`. Where these
    would take half of a row, they are words like others."""
    if 2 * _cells(first) > columns:
        spans, first = [*first, *spans], ()
    lines = _Lines(columns, first, rest)
    for text, style in spans:
        for found in _PIECES.finditer(text):
            piece = found[0]
            if piece.isspace():
                lines.end_word()
                lines.space(piece, style)
            elif re.match(_WIDE, piece):
                lines.end_word()
                lines.word(piece, style)
                lines.end_word()
            else:
                lines.word(piece, style)
    return lines.finish()


def chop(spans: Sequence[Span], columns: int) -> list[Row]:
    """Full rows without regard to words: a line that is to be copied as it is."""
    rows: list[list[Span]] = [[]]
    left = columns
    for text, style in spans:
        while text:
            head, cells = _fitting(text, left, not rows[-1])
            if head:
                rows[-1].append((head, style))
                text, left = text[len(head) :], left - cells
            if text:
                rows.append([])
                left = columns
    return [Row(tuple(row), soft=i < len(rows) - 1) for i, row in enumerate(rows)]


class _Lines:
    """Words and spaces in, rows out."""

    def __init__(self, columns: int, first: Sequence[Span], rest: Sequence[Span]) -> None:
        self._columns = columns
        self._rest = list(rest) if _cells(rest) * 2 <= columns else []
        self._rows: list[list[Span]] = [list(first)]
        self._used = _cells(self._rows[0])
        self._empty = True  # is there no word in this row yet?
        self._space: list[Span] = []
        self._word: list[Span] = []

    def space(self, text: str, style: str) -> None:
        self._space.append((text, style))

    def word(self, text: str, style: str) -> None:
        self._word.append((text, style))

    def end_word(self) -> None:
        if not self._word:
            return
        word, space = self._word, self._space
        self._word, self._space = [], []
        cells, gap = _cells(word), _cells(space)
        if self._used + gap + cells <= self._columns:
            self._put([*space, *word], gap + cells)
            return
        if not self._empty:
            self._new_row()
        for text, style in word:
            self._put_long(text, style)

    def finish(self) -> list[Row]:
        self.end_word()
        return [Row(tuple(row)) for row in self._rows]

    def _put_long(self, text: str, style: str) -> None:
        """A word that may be wider than a row is cut where the row ends."""
        while text:
            head, cells = _fitting(text, self._columns - self._used, self._empty)
            if head:
                self._put([(head, style)], cells)
            text = text[len(head) :]
            if text:
                self._new_row()

    def _put(self, spans: Sequence[Span], cells: int) -> None:
        row = self._rows[-1]
        for text, style in spans:
            if row and row[-1][1] == style:
                row[-1] = (row[-1][0] + text, style)
            elif text:
                row.append((text, style))
        self._used += cells
        self._empty = False

    def _new_row(self) -> None:
        self._rows.append(list(self._rest))
        self._used = _cells(self._rest)
        self._empty = True


def _fitting(text: str, columns: int, fresh: bool) -> tuple[str, int]:
    """As much of the text as fits; into a fresh row a character at least, however narrow it is."""
    if text.isascii() and 0 < len(text) <= columns:
        return text, len(text)
    used = 0
    for i, c in enumerate(text):
        cells = cell_len(c)
        if used + cells > columns and (i or not fresh):
            return text[:i], used
        used += cells
    return text, used


def _cells(spans: Sequence[Span]) -> int:
    return sum(cell_len(text) for text, _ in spans)
