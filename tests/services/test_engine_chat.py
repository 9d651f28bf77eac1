"""Chat sessions: turns, what stays in the cache between them, settings, full contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmos.services.programs.base import Guest, Report
from llmos.services.programs.engine import Engine
from support.run_program import Run, admit, make_context
from support.small_models import CONTEXT, TEMPLATE, make_llama


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("templated"), TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("plain"))


def chat(tmp_path: Path, model: Path, **args: Any) -> Run:
    run = Run.start(Engine, make_context(tmp_path, threads=1), model=str(model), dtype="float32")
    values = {"model": str(model), "temperature": 0, "max_tokens": 8, **args}
    admit(run, 1, "chat", **values)
    return run


def say(run: Run, prompt: str) -> str:
    """One turn -> its text."""
    before = len(run.ctx.text(1))
    run.program.message(run.ctx, 1, {"prompt": prompt})
    run.until_idle()
    return run.ctx.text(1)[before:]


def computed_tokens(run: Run) -> int:
    return int(sum(sum(r.shares.values()) for r in run.reports))


def test_a_session_waits_answers_and_waits_again(templated: Path, tmp_path: Path) -> None:
    run = chat(tmp_path, templated)
    assert run.ctx.guests_idle == [1]
    say(run, "the cat")
    (turn,) = run.ctx.of_kind("turn")
    assert turn["tokens"] == len(run.ctx.of_kind("text"))
    assert turn["finish_reason"] in ("stop", "length")
    assert run.ctx.guests_idle == [1, 1]
    assert not run.ctx.guests_done


@pytest.mark.parametrize("kind", ["templated", "plain"])
def test_a_later_turn_computes_only_what_is_new(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = chat(tmp_path, request.getfixturevalue(kind))
    say(run, "the cat sat on the mat and the dog ran")
    before = computed_tokens(run)
    say(run, "ok")
    turn = run.ctx.of_kind("turn")[-1]
    assert turn["prompt_tokens"] > 18, "the whole conversation is the prompt"
    assert computed_tokens(run) - before < turn["prompt_tokens"]


@pytest.mark.parametrize("kind", ["templated", "plain"])
def test_an_answer_from_the_cache_is_that_of_a_fresh_session(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    run = chat(tmp_path / "a", model)
    say(run, "the cat")
    second = say(run, "the dog")
    session = run.program._host._sessions[1]
    fresh = chat(tmp_path / "b", model)
    other = fresh.program._host._sessions[1]
    if kind == "templated":
        other._history = session._history[:-2]
        assert other._history[0] == {"role": "user", "content": "the cat"}
    else:
        first_ids = session._running[: -run.ctx.of_kind("turn")[-1]["tokens"]]
        other._running = first_ids[: -len(session.encode("the dog", special=False))]
    assert say(fresh, "the dog") == second


def test_turns_that_come_early_wait_for_their_turn(templated: Path, tmp_path: Path) -> None:
    run = chat(tmp_path, templated)
    for prompt in ("one", "two", "three"):
        run.program.message(run.ctx, 1, {"prompt": prompt})
    run.until_idle()
    assert len(run.ctx.of_kind("turn")) == 3
    assert run.ctx.guests_idle == [1, 1], "it waits before the first and after the last"


def test_stop_ends_the_answer_and_keeps_the_session(plain: Path, tmp_path: Path) -> None:
    run = chat(tmp_path, plain, max_tokens=60)
    run.program.message(run.ctx, 1, {"prompt": "the cat"})
    for _ in range(4):
        assert isinstance(run.step(), Report)
    run.program.message(run.ctx, 1, {"stop": True})
    (turn,) = run.ctx.of_kind("turn")
    assert (turn["tokens"], turn["finish_reason"]) == (4, "interrupted")
    assert say(run, " and")


def test_settings_change_from_the_next_token_on(plain: Path, tmp_path: Path) -> None:
    run = chat(tmp_path, plain)
    run.program.message(run.ctx, 1, {"set": {"max_tokens": 2, "temperature": 1.0, "seed": 3}})
    say(run, "the cat")
    assert run.ctx.of_kind("turn")[-1]["tokens"] <= 2


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"set": {"colour": "red"}}, "colour"),
        ({"set": {"temperature": -1}}, "temperature"),
        ({"set": {"stop": [1]}}, "stop"),
        ({"hello": 1}, "cannot read"),
    ],
)
def test_a_wrong_message_is_answered_with_a_line(
    message: dict[str, Any], says: str, plain: Path, tmp_path: Path
) -> None:
    run = chat(tmp_path, plain)
    run.program.message(run.ctx, 1, message)
    (note,) = run.ctx.of_kind("note", 1)
    assert says in note["text"]
    assert say(run, "the cat")


@pytest.mark.parametrize("kind", ["templated", "plain"])
def test_a_conversation_that_outgrows_the_context_goes_on(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = chat(tmp_path, request.getfixturevalue(kind))
    for _ in range(8):
        say(run, "the cat sat on the mat and the dog")
    turns = run.ctx.of_kind("turn")
    assert len(turns) == 8
    assert all(t["prompt_tokens"] + t["tokens"] <= CONTEXT for t in turns)
    assert any("outgrown" in note["text"] for note in run.ctx.of_kind("note"))


def test_a_turn_longer_than_the_context_is_refused_and_the_session_stays(
    templated: Path, tmp_path: Path
) -> None:
    run = chat(tmp_path, templated)
    say(run, "xyz " * 200)
    assert "context" in run.ctx.of_kind("note")[0]["text"]
    assert not run.ctx.of_kind("turn")
    say(run, "the cat")
    assert len(run.ctx.of_kind("turn")) == 1


def test_a_system_prompt_leads_the_conversation(templated: Path, tmp_path: Path) -> None:
    run = chat(tmp_path, templated, system="be brief")
    say(run, "the cat")
    ids = run.program._host._sessions[1].cache.ids
    tokenizer = run.program._host._loaded.tokenizer
    assert tokenizer.decode(ids).startswith("system: be brief<end>user: the cat<end>assistant: ")


def test_a_restarted_session_says_that_it_begins_anew(plain: Path, tmp_path: Path) -> None:
    run = chat(tmp_path, plain)
    args = {"model": str(plain), "temperature": 0, "max_tokens": 4}
    run.program.admit(run.ctx, Guest(2, "chat", args, (0, 0, 0), sent=7))
    assert "anew" in run.ctx.of_kind("note", 2)[0]["text"]
    run.program.message(run.ctx, 2, {"prompt": "the cat"})
    run.until_idle()
    assert run.ctx.text(2), "a new answer is sent from its first token"


def test_a_message_that_makes_no_work_leaves_the_chat_waiting(tmp_path: Path, plain: Path) -> None:
    """The kernel takes any message for work: it is told that there is none."""
    run = chat(tmp_path, plain)
    for message in ({"set": {"temperature": 0.5}}, {"stop": True}, {"what": 1}):
        before = len(run.ctx.guests_idle)
        run.program.message(run.ctx, 1, message)
        assert len(run.ctx.guests_idle) == before + 1, message
