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
        other.history = session.history[:-2]
        assert other.history[0] == {"role": "user", "content": "the cat"}
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
    session = run.program._host._sessions[1]
    ids = session.ended[0].ids
    tokenizer = run.program._host._loaded.tokenizer
    assert tokenizer.decode(ids).startswith("system: be brief<end>user: the cat<end>assistant: ")


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 8, 9, 12, 14, 15, 17])
@pytest.mark.parametrize("kind", ["plain", "templated"])
def test_a_conversation_goes_on_in_the_next_engine(
    kind: str, cut: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Wherever the engine died: the next one is told the same and says the same."""
    model: Path = request.getfixturevalue(kind)
    script = [{"prompt": "the cat"}, {"set": {"temperature": 0.9, "seed": 5}},
              {"prompt": "and the dog"}, {"prompt": "again"}]  # fmt: skip
    args = {"model": str(model), "temperature": 0, "max_tokens": 4}

    def said(run: Any) -> list[dict[str, Any]]:
        return [r for r in run.ctx.records if r.get("pid") == 2]

    whole = chat(tmp_path / "whole", model)
    whole.program.admit(whole.ctx, Guest(2, "chat", args, (0, 0, 0)))
    for n, message in enumerate(script):
        whole.ctx.emit("input", pid=2, key=str(n), message=message)
        whole.program.message(whole.ctx, 2, message)
        whole.until_idle()
    records = said(whole)
    assert len(records) > 15

    again = chat(tmp_path / "again", model)
    again.program.admit(again.ctx, Guest(2, "chat", args, (0, 0, 0), records[:cut]))
    again.until_idle()
    given = {r["key"] for r in records[:cut] if r["kind"] == "input"}
    for n, message in enumerate(script):
        if str(n) not in given:
            again.ctx.emit("input", pid=2, key=str(n), message=message)
            again.program.message(again.ctx, 2, message)
            again.until_idle()

    def essence(records: list[dict[str, Any]]) -> list[Any]:
        return [(r["kind"], r.get("text"), r.get("tokens"), r.get("finish_reason"), r.get("key"))
                for r in records]  # fmt: skip

    assert essence(records[:cut] + said(again)) == essence(records)


def test_a_message_that_makes_no_work_leaves_the_chat_waiting(tmp_path: Path, plain: Path) -> None:
    """The kernel takes any message for work: it is told that there is none."""
    run = chat(tmp_path, plain)
    for message in ({"set": {"temperature": 0.5}}, {"stop": True}, {"what": 1}):
        before = len(run.ctx.guests_idle)
        run.program.message(run.ctx, 1, message)
        assert len(run.ctx.guests_idle) == before + 1, message


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("cut", ["stop", "rest", "turn", "whole"])
def test_an_answer_that_was_stopped_stays_so_in_the_next_engine(
    tokens: int, cut: str, tmp_path: Path, templated: Path
) -> None:
    """Stopped before its first token or later, and the engine dies before or after it says so."""
    args = {"model": str(templated), "temperature": 0, "max_tokens": 6}
    run = chat(tmp_path / "one", templated)
    run.program.admit(run.ctx, Guest(2, "chat", args, (0, 0, 0)))

    def give(to: Run, key: str, **message: Any) -> None:
        to.ctx.emit("input", pid=2, key=key, message=message)
        to.program.message(to.ctx, 2, message)

    give(run, "1", prompt="the cat")
    while len(run.ctx.of_kind("text", 2)) < tokens:
        run.step()
    give(run, "2", stop=True)
    records = [r for r in run.ctx.records if r["pid"] == 2]
    ends = {r["kind"]: i for i, r in enumerate(records)}
    upto = {"stop": ends["input"], "rest": ends["text"], "turn": ends["turn"]}.get(
        cut, len(records)
    )
    again = chat(tmp_path / "two", templated)
    again.program.admit(again.ctx, Guest(2, "chat", args, (0, 0, 0), records[: upto + 1]))
    again.until_idle()
    told = [*records[: upto + 1], *(r for r in again.ctx.records if r["pid"] == 2)]
    kinds = [r["kind"] for r in told]
    assert kinds.count("turn") == kinds.count("begin") == 1
    assert [r["tokens"] for r in told if r["kind"] == "text" and r["tokens"]] == [
        r["tokens"] for r in records if r["kind"] == "text" and r["tokens"]
    ]
    for each in (run, again):
        give(each, "3", prompt="and the dog")
        each.until_idle()
    new = [[r["text"] for r in each.ctx.of_kind("text", 2)][-6:] for each in (run, again)]
    assert new[0] == new[1], "the conversation is the same"
