"""Sizes as people write them."""

from __future__ import annotations

import pytest

from llmos.kernel.errors import BadArgument
from llmos.kernel.units import Interval, parse_bytes, parse_duration, parse_interval


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("1073741824", 2**30), ("64 KiB", 65536),
     ("1.5g", 3 * 2**29), ("1.5gb", 1_500_000_000), ("2t", 2 * 2**40), ("24G", 24 * 2**30),
     ("8Gi", 2**33), ("7b", 7), ("0", 0)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "8iB", "-1", "8XB", "eight", "1e9", "8GiB!"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(BadArgument, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [("500", 500, 0), (500, 500, 0), ("500steps", 500, 0), ("1 step", 1, 0), ("90s", 0, 90),
     ("10min", 0, 600), ("1.5m", 0, 90), ("2h", 0, 7200), ("0", 0, 0), (" 10 MIN ", 0, 600)],
)  # fmt: skip
def test_an_interval_is_in_steps_or_in_time(text: str | int, steps: int, seconds: float) -> None:
    assert parse_interval(text) == Interval(steps, seconds)


@pytest.mark.parametrize(
    ("text", "says"),
    [("soon", "no interval"), ("", "no interval"), ("-5", "no interval"),
     ("1.5", "steps are whole"), ("2.5steps", "steps are whole"), ("3 parsecs", "'parsecs'"),
     ("0.5s", "at least 1s"), ("0min", "at least 1s"), ("10min 5s", "no interval")],
)  # fmt: skip
def test_what_is_no_interval_is_said(text: str, says: str) -> None:
    with pytest.raises(BadArgument, match=says) as caught:
        parse_interval(text)
    assert "500steps, 90s, 10min" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("0", 0), ("-1", -1), ("300", 300), (300, 300), (2.5, 2.5), ("1h30m", 5400),
     ("1.5s", 1.5), ("300ms", 0.3), ("2d", 172_800), (" 10M ", 600), ("-5m", -1), ("-0", 0)],
)  # fmt: skip
def test_a_duration_as_people_write_it(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "5x", "5 m", "soon", "1h 30m", "--1", "5m3", "1e3", "inf"]
)
def test_what_is_no_duration_is_said(text: str) -> None:
    with pytest.raises(BadArgument, match="is no time") as caught:
        parse_duration(text)
    assert "30s, 5m, 1h30m" in caught.value.hint
