"""How the text of a model gets to stdout: as it is, or as markdown where a terminal shows it."""

from __future__ import annotations

import os
import sys
from typing import Protocol

from llmos.shell.context import Context, encodable
from llmos.shell.render import clean_text


class TextOut(Protocol):
    """Takes a text piece by piece."""

    def write(self, text: str) -> None: ...

    def pause(self) -> None:
        """Somebody else is going to print: leave a whole line behind."""

    def close(self) -> None:
        """The text has ended. Another may follow."""


def shows_markdown(ctx: Context) -> bool:
    """Can stdout show more than plain text, and does its user want it to?"""
    plain = os.environ.get("NO_COLOR", "") or os.environ.get("TERM", "dumb") == "dumb"
    return ctx.stdout_is_terminal and not plain


def text_out(ctx: Context, markdown: bool) -> TextOut:
    return MarkdownText() if markdown else PlainText(ctx)


class PlainText:
    """Nothing is added and nothing taken away, but what could drive a terminal."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._at_line_start = True

    def write(self, text: str) -> None:
        if self._ctx.stdout_is_terminal:
            text = clean_text(text)
        sys.stdout.write(encodable(text, sys.stdout.encoding))
        sys.stdout.flush()
        self._at_line_start = text.endswith("\n") if text else self._at_line_start

    def pause(self) -> None:
        if not self._at_line_start and self._ctx.stdout_is_terminal:
            print(flush=True)
            self._at_line_start = True

    def close(self) -> None:
        self.pause()


class MarkdownText:
    """Markdown in colours, on the terminal that stdout is."""

    def __init__(self) -> None:
        # Here: what shows no markdown does not wait for this.
        from llmos.shell.markdown import Markdown
        from llmos.shell.paper import Paper

        def encode(text: str) -> str:
            return encodable(text, sys.stdout.encoding)

        self._markdown = Markdown(Paper(_write, _terminal_size), encode)

    def write(self, text: str) -> None:
        self._markdown.write(clean_text(text))

    def pause(self) -> None:
        self._markdown.pause()

    def close(self) -> None:
        self._markdown.close()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _terminal_size() -> tuple[int, int]:
    """Columns and lines; what nobody says is as it was for forty years."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return 80, 24
    return size.columns or 80, size.lines or 24
