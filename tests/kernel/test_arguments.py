"""Arguments of programs against their schema."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmos.kernel.arguments import check
from llmos.kernel.errors import BadArgument, NoSuchThing
from llmos.services.programs.base import Program, arg, describe, save_every


class Sample(Program):
    name = "sample"
    summary = "every kind of argument"

    @dataclasses.dataclass(frozen=True)
    class Args:
        data: str = arg(help="what to read", positional=True, path=True)
        steps: int = arg(10, help="how many", minimum=1, maximum=100)
        rate: float = arg(0.5, help="how fast", minimum=0)
        loud: bool = arg(False, help="say more")
        kind: str = arg("rnn", help="which", choices=("rnn", "lstm"))
        seed: int | None = arg(None, help="of what")
        stop: list[str] = arg([], help="where")
        model: str = arg("", help="to begin with", model=True)
        save_every: str = save_every()


SCHEMA = describe(Sample)


def resolve(name: str) -> str:
    if name == "none":
        raise NoSuchThing(f"there is no model {name!r}")
    return f"/models/{name}"


def checked(**given: Any) -> dict[str, Any]:
    return check(SCHEMA, given, "/cwd", resolve)


def test_defaults_are_filled_in_and_paths_made_whole() -> None:
    assert checked(data="a/../b.txt") == {
        "data": "/cwd/b.txt", "steps": 10, "rate": 0.5, "loud": False, "kind": "rnn",
        "seed": None, "stop": [], "model": "", "save_every": "60s",
    }  # fmt: skip
    assert checked(data="/x/y")["data"] == "/x/y"


@pytest.mark.parametrize("every", ["0", 0, "0steps", "0 step"])
def test_an_interval_of_nothing_is_refused(every: Any) -> None:
    with pytest.raises(BadArgument, match=r"--save-every 0.*: an interval is at least one step"):
        checked(data="x", save_every=every)
    assert checked(data="x", save_every=7)["save_every"] == "7"


def test_values_are_taken_as_given() -> None:
    given = {"steps": 1, "rate": 2.0, "loud": True, "kind": "lstm", "seed": 3, "stop": ["a"]}
    found = checked(data="x", **given)
    assert {k: found[k] for k in given} == given
    assert isinstance(checked(data="x", rate=2)["rate"], float)
    assert checked(data="x", model="m")["model"] == "/models/m"
    with pytest.raises(NoSuchThing):
        checked(data="x", model="none")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "sample needs DATA: what to read"),
        ({"data": 3}, "DATA is text, not 3"),
        ({"data": "x", "stepz": 1}, "sample has no argument --stepz"),
        ({"data": "x", "steps": 1.5}, "--steps is a whole number, not 1.5"),
        ({"data": "x", "steps": True}, "--steps is a whole number, not True"),
        ({"data": "x", "steps": None}, "--steps is a whole number, not None"),
        ({"data": "x", "steps": 0}, "--steps is at least 1, not 0"),
        ({"data": "x", "steps": 101}, "--steps is at most 100, not 101"),
        ({"data": "x", "rate": "fast"}, "--rate is a number, not 'fast'"),
        ({"data": "x", "rate": float("nan")}, "--rate is a number, not nan"),
        ({"data": "x", "loud": 1}, "--loud is true or false, not 1"),
        ({"data": "x", "kind": "rrn"}, "--kind is one of rnn, lstm, not 'rrn'"),
        ({"data": "x", "stop": "a"}, "--stop is a list of texts, not 'a'"),
        ({"data": "x", "stop": [1]}, "--stop is a list of texts, not [1]"),
        ({"data": "x\0y"}, "DATA"),
    ],
)
def test_what_is_wrong_is_named_by_its_flag(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadArgument) as caught:
        checked(**given)
    assert says in caught.value.message


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(BadArgument) as caught:
        checked(data="x", stepz=1)
    assert caught.value.hint == "did you mean --steps?"
    with pytest.raises(BadArgument) as caught:
        checked(data="x", kind="rrn")
    assert caught.value.hint == "did you mean rnn?"


class Kept(Program):
    name = "kept"
    summary = "a time as people write it"

    @dataclasses.dataclass(frozen=True)
    class Args:
        keep_s: float = arg(300.0, help="how long", duration=True, minimum=-1)


@pytest.mark.parametrize(
    ("value", "seconds"), [("5m", 300.0), ("-1", -1.0), (0, 0.0), (90.5, 90.5), ("1h30m", 5400.0)]
)
def test_a_duration_is_kept_in_seconds(value: Any, seconds: float) -> None:
    found = check(describe(Kept), {"keep_s": value}, "/", resolve)["keep_s"]
    assert (found, type(found)) == (seconds, float)


@pytest.mark.parametrize("value", ["soon", "", True, -5.0, float("nan")])
def test_what_is_no_duration_is_named_by_its_flag(value: Any) -> None:
    with pytest.raises(BadArgument, match="--keep is"):
        check(describe(Kept), {"keep_s": value}, "/", resolve)
