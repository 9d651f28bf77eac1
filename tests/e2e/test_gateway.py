"""The gateway as its clients have it: the `openai` package, unmodified, on a real machine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from support.gateway import NEW_ENGINE, Served, fields, refused, run_async

pytestmark = pytest.mark.slow

new_engine = pytest.mark.skipif(not NEW_ENGINE, reason="for the engine that batches")

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served("--dtype", "float32")
    yield made
    made.end()


@pytest.fixture(scope="module")
def api(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


# ---- models ----


def test_models_are_those_of_the_registry(api: OpenAI) -> None:
    names = [m.id for m in api.models.list()]
    assert sorted(names) == ["long", "plain", "tiny"]
    one = api.models.retrieve("tiny")
    assert (one.id, one.object) == ("tiny", "model")
    assert one.owned_by
    assert (
        refused(openai.NotFoundError, api.models.retrieve, model="x")["code"] == "model_not_found"
    )


# ---- completions ----


def test_a_completion_is_what_llmos_run_says(served: Served, api: OpenAI) -> None:
    done = api.completions.create(prompt=PROMPT, **fields())
    said = served.machine.ok("run", "tiny", PROMPT, "--max-tokens", "8", "--temperature", "0",
                             "--dtype", "float32", "--raw")  # fmt: skip
    assert done.choices[0].text == said.rstrip("\n")
    assert done.object == "text_completion"
    assert done.usage is not None
    assert done.usage.completion_tokens == 8
    assert done.usage.total_tokens == 8 + done.usage.prompt_tokens
    assert done.choices[0].finish_reason == "length"


def test_a_stream_has_the_same_text_and_its_usage_at_the_end(api: OpenAI) -> None:
    whole = api.completions.create(prompt=PROMPT, **fields())
    chunks = list(api.completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **fields()
    ))  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert usage_of(chunks[-1]) == usage_of(whole)
    assert chunks[-1].choices == []
    assert len({c.id for c in chunks}) == 1


def test_several_prompts_are_answered_in_their_order(api: OpenAI) -> None:
    prompts = [PROMPT, "the dog", "naïve café"]
    alone = [api.completions.create(prompt=p, **fields()).choices[0].text for p in prompts]
    together = api.completions.create(prompt=prompts, **fields())
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == alone
    texts = [""] * 3
    for chunk in api.completions.create(prompt=prompts, stream=True, **fields()):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone


def test_echo_begins_with_the_prompt(api: OpenAI) -> None:
    plain = api.completions.create(prompt=PROMPT, **fields()).choices[0].text
    assert api.completions.create(prompt=PROMPT, echo=True, **fields()).choices[0].text == (
        PROMPT + plain
    )
    pieces = api.completions.create(prompt=PROMPT, echo=True, stream=True, **fields())
    assert "".join(c.choices[0].text for c in pieces) == PROMPT + plain


def test_stop_ends_before_the_text(api: OpenAI) -> None:
    whole = api.completions.create(prompt=PROMPT, **fields()).choices[0].text
    stop = whole[3]
    cut = api.completions.create(prompt=PROMPT, stop=stop, **fields()).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_the_same_seed_gives_the_same_text(api: OpenAI) -> None:
    hot = fields(temperature=1.5, seed=7)
    texts = {api.completions.create(prompt=PROMPT, **hot).choices[0].text for _ in range(3)}
    assert len(texts) == 1


def test_many_clients_at_once_get_each_their_own(served: Served) -> None:
    async def ask(client: AsyncOpenAI) -> list[str]:
        async def one(n: int) -> str:
            return (await client.completions.create(prompt=f"{n} the", **fields())).choices[0].text

        alone = [await one(n) for n in range(12)]
        assert list(await asyncio.gather(*map(one, range(12)))) == alone
        return alone

    assert len(set(run_async(served, ask))) > 1


@new_engine
def test_token_ids_are_a_prompt(api: OpenAI) -> None:
    text = api.completions.create(prompt=PROMPT, echo=True, logprobs=0, **fields())
    assert text.choices[0].logprobs is not None
    ids = _ids(PROMPT)
    by_ids = api.completions.create(prompt=ids, **fields())
    assert by_ids.choices[0].text == text.choices[0].text.removeprefix(PROMPT)
    both = api.completions.create(prompt=[ids, ids[:2]], **fields())
    assert both.choices[0].text == by_ids.choices[0].text
    assert len(both.choices) == 2


@new_engine
def test_the_log_probabilities_of_a_prompt_are_those_of_the_model(
    served: Served, api: OpenAI
) -> None:
    """What lm-eval asks for: echo, logprobs, nothing (or one token) new."""
    ids = _ids(PROMPT)
    expected = _logprobs(served, ids)
    for new in (0, 1):
        done = api.completions.create(
            model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=new, temperature=0
        )
        told = done.choices[0].logprobs
        assert told is not None
        assert told.token_logprobs is not None
        assert len(told.token_logprobs) == len(ids) + new
        assert told.token_logprobs[0] is None
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=2e-3)
        assert told.top_logprobs is not None
        for own, tops in list(zip(told.token_logprobs, told.top_logprobs, strict=True))[1:]:
            assert own <= max(tops.values())


@new_engine
def test_n_answers_to_one_prompt(api: OpenAI) -> None:
    done = api.completions.create(prompt=PROMPT, n=3, **fields(temperature=1.5, seed=3))
    assert [c.index for c in done.choices] == [0, 1, 2]
    assert len({c.text for c in done.choices}) > 1
    assert done.usage is not None
    assert done.usage.completion_tokens <= 24


@new_engine
def test_a_bias_forbids_a_token(api: OpenAI) -> None:
    whole = api.completions.create(prompt=PROMPT, logprobs=0, **fields(max_tokens=1)).choices[0]
    (first,) = _ids(whole.text)[:1]
    other = api.completions.create(prompt=PROMPT, logit_bias={str(first): -100},
                                   **fields(max_tokens=1)).choices[0]  # fmt: skip
    assert other.text != whole.text


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("suffix", {"suffix": "x"}),
        ("best_of", {"best_of": 3}),
        ("temperature", {"temperature": 3}),
        ("temperature", {"temperature": "hot"}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 0}),
        ("n", {"n": 0}),
        ("top_p", {"top_p": 1.5}),
        ("logprobs", {"logprobs": 21}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("stop", {"stop": [1]}),
        ("prompt", {"prompt": {}}),
        ("prompt[1]", {"prompt": ["a", [1, -1]]}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("priority", {"extra_body": {"priority": 20}}),
        ("min_tokens", {"extra_body": {"min_tokens": 3}}),
        ("temperatur", {"extra_body": {"temperatur": 1}}),
        ("guided_regex", {"extra_body": {"guided_json": {}, "guided_regex": "a"}}),
    ],
)
def test_a_wrong_parameter_is_named(api: OpenAI, param: str, more: dict[str, Any]) -> None:
    request = {**fields(), "prompt": "x", **more}
    assert refused(openai.BadRequestError, api.completions.create, **request)["param"] == param


def test_a_prompt_that_is_too_long_is_refused_streamed_or_not(api: OpenAI) -> None:
    for stream in (False, True):
        error = refused(openai.BadRequestError, api.completions.create, prompt="cat " * 500,
                        stream=stream, **fields())  # fmt: skip
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("name", ["nope", "/etc", "../models/tiny", "org/name", ""])
def test_what_is_no_model_of_the_registry_is_not_found(api: OpenAI, name: str) -> None:
    error = refused(openai.NotFoundError, api.completions.create, **fields(model=name), prompt="x")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


# ---- chat ----


def test_a_chat_streamed_or_not(api: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    whole = api.chat.completions.create(messages=messages, **fields())
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert whole.usage is not None
    chunks = list(api.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **fields()
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert usage_of(chunks[-1]) == usage_of(whole)


def test_an_async_chat(served: Served) -> None:
    async def ask(client: AsyncOpenAI) -> tuple[str, str]:
        messages: Any = [{"role": "user", "content": PROMPT}]
        whole = await client.chat.completions.create(messages=messages, **fields())
        text = ""
        async for chunk in await client.chat.completions.create(
            messages=messages, stream=True, **fields()
        ):
            text += chunk.choices[0].delta.content or ""
        return whole.choices[0].message.content or "", text

    whole, streamed = run_async(served, ask)
    assert whole == streamed != ""


@new_engine
def test_a_conversation_is_rendered_by_the_models_template(api: OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "the mat"},
        {"role": "user", "content": [{"type": "text", "text": "the cat"}]},
        {"role": "assistant", "content": "ran"},
        {"role": "user", "content": "the dog"},
    ]
    rendered = (
        "system: the mat<end>user: the cat<end>assistant: ran<end>user: the dog<end>assistant: "
    )
    chat = api.chat.completions.create(messages=messages, **fields())
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(_ids(rendered))


@new_engine
def test_chat_log_probabilities(api: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    done = api.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **fields())
    told = done.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert done.usage is not None
    assert len(told.content) == done.usage.completion_tokens
    for one in told.content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)  # it was greedy


@new_engine
@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "schema": {"type": "object", "properties": {"a": {"type": "integer"}},
                               "required": ["a"], "additionalProperties": False},
                },
            }
        },
    ],
)  # fmt: skip
def test_an_answer_of_a_given_form(api: OpenAI, more: dict[str, Any]) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    request = fields(max_tokens=100, temperature=1, seed=1)
    done = api.chat.completions.create(messages=messages, **request, **more)
    choice = done.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


@new_engine
def test_a_choice_and_a_regex(api: OpenAI) -> None:
    choice = api.completions.create(prompt=PROMPT, **fields(),
                                    extra_body={"guided_choice": ["red", "blue"]})  # fmt: skip
    assert choice.choices[0].text in ("red", "blue")
    regex = api.completions.create(prompt=PROMPT, **fields(),
                                   extra_body={"guided_regex": "[0-9]{3}"})  # fmt: skip
    assert regex.choices[0].text.isdigit()


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"content": "x"}]}),
        ("messages[0].role", {"messages": [{"role": "king", "content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        (
            "messages[0].content[0]",
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        ),
        ("top_logprobs", {"top_logprobs": 2}),
        ("tool_choice", {"tool_choice": "required"}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("modalities", {"modalities": ["audio"]}),
    ],
)  # fmt: skip
def test_a_wrong_parameter_of_a_chat_is_named(
    api: OpenAI, param: str, more: dict[str, Any]
) -> None:
    request = {**fields(), "messages": [{"role": "user", "content": "x"}], **more}
    assert refused(openai.BadRequestError, api.chat.completions.create, **request)["param"] == param


# ---- importance ----


def test_priority_and_tier_are_nice_and_class(served: Served, api: OpenAI) -> None:
    stream = api.completions.create(
        model="long", prompt=PROMPT, max_tokens=8000, temperature=0, stream=True,
        extra_body={"priority": 7, "service_tier": "flex"},
    )  # fmt: skip
    next(iter(stream))
    (process,) = served.live()
    assert (process["nice"], process["class"]) == (7, "batch")
    stream.close()
    served.until_live(0)


def usage_of(done: Any) -> dict[str, Any]:
    """What was spent; whether a cache had some of it is nobody's promise."""
    found: dict[str, Any] = done.usage.model_dump()
    found.pop("prompt_tokens_details")
    return found


def _ids(text: str) -> list[int]:
    from support.small_models import make_tokenizer

    return list(make_tokenizer()(text).input_ids)


def _logprobs(served: Served, ids: list[int]) -> list[float]:
    """Of each token after the first, by transformers' own forward."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(served.home / "models" / "tiny")
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(scores[n, token]) for n, token in enumerate(ids[1:])]
