"""What a request asks for, as arguments of `infer`; and what becomes of records. Plain values."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmos.services.engine.arguments import ENGINE_ARGS
from llmos.services.gateway import answers, asked, toolcalls
from llmos.services.gateway.answers import Gathered
from llmos.services.gateway.errors import ApiError, api_error
from llmos.services.gateway.turnstile import Turnstile
from llmos.services.programs.infer import Infer

Record = dict[str, Any]


def chat(**more: Any) -> asked.Asked:
    return asked.chat({"model": "m", "messages": [{"role": "user", "content": "hi"}], **more})


def completion(**more: Any) -> asked.Asked:
    return asked.completion({"model": "m", "prompt": "hi", **more})


def wrong(understand: Any, **request: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        understand(**request)
    assert caught.value.status == 400
    return caught.value


def as_infer(made: asked.Asked) -> Any:
    """The arguments as the program has them: each name is one of its own."""
    return Infer.Args(**made.args, **(made.prompts[0] if made.prompts else {}))


# ---- requests ----


def test_every_argument_is_one_of_infer() -> None:
    everything = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": 1, "repetition_penalty": 1.1, "ignore_eos": True, "n": 2, "seed": 3,
        "stop": ["a"], "logit_bias": {"5": -3}, "adapter": "a", "use_beam_search": True,
    }  # fmt: skip
    made = as_infer(chat(**everything, logprobs=True, top_logprobs=2, max_tokens=7, tools=[
        {"type": "function", "function": {"name": "f"}}]))  # fmt: skip
    assert (made.logprobs, made.max_tokens, made.beams, made.n) == (2, 7, 2, 2)
    assert made.messages == [{"role": "user", "content": "hi"}]
    assert made.tools[0]["function"]["name"] == "f"
    assert made.adapter == "a"
    made = as_infer(completion(**everything, logprobs=2, echo=True))
    assert (made.prompt, made.raw, made.prompt_logprobs) == ("hi", True, 2)
    assert "keep_alive_s" in ENGINE_ARGS  # and is nobody's to say over HTTP


def test_defaults_are_those_of_openai() -> None:
    made = as_infer(chat())
    assert (made.temperature, made.top_p, made.top_k, made.max_tokens) == (1, 1, 0, 4096)
    assert as_infer(completion()).max_tokens == 16
    assert as_infer(chat(temperature=None, max_tokens=None)).temperature == 1


@pytest.mark.parametrize(
    ("prompt", "made"),
    [
        ("a", [{"prompt": "a"}]),
        (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]),
        ([1, 2], [{"prompt_ids": [1, 2]}]),
        ([[1, 2], [3]], [{"prompt_ids": [1, 2]}, {"prompt_ids": [3]}]),
        (["a", [3]], [{"prompt": "a"}, {"prompt_ids": [3]}]),
    ],
)
def test_a_prompt_is_texts_or_ids(prompt: Any, made: list[Record]) -> None:
    assert completion(prompt=prompt).prompts == made


@pytest.mark.parametrize("prompt", [[], [[]], {}, 3, [1.5], [True], [[1, "a"]], [-1]])
def test_and_nothing_else(prompt: Any) -> None:
    assert wrong(completion, prompt=prompt).param


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"schema": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "strict": True, "schema": {"type": "object"}}}},
            {"schema": {"type": "object"}},
        ),
        ({"guided_json": '{"type": "array"}'}, {"schema": {"type": "array"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"regex": "b"}}, {"regex": "b"}),
    ],
)  # fmt: skip
def test_the_form_of_an_answer(more: Record, made: Record) -> None:
    args = chat(**more).args
    assert {k: args[k] for k in ("schema", "regex", "choice") if k in args} == made


def test_messages_are_as_templates_have_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    assert chat(messages=messages).args["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [
            {**call, "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]  # fmt: skip


def test_what_is_unknown_is_named_with_the_nearest() -> None:
    error = wrong(chat, temp=1)
    assert error.param == "temp"
    assert "temperature" in error.message
    assert wrong(chat, messages=[{"role": "user", "content": "x", "mood": 1}]).param == (
        "messages[0].mood"
    )


def test_tiers_are_classes_and_priorities_nice() -> None:
    made = chat(service_tier="flex", priority=-3)
    assert made.options == {"nice": -3, "cls": "batch"}
    assert chat().options == {"nice": 0, "cls": ""}


def test_tools_that_must_not_be_called_are_not_told() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert chat(tools=[tool]).tools == [tool]
    assert "tools" not in chat(tools=[tool], tool_choice="none").args
    assert wrong(chat, tools=[tool], tool_choice="required").param == "tool_choice"


# ---- calls of tools ----

TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [{"a": 1}]),
        ('<tool_call>[{"name": "add", "arguments": {}}]</tool_call>', [{}]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
         '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>', [{"a": 1}, {"a": 2}]),
        ('I think <tool_call>{"name": "add", "arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "add", "arguments": "x"}</tool_call>', []),
        ('<tool_call>{"name": "add"', []),
        ("plain", []),
    ],
)  # fmt: skip
def test_calls_of_tools_are_read_only_where_there_is_no_doubt(
    text: str, calls: list[Record]
) -> None:
    found = toolcalls.calls_of(text, TOOLS)
    assert [json.loads(c["function"]["arguments"]) for c in found] == calls
    assert toolcalls.calls_of(text, []) == []


def test_what_may_become_a_call_is_held_back() -> None:
    assert all(map(toolcalls.may_be_calls, ("", "<", " <tool_", "<tool_call>{")))
    assert not any(map(toolcalls.may_be_calls, ("a", "<b", "x <tool_call>")))


# ---- records ----


def entry(id: int, text: str, value: float | None, *top: tuple[str, float]) -> Record:
    tops = [{"id": 0, "text": t, "logprob": p} for t, p in top]
    return {"id": id, "text": text, "logprob": value, "top": tops}


def test_records_become_answers() -> None:
    found = Gathered(2)
    for record in (
        {"kind": "note", "text": "loading"},
        {"kind": "text", "text": "a", "tokens": [1], "index": 0},
        {"kind": "text", "text": "x", "tokens": [2], "index": 1},
        {"kind": "text", "text": "b", "tokens": [3], "index": 0},
    ):
        found.add(record)
    found.end({"tokens": 3, "prompt_tokens": 4, "cached_tokens": 2, "finish_reason": "stop",
               "choices": [{"index": 0, "finish_reason": "stop"},
                           {"index": 1, "finish_reason": "length"}]})  # fmt: skip
    assert [(a.text, a.finish_reason) for a in found.answers] == [("ab", "stop"), ("x", "length")]
    assert answers.usage([found.result, found.result]) == {
        "prompt_tokens": 8, "completion_tokens": 6, "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip


def test_the_first_token_of_a_prompt_has_a_text_and_no_log_probability() -> None:
    record = {"logprobs": [None, entry(2, "b", -1.0), entry(3, "c", -2.0)]}
    told = answers.completion_logprobs(answers.prompt_entries(record, "abc"), 0, 1)
    assert told["tokens"] == ["a", "b", "c"]
    assert told["text_offset"] == [0, 1, 2]
    assert told["token_logprobs"] == [None, -1.0, -2.0]
    assert told["top_logprobs"][0] is None


def test_the_likeliest_have_the_token_itself_and_no_infinity() -> None:
    entries: list[Record | None] = [
        entry(1, "a", -5.0, ("b", -0.1), ("c", -0.2)),
        entry(2, "d", float("-inf"), ("d", -0.3)),  # two tokens of one text
    ]
    told = answers.completion_logprobs(entries, 3, 1)
    assert told["top_logprobs"] == [{"b": -0.1, "a": -5.0}, {"d": -0.3}]
    assert told["token_logprobs"] == [-5.0, answers.IMPOSSIBLE]
    json.dumps(told, allow_nan=False)
    chat_told = answers.chat_logprobs([entry(1, "é", -1.0, ("é", -1.0))])["content"][0]
    assert chat_told["bytes"] == [195, 169]
    assert chat_told["top_logprobs"][0]["token"] == "é"


# ---- errors ----


def test_an_error_nobody_expected_tells_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    told = api_error(ValueError("secret"))
    assert told.status == 500
    assert "secret" not in told.message
    assert "secret" in capsys.readouterr().err


# ---- turns ----


def test_turns_go_to_the_more_important_first() -> None:
    asyncio.run(_more_important_first())


async def _more_important_first() -> None:
    turnstile, order = Turnstile(1, 3), list[int]()

    async def one(nice: int) -> None:
        async with turnstile.turn(nice):
            order.append(nice)

    async with turnstile.turn():
        tasks = []
        for nice in (5, 0, -5):
            tasks.append(asyncio.ensure_future(one(nice)))
            await asyncio.sleep(0)
        with pytest.raises(ApiError, match="number 4 in the queue"):
            await one(0)
    await asyncio.gather(*tasks)
    assert order == [-5, 0, 5]
    assert (turnstile.active, turnstile.waiting) == (0, 0)


def test_who_gives_up_waiting_leaves_no_hole() -> None:
    asyncio.run(_no_hole())


async def _no_hole() -> None:
    turnstile = Turnstile(1, 3)

    async def one() -> None:
        async with turnstile.turn():
            pass

    async with turnstile.turn():
        waits, gone, late = (asyncio.ensure_future(one()) for _ in range(3))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
    late.cancel()  # it may have been given its turn at this very moment
    await asyncio.gather(waits, gone, late, return_exceptions=True)
    assert (turnstile.active, turnstile.waiting) == (0, 0)
    await one()
