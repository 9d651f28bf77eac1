"""Markdown inside a line: bold, italic, code, links; a line of text in, styled spans out.

Stricter than CommonMark where that would swallow what was meant: `2**10`, `a*b*c`, `snake_case` and
`__init__` stay as they are. What is not closed is text.
"""

from __future__ import annotations

import re

from llmos.shell.paper import Span

BOLD, DIM, ITALIC, UNDERLINE, STRUCK = "1", "2", "3", "4", "9"
CODE = "36"
ADDRESS = "2;4"

_SPECIAL = re.compile(r"[\\`*_~\[!]")
_ESCAPABLE = "*_`#|~<>[]!\\"
_LINK = re.compile(r"!?\[((?:[^\[\]\\]|\\.)*)\]\(<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?"
                   r"(?:\s+[\"'][^\"']*[\"'])?\)")  # fmt: skip
_DUNDER = re.compile(r"\w+__(?!\w)")
_STYLES = {
    ("*", 1): ITALIC, ("*", 2): BOLD, ("*", 3): f"{BOLD};{ITALIC}",
    ("_", 1): ITALIC, ("_", 2): BOLD, ("_", 3): f"{BOLD};{ITALIC}",
    ("~", 2): STRUCK,
}  # fmt: skip
# Deeper than anybody writes; a text of opening stars alone must not exhaust the stack.
_DEEPEST = 8


def inline(text: str, style: str = "", unfinished: bool = False) -> list[Span]:
    """`unfinished`: more of the line may come, so what is open is taken to be closed later."""
    return _Parser(text, unfinished).parse(0, len(text), style, 0)


class _Parser:
    def __init__(self, text: str, unfinished: bool) -> None:
        self._text = text
        self._unfinished = unfinished
        self._unclosed: set[tuple[str, int]] = set()  # there is no more of these to the right

    def parse(self, i: int, end: int, style: str, depth: int) -> list[Span]:
        spans: list[Span] = []
        while i < end:
            found = _SPECIAL.search(self._text, i, end)
            if found is None:
                _add(spans, self._text[i:end], style)
                break
            _add(spans, self._text[i : found.start()], style)
            i = self._special(found.start(), end, style, depth, spans)
        return spans

    def _special(self, i: int, end: int, style: str, depth: int, spans: list[Span]) -> int:
        """Take what begins at `i` -> where the rest begins."""
        text, c = self._text, self._text[i]
        if c == "\\":
            escaped = i + 1 < end and text[i + 1] in _ESCAPABLE
            _add(spans, text[i + 1] if escaped else c, style)
            return i + 2 if escaped else i + 1
        if c == "`":
            return self._code(i, end, style, spans)
        if c in "[!":
            link = _LINK.match(text, i, end)
            if link is None:
                _add(spans, c, style)
                return i + 1
            _link(link, style, spans)
            return link.end()
        n = _run(text, i, end)
        inside = self._inside(i, n, end)
        if inside is None or depth >= _DEEPEST:
            _add(spans, text[i : i + n], style)
            return i + n
        size, close = inside
        both = join(style, _STYLES[c, size])
        _extend(spans, self.parse(i + size, close, both, depth + 1))
        return close + size

    def _code(self, i: int, end: int, style: str, spans: list[Span]) -> int:
        n = _run(self._text, i, end)
        close = self._closing_ticks(i + n, n, end)
        if close < 0 and not self._open_at_end(i + n, end):
            _add(spans, self._text[i : i + n], style)
            return i + n
        stop = close if close >= 0 else end
        code = self._text[i + n : stop]
        if code.strip() and code[0] == code[-1] == " ":
            code = code[1:-1]
        _add(spans, code, join(style, CODE))
        return stop + n if close >= 0 else end

    def _closing_ticks(self, i: int, n: int, end: int) -> int:
        if ("`", n) in self._unclosed:
            return -1
        while (i := self._text.find("`", i, end)) >= 0:
            m = _run(self._text, i, end)
            if m == n:
                return i
            i += m
        if end == len(self._text):
            self._unclosed.add(("`", n))
        return -1

    def _open_at_end(self, i: int, end: int) -> bool:
        return self._unfinished and end == len(self._text)

    def _inside(self, i: int, n: int, end: int) -> tuple[int, int] | None:
        """Of a run of `n` delimiters at `i`: how many of them open, and where they are closed."""
        text, c = self._text, self._text[i]
        before = text[i - 1] if i else " "
        after = text[i + n] if i + n < end else ""
        if (_is_word(before) and c != "~") or after.isspace() or (c, n) not in _STYLES:
            return None
        if not after and not self._open_at_end(i + n, end):
            return None
        if c == "_" and n == 2 and _DUNDER.match(text, i + n, end):
            return None
        for size in (n, 1, 2) if n == 3 else (n,):
            close = self._closing(i + size, c, size, end)
            if close >= 0:
                return size, close
        if not self._open_at_end(i, end):
            return None
        # Not closed yet: what comes will do it, most likely; it may be half there already.
        half = len(text) - len(text.rstrip(c))
        return n, max(i + n, end - half) if half < n else end

    def _closing(self, i: int, c: str, n: int, end: int) -> int:
        if (c, n) in self._unclosed:
            return -1
        text, begin = self._text, i
        while i < end:
            if text[i] == "\\":
                i += 2
            elif text[i] == "`":
                ticks = _run(text, i, end)
                close = self._closing_ticks(i + ticks, ticks, end)
                i = close + ticks if close >= 0 else i + ticks
            elif text[i] == c:
                m = _run(text, i, end)
                after = text[i + m] if i + m < end else " "
                closes = i > begin and not text[i - 1].isspace()
                closes = closes and not (_is_word(after) and (c == "_" or n == 1))
                if closes and (m == n or (m == 3 and n < 3)):
                    return i + m - n
                i += m
            else:
                i += 1
        if end == len(text):
            self._unclosed.add((c, n))
        return -1


def _link(found: re.Match[str], style: str, spans: list[Span]) -> None:
    label, address = found[1], found[2]
    _extend(spans, inline(label, join(style, UNDERLINE)))
    if address and address != label:
        _add(spans, " (" if label else "(", style)
        _add(spans, address, join(style, ADDRESS))
        _add(spans, ")", style)


def _run(text: str, i: int, end: int) -> int:
    """How many of the same character follow at `i`."""
    n = 1
    while i + n < end and text[i + n] == text[i]:
        n += 1
    return n


def _is_word(c: str) -> bool:
    return c.isascii() and c.isalnum()


def join(style: str, more: str) -> str:
    return f"{style};{more}" if style and more else style or more


def _extend(spans: list[Span], more: list[Span]) -> None:
    for text, style in more:
        _add(spans, text, style)


def _add(spans: list[Span], text: str, style: str) -> None:
    if not text:
        return
    if spans and spans[-1][1] == style:
        spans[-1] = (spans[-1][0] + text, style)
    else:
        spans.append((text, style))
