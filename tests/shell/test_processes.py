"""Which process a name means: what acts finds who lives, what looks finds who made the model."""

from __future__ import annotations

from typing import Any, cast

import pytest

from llmos.kernel.errors import BadArgument, NoSuchProcess
from llmos.shell.client import Client
from llmos.shell.processes import find_pid, look_up_pid


class Table:
    """A client that knows a process table and nothing else."""

    def __init__(self, *rows: tuple[int, str, str]) -> None:
        self.rows: list[dict[str, Any]] = [
            {"pid": pid, "name": "mine", "role": role, "state": state} for pid, role, state in rows
        ]

    def ps(self, all: bool = False) -> list[dict[str, Any]]:
        return [p for p in self.rows if all or p["state"] != "exited"]


def both(*rows: tuple[int, str, str]) -> tuple[int, int]:
    """(the one to act on, the one to look at)"""
    client = cast(Client, Table(*rows))
    return find_pid(client, "mine"), look_up_pid(client, "mine")


def test_a_training_is_looked_at_though_a_run_of_its_model_ended_later() -> None:
    ended = [(2, "process", "exited"), (4, "engine", "exited"), (5, "guest", "exited")]
    assert both(*ended) == (2, 2)


def test_a_dead_training_is_not_taken_for_a_chat_with_its_model_that_lives() -> None:
    assert both((2, "process", "exited"), (4, "engine", "ready"), (5, "guest", "running")) == (5, 2)


def test_one_that_lives_goes_before_those_that_ended() -> None:
    assert both((2, "process", "exited"), (7, "process", "running")) == (7, 7)


def test_without_a_training_the_last_run_is_meant() -> None:
    assert both((5, "guest", "exited"), (6, "guest", "exited")) == (6, 6)


def test_two_that_live_are_told_apart_by_their_pids() -> None:
    client = cast(Client, Table((2, "process", "running"), (3, "process", "ready")))
    for find in (find_pid, look_up_pid):
        with pytest.raises(BadArgument, match="2 processes are named 'mine': 2, 3"):
            find(client, "mine")
        with pytest.raises(NoSuchProcess):
            find(client, "other")
