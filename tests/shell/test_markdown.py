"""Markdown on a screen: how it looks, that streaming changes nothing, that no text is lost."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.shell.inline import BOLD, CODE, ITALIC, inline
from llmos.shell.markdown import Markdown
from llmos.shell.paper import Paper
from llmos.shell.render import cell_len
from support.screen import Screen

TALL = 10_000


def streamed(*pieces: str, columns: int = 60, lines: int = TALL) -> Screen:
    screen = Screen(columns, lines)
    markdown = Markdown(Paper(screen.write, screen.size))
    for piece in pieces:
        markdown.write(piece)
    markdown.close()
    return screen


def shown(text: str, columns: int = 60) -> list[str]:
    rows = streamed(text, columns=columns).rows
    assert rows[-1] == "", "the cursor is on a row of its own"
    return rows[:-1]


# ---- what it looks like ----


def test_a_text_of_every_kind() -> None:
    text = """\

# Title
Some **bold**, *italic* and `code`.

- one
- [x] two
  1. nested

> said
> > before

```python
def f():
    return 1
```
***
"""
    assert shown(text, 30) == [
        "Title",
        "Some bold, italic and code.",
        "",
        "• one",
        "• [x] two",
        "  1. nested",
        "",
        "│ said",
        "│ │ before",
        "",
        "── python ───────────────────",
        "def f():",
        "    return 1",
        "─────────────────────────────",
        "─────────────────────────────",
    ]


def test_long_lines_are_broken_at_words_and_lists_hang() -> None:
    assert shown("- a list item that is longer than its row\nand a paragraph too", 21) == [
        "• a list item that",
        "  is longer than its",
        "  row",
        "and a paragraph too",
    ]
    assert shown("x" * 45, 20) == ["x" * 19, "x" * 19, "x" * 7]


def test_chinese_is_broken_between_characters_and_no_row_begins_with_a_full_stop() -> None:
    comma, stop = "\uff0c", "\u3002"
    text = f"这是一个很长的段落{comma}需要换行{stop}" * 3
    rows = shown(text, 15)
    assert all(cell_len(row) <= 14 for row in rows)
    assert not [row for row in rows if row[0] in (comma, stop)]
    assert "".join(rows) == text


def test_a_table_is_as_wide_as_its_text_or_as_the_screen() -> None:
    table = "| a | number |\n|---|---:|\n| **x** | 1 |\n| y | 22 |\n\nafter"
    assert shown(table) == ["a │ number", "──┼───────", "x │      1", "y │     22", "", "after"]
    wide = "|a|b|\n|-|-|\n|one two three four five six|seven|\n"
    assert shown(wide, 20) == ["a           │ b", "────────────┼──────", "one two     │ seven",
                               "three four  │", "five six    │"]  # fmt: skip
    assert shown("|a|b|c|\n|-|-|-|\n|d|e|f|\n", 10) == ["a │ b │ c", "──┼───┼──", "d │ e │ f"]
    many = "|" + "word|" * 9
    assert shown(f"{many}\n|{'-|' * 9}\n", 20)[0].startswith("|word|"), "no room: the source"


def test_bars_alone_make_no_table() -> None:
    assert shown("a | b\nc | d\n") == ["a | b", "c | d"]
    assert shown("a | b") == ["a | b"]


def test_code_is_copied_as_it_was_written() -> None:
    line = "value = " + "1 + " * 20 + "1"
    screen = streamed(f"```python\n{line}\n\n  # **no markdown**\n```\n", columns=30)
    assert line in screen.text
    assert "  # **no markdown**" in screen.rows
    assert "def" in streamed("1. do\n   ```python\n   def\n   ```").text
    assert streamed("~~~\n```\n~~~\n").rows[1] == "```"


def test_a_block_of_code_that_is_not_closed_is_closed() -> None:
    assert shown("```\ncode", 10) == ["─────────", "code", "─────────"]


@pytest.mark.parametrize(
    "text",
    ["2**10 and 3**5", "a*b*c", "snake_case_name", "__init__", "*not closed", "a ** b ** c",
     r"\( x_1 + x_2 \)", "5 * 3 * 2", "[no](link", "![", "`open", "#hashtag", "~/.config", "**",
     "C:\\temp\\new", "-", "#", "1.", "====", "<b>html</b>", "&amp;", "* ", "> "],
)  # fmt: skip
def test_what_is_no_markdown_stays_as_it_is(text: str) -> None:
    expected = {"> ": "│"}.get(text, text.rstrip())
    assert shown(text) == [expected]


def test_inline_styles() -> None:
    assert inline("a **b** *c* `d`") == [
        ("a ", ""), ("b", BOLD), (" ", ""), ("c", ITALIC), (" ", ""), ("d", CODE),
    ]  # fmt: skip
    assert inline("***x***") == [("x", f"{BOLD};{ITALIC}")]
    assert inline("**a *b* c**") == [("a ", BOLD), ("b", f"{BOLD};{ITALIC}"), (" c", BOLD)]
    assert inline("``a`b``") == [("a`b", CODE)]
    assert inline(r"\*a\*") == [("*a*", "")]
    assert "".join(t for t, _ in inline("[a](b) ![c](d) [e](e)")) == "a (b) c (d) e"
    assert inline("**强调**文字") == [("强调", BOLD), ("文字", "")]


def test_what_is_open_in_the_line_that_is_being_written_is_taken_to_be_closed_later() -> None:
    for text in ("a **b", "a **b*", "a **b**"):
        assert inline(text, unfinished=True) == [("a ", ""), ("b", BOLD)]
    assert inline("a **", unfinished=True) == [("a ", "")]
    assert inline("a `b", unfinished=True) == [("a ", ""), ("b", CODE)]
    assert inline("a **b") == [("a **b", "")]


def test_a_line_of_nothing_but_openings_does_no_harm() -> None:
    text = "**a *b " * 2000
    assert "".join(t for t, _ in inline(text)) == text
    assert inline("*a **b " * 500, unfinished=True)


# ---- streaming ----


def test_text_appears_as_it_comes_and_what_stands_is_not_written_again() -> None:
    screen = Screen(40, 24)
    markdown = Markdown(Paper(screen.write, screen.size))
    for word in ("Once ", "upon ", "a ", "time ", "there ", "was ", "a ", "wide "):
        markdown.write(word)
        assert screen.rows[-1].endswith(word.strip())
    markdown.write("river\nand")
    assert screen.rows == ["Once upon a time there was a wide river", "and"]
    assert screen.changes_of_old_rows == 0


def test_of_a_paragraph_only_a_word_that_moves_is_drawn_again() -> None:
    written: list[str] = []
    screen = Screen(30, 24)

    def write(text: str) -> None:
        written.append(text)
        screen.write(text)

    markdown = Markdown(Paper(write, screen.size))
    text = "the quick brown fox jumps over the lazy dog " * 10
    for c in text:
        markdown.write(c)
    markdown.close()
    assert " ".join(screen.rows).split() == text.split()
    assert screen.changes_of_old_rows == 0
    assert sum(map(len, written)) < 3 * len(text)


PIECES = st.lists(
    st.sampled_from(
        ["word", "a", "**", "*", "_", "`", "```", "\n", "\n\n", " ", "  ", "- ", "1. ", "# ", "|",
         "|-|-|\n", "| a | b |\n", "> ", "~~", "中文", "\uff0c", "é", "👍", "\\", "[x](y)", "---",
         "\t", "longerwordthanothers", "==", "~~~"]
    ),
    max_size=40,
)  # fmt: skip


@pytest.mark.slow
@given(PIECES, st.integers(3, 50), st.randoms())
def test_streamed_and_written_at_once_look_the_same(
    pieces: list[str], columns: int, random
) -> None:  # type: ignore[no-untyped-def]
    text = "".join(pieces)
    cuts = sorted({0, len(text), *(random.randrange(len(text) + 1) for _ in range(9))})
    in_pieces = streamed(*(text[a:b] for a, b in pairwise(cuts)), columns=columns)
    assert in_pieces.rows == streamed(text, columns=columns).rows
    by_character = streamed(*text, columns=columns)
    assert by_character.rows == in_pieces.rows


def letters(text: str) -> list[str]:
    return re.findall(r"[^\W_]", text)


def is_subsequence(some: list[str], all_: list[str]) -> bool:
    rest = iter(all_)
    return all(c in rest for c in some)


@pytest.mark.slow
@given(PIECES, st.integers(2, 40), st.integers(1, 6))
def test_no_text_is_lost_on_a_small_screen(pieces: list[str], columns: int, lines: int) -> None:
    screen = streamed(*pieces, columns=columns, lines=lines)
    assert is_subsequence(letters("".join(pieces)), letters(" ".join(screen.rows)))


@pytest.mark.slow
@given(PIECES, st.integers(8, 40), st.integers(4, 39), st.integers(0, 40))
def test_no_text_is_lost_when_the_terminal_gets_narrower(
    pieces: list[str], columns: int, after: int, at: int
) -> None:
    screen = Screen(columns, 30)
    markdown = Markdown(Paper(screen.write, screen.size))
    for i, piece in enumerate(pieces):
        if i == at:
            screen.narrow(min(columns, after))
        markdown.write(piece)
    markdown.close()
    assert is_subsequence(letters("".join(pieces)), letters("".join(screen.rows)))


@pytest.mark.slow
@given(PIECES, st.integers(0, 40))
def test_a_note_in_the_midst_loses_nothing(pieces: list[str], at: int) -> None:
    screen = Screen(40, 30)
    markdown = Markdown(Paper(screen.write, screen.size))
    for i, piece in enumerate(pieces):
        if i == at:
            markdown.pause()
            screen.write("=\n")
        markdown.write(piece)
    markdown.close()
    assert is_subsequence(letters("".join(pieces)), letters("".join(screen.rows)))


def test_a_note_breaks_a_line_in_two() -> None:
    screen = Screen(40, 30)
    markdown = Markdown(Paper(screen.write, screen.size))
    markdown.write("Once **upon")
    markdown.pause()
    screen.write("(a note)\n")
    markdown.write(" a** time\nthere")
    markdown.close()
    assert screen.rows == ["Once upon", "(a note)", "a time", "there", ""]


def test_a_table_longer_than_the_screen_keeps_its_widths() -> None:
    lines = ["|a|b|", "|-|-|", *(f"|{'x' * min(i, 12)}|{i}|" for i in range(1, 30))]
    screen = streamed(*(line + "\n" for line in lines), lines=10)
    body = [row for row in screen.rows if row]
    assert len({row.index("│") for row in body if "│" in row}) == 1
    numbers = [row.split("│")[1].strip() for row in body if row.startswith("x")]
    assert [int(n) for n in numbers if n] == list(range(1, 30))


def test_a_terminal_without_these_characters_gets_others() -> None:
    from llmos.shell.render import ascii_only

    screen = Screen(20, 20)
    markdown = Markdown(Paper(screen.write, screen.size), ascii_only)
    markdown.write("- one\n> two\n\n|a|b|\n|-|-|\n```\nx\n```\n")
    markdown.close()
    assert all(row.isascii() for row in screen.rows)
    assert screen.rows[:2] == ["* one", "| two"]
