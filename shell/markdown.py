"""Markdown as it is written: text arrives in pieces, rows of a terminal leave.

A line of the source is a row, or several: what a model puts on lines of their own stays so. Only
the line that is being written is drawn again when more of it comes; a table is drawn row by row,
with the widths that it needs so far. Whatever is no markdown is shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from llmos.shell.highlight import Highlighter
from llmos.shell.inline import BOLD, DIM, UNDERLINE, inline
from llmos.shell.paper import Paper, Row, Span
from llmos.shell.render import cell_len
from llmos.shell.table import Table, is_delimiter
from llmos.shell.wrap import chop, wrap

HEADINGS = {1: f"{BOLD};{UNDERLINE};35", 2: f"{BOLD};35", 3: BOLD}
_RULE_COLUMNS = 60  # short enough that a terminal made narrower seldom breaks it
_TAB = 4

_FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*([^`]*)$")
_HEADING = re.compile(r" {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$")
_RULE = re.compile(r" {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$")
_QUOTE = re.compile(r" {0,3}>\s?")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])(\s+)(?:\[([ xX])\]\s+)?(?=\S)")
# The beginning of a line of which nobody can say yet what it will be.
_UNDECIDED = re.compile(
    r"\s*(?:#{1,6}\s*|[-*_+~`=]+\s*|>\s*|(?:[-*+]|\d{1,9}[.)])\s+\[?[ xX]?\]?)?$"
)


class Markdown:
    """Writes an answer on `paper`. `encode` makes text showable by the terminal."""

    def __init__(self, paper: Paper, encode: Callable[[str], str] = lambda text: text) -> None:
        self._paper = paper
        self._encode = encode
        self._line = ""  # the line that is being written
        self._blanks = 0  # empty lines that are shown when something follows
        self._begun = False
        self._fence: _Fence | None = None
        self._table: list[str] = []  # the lines of what is one, or may be
        self._drawn: Table | None = None  # the one whose widths are kept
        self._shown = 0  # characters of the line that stand on the paper
        self._skip = 0  # ... and that stand above a break, so that they are not written again

    def write(self, text: str) -> None:
        """Take the next piece of the text."""
        if self._paper.lost_its_place():
            self.pause()
        *lines, rest = (self._line + self._encode(text)).split("\n")
        for line in lines:
            self._whole(line.expandtabs(_TAB))
            self._shown = self._skip = 0
        self._line = rest
        if rest:
            self._partial(rest.expandtabs(_TAB))

    def close(self) -> None:
        """Nothing follows: show what was held back."""
        line, self._line = self._line, ""
        if line:
            self._whole(line.expandtabs(_TAB))
        self._end_table()
        if self._fence is not None:
            self._rows_done([self._rule()])
            self._fence = None

    def pause(self) -> None:
        """Somebody else prints now: what comes later begins on a row of its own."""
        if not self._paper.is_blank:
            self._skip = max(self._skip, self._shown)
            self._paper.leave()

    # ---- lines ----

    def _whole(self, line: str) -> None:
        if self._fence is not None:
            self._code_line(line)
        elif not self._takes_table_line(line):
            self._text_line(line)

    def _text_line(self, line: str) -> None:
        if not line.strip():
            self._blanks += self._begun
            return
        fence = _FENCE.match(line)
        if fence is not None:
            self._fence = _Fence(fence)
            self._rows_done(self._opening(self._fence.label))
        elif "|" in line:
            self._table = [line]  # the next line tells whether it is one
            self._draw(self._text_rows(line))
        else:
            self._rows_done(self._text_rows(line))

    def _partial(self, line: str) -> None:
        """Show a line of which more will come, as far as it is clear what it is."""
        if self._fence is not None:
            if not self._fence.may_close(line):
                self._draw(self._code_rows(self._fence, line, partial=True))
            return
        if self._table:
            if self._may_be_row(line):
                return
            self._end_table()
        if not (_UNDECIDED.match(line) or _FENCE.match(line)):
            self._draw(self._text_rows(line, partial=True))

    def _text_rows(self, line: str, partial: bool = False) -> list[Row]:
        """The rows of a line outside of code and tables."""
        first, rest, content = self._laid_out(line, partial)
        return self._wrapped(first, rest, content)

    def _wrapped(self, first: list[Span], rest: list[Span], content: list[Span]) -> list[Row]:
        self._shown = sum(len(text) for text, _ in content)
        if self._skip:
            first, content = rest, _without(content, self._skip, at_word=True)
        # A column is left free: behind a full row nobody knows where a terminal's cursor is.
        return wrap(content, max(1, self._paper.columns - 1), first, rest)

    def _laid_out(self, line: str, partial: bool) -> tuple[list[Span], list[Span], list[Span]]:
        """What the first row begins with, what the others begin with, and the text."""
        heading = _HEADING.match(line)
        if heading is not None and heading[2]:
            style = HEADINGS.get(len(heading[1]), BOLD)
            return [], [], inline(heading[2], style, partial)
        if not partial and _RULE.match(line):
            return [], [], [self._rule().spans[0]]
        first: list[Span] = []
        rest: list[Span] = []
        while (quote := _QUOTE.match(line)) is not None:
            first.append((self._encode("│ "), DIM))
            rest.append(first[-1])
            line = line[quote.end() :]
        item = _ITEM.match(line)
        if item is not None:
            indent, mark, gap, box = item.groups()
            line = line[item.end() :]
            if not mark[0].isdigit():
                mark = self._encode("•")
            mark += gap[:1] if not box else f" [{box.strip().lower() or ' '}] "
            first += [(indent, "")] if indent else []
            first.append((mark, ""))
            rest.append((" " * (len(indent) + len(mark)), ""))
            return first, rest, inline(line, "", partial)
        indent = line[: len(line) - len(line.lstrip())]
        if indent:
            first.append((indent, ""))
            rest.append((indent, ""))
        return first, rest, inline(line.strip() if not partial else line.lstrip(), "", partial)

    def _rule(self) -> Row:
        columns = min(_RULE_COLUMNS, max(1, self._paper.columns - 1))
        return Row(((self._encode("─" * columns), DIM),))

    def _opening(self, label: str) -> list[Row]:
        """The line above a block of code, with what its author calls it."""
        columns = min(_RULE_COLUMNS, max(1, self._paper.columns - 1))
        text = self._encode("── ") + f"{label} "
        if not label or cell_len(text) > columns:
            return [*(wrap([(label, DIM)], columns) if label else ()), self._rule()]
        text += self._encode("─" * (columns - cell_len(text)))
        return [Row(((text, DIM),))]

    # ---- code ----

    def _code_line(self, line: str) -> None:
        fence = self._fence
        assert fence is not None
        if fence.closes(line):
            self._fence = None
            self._rows_done([self._rule()])
            return
        self._rows_done(self._code_rows(fence, line, partial=False))

    def _code_rows(self, fence: _Fence, line: str, partial: bool) -> list[Row]:
        content = fence.show(line, partial)
        self._shown = sum(len(text) for text, _ in content)
        return chop(_without(content, self._skip), self._paper.columns)

    # ---- tables ----

    def _takes_table_line(self, line: str) -> bool:
        """Whether the line belongs to a table, or to what may be one."""
        if not self._table:
            return False
        if len(self._table) == 1:
            belongs = is_delimiter(line, self._table[0])
        else:
            belongs = "|" in line and (self._starts_row(line) or not self._starts_row())
        if not belongs:
            self._end_table()
            return False
        self._table.append(line)
        self._draw_table()
        return True

    def _may_be_row(self, line: str) -> bool:
        if len(self._table) == 1:
            return re.match(r"[\s|:-]*$", line) is not None
        return self._starts_row(line) or not line.strip() or not self._starts_row()

    def _starts_row(self, line: str | None = None) -> bool:
        """Does a line begin with a bar? Without one: do the rows of this table?"""
        return (self._table[0] if line is None else line).lstrip().startswith("|")

    def _draw_table(self) -> None:
        table = Table(self._table, self._encode)
        table.fit(max(1, self._paper.columns - 1))
        if self._drawn is not None:
            table.keep_widths(self._drawn)
        elif len(table.rows()) > self._paper.lines // 2:
            # Its beginning will leave the screen, so that this is the last chance to choose.
            table.spread()
            self._drawn = table
        self._draw(table.rows())

    def _end_table(self) -> None:
        if self._table:
            self._table = []
            self._drawn = None
            self._paper.leave()

    # ---- rows ----

    def _draw(self, rows: list[Row]) -> None:
        """Show rows that may still change."""
        for _ in range(self._blanks):
            self._paper.commit()
        self._blanks = 0
        self._begun = True
        self._paper.update(rows)

    def _rows_done(self, rows: list[Row]) -> None:
        self._draw(rows)
        self._paper.commit()


class _Fence:
    """A block of code that is being written."""

    def __init__(self, opening: re.Match[str]) -> None:
        self._indent = opening[1]
        self._mark = opening[2]
        self.label = opening[3].strip()
        self._highlighter = Highlighter(self.label.split(" ")[0])

    def closes(self, line: str) -> bool:
        mark = line.strip()
        return len(mark) >= len(self._mark) and not mark.strip(self._mark[0])

    def may_close(self, line: str) -> bool:
        """Is this the beginning of a line that ends the block?"""
        mark = line.strip()
        return not mark.strip(self._mark[0])

    def show(self, line: str, partial: bool) -> list[Span]:
        """The line in colours. One that is whole counts for those that follow."""
        indent = len(line) - len(line.lstrip(" "))
        line = line[min(indent, len(self._indent)) :]
        spans = self._highlighter.partial(line) if partial else self._highlighter.whole(line)
        return [(self._indent, ""), *spans] if self._indent else spans


def _without(spans: list[Span], skip: int, at_word: bool = False) -> list[Span]:
    """The spans behind the first `skip` characters, and behind the spaces that follow these."""
    rest = []
    for text, style in spans:
        if len(text) > skip:
            rest.append((text[skip:], style))
        skip = max(0, skip - len(text))
    while at_word and rest and not rest[0][0].lstrip():
        rest.pop(0)
    if at_word and rest:
        rest[0] = (rest[0][0].lstrip(), rest[0][1])
    return rest
