"""Code in colours, line by line as it is written."""

from __future__ import annotations

from typing import Any

from llmos.shell.paper import Span

# Enough to know that a line stands inside a text of several lines, and quick to look at again.
_LINES_BEFORE = 60

# The first kind that a token belongs to. Every terminal has these colours, in its user's shades.
_STYLES = (
    ("Comment", "2;3"),
    ("Keyword.Constant", "36"),
    ("Keyword", "35"),
    ("Operator.Word", "35"),
    ("Name.Builtin", "36"),
    ("Name.Function", "34"),
    ("Name.Class", "1;34"),
    ("Name.Decorator", "34"),
    ("Name.Tag", "34"),
    ("Name.Attribute", "36"),
    ("Literal.String", "32"),
    ("Literal.Number", "33"),
    ("Generic.Deleted", "31"),
    ("Generic.Inserted", "32"),
    ("Generic.Heading", "1"),
)


class Highlighter:
    """Colours of one block of code in the language of that name; none for one that is not known."""

    def __init__(self, language: str) -> None:
        self._lexer = _lexer(language)
        self._before: list[str] = []

    def whole(self, line: str) -> list[Span]:
        """A line of the block; those that follow are read as standing behind it."""
        spans = self._coloured([*self._before, line])
        self._before = [*self._before, line][-_LINES_BEFORE:]
        return spans

    def partial(self, line: str) -> list[Span]:
        """The beginning of a line."""
        return self._coloured([line])

    def _coloured(self, lines: list[str]) -> list[Span]:
        """The last of these lines."""
        if self._lexer is None:
            return [(lines[-1], "")]
        spans: list[Span] = []
        for kind, text in self._lexer.get_tokens("\n".join(lines)):
            *_, last = text.split("\n")
            if "\n" in text:
                spans.clear()
            if last:
                spans.append((last, _style(kind)))
        # A lexer that swallows a character must not cost the reader one.
        return spans if "".join(text for text, _ in spans) == lines[-1] else [(lines[-1], "")]


def _lexer(language: str) -> Any:
    """None where the language is not known, or is none."""
    if not language:
        return None
    # Here: it costs more to import than the rest of an answer without code.
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def _style(kind: Any) -> str:
    name = str(kind).removeprefix("Token.")
    for known, style in _STYLES:
        if name == known or name.startswith(known + "."):
            return style
    return ""
