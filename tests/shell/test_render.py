"""Values as people read them."""

from __future__ import annotations

import pytest

from llmos.shell.render import (
    Column,
    ascii_only,
    bar,
    cell_len,
    clean,
    clean_text,
    count,
    duration,
    fit,
    number,
    size,
    table,
)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0"), (1023, "1023"), (1024, "1.0K"), (812 * 1024, "812K"), (1.2 * 2**30, "1.2G"),
     (999 * 2**20, "999M"), (1023 * 2**20, "1.0G"), (None, "-")],
)  # fmt: skip
def test_sizes_are_short_and_binary(nbytes: float | None, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (9.94, "9.9s"), (12, "12s"), (185, "3:05"), (3723, "1:02:03"),
     (2 * 86400 + 3 * 3600, "2d03h"), (None, "-")],
)  # fmt: skip
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (950, "950"), (15_200, "15.2k"), (1.1e9, "1.1B"), (999_600, "1.0M")]
)
def test_counts_are_short(n: float, text: str) -> None:
    assert count(n) == text


@pytest.mark.parametrize(("value", "text"), [(3.0, "3"), (3.41234, "3.412"), (1e-5, "1e-05")])
def test_metrics_have_no_noise(value: float, text: str) -> None:
    assert number(value) == text


def test_a_table_shrinks_the_columns_that_may_and_fits() -> None:
    columns = (Column("PID", right=True), Column("NAME", shrink=4), Column("REASON", shrink=6))
    lines = table(columns, [("1", "a-very-long-name", "waits for memory on cpu0")], 24)
    assert all(cell_len(line) <= 24 for line in lines)
    assert lines[1] == "  1 a-very-long-… waits…"
    assert table(columns, [("1", "a-very-long-name", "x")])[1] == "  1 a-very-long-name x"


def test_wide_characters_count_as_two_columns() -> None:
    assert cell_len(fit("模型模型", 5)) == 5


def test_what_others_wrote_cannot_drive_the_terminal() -> None:
    assert "\x1b" not in clean("a\x1b[2Jb\nc")
    assert clean_text("a\x1b[31mb\n\tc\r") == "a[31mb\n\tc"


def test_a_terminal_without_utf8_gets_ascii() -> None:
    assert ascii_only(bar(0.5, 4) + "…") == "##..~"
    assert ascii_only("模").isascii()


def test_a_bar_never_leaves_its_width() -> None:
    assert [len(bar(x, 10)) for x in (-1, 0, 0.33, 1, 7)] == [10] * 5
