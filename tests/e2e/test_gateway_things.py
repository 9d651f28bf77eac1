"""What the gateway keeps: files, batches, fine-tunings, responses; by the `openai` package."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from support.gateway import EMBED, NEW_ENGINE, Served, fields, refused, run_async, until

pytestmark = pytest.mark.slow

new_engine = pytest.mark.skipif(not NEW_ENGINE, reason="for the engine that batches")
embed = pytest.mark.skipif(not EMBED, reason="for the program `embed`")

# A fine-tuning of milliseconds.
QUICK = {"llmos": {"method": "full", "dtype": "float32", "threads": 1, "context": 64}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.end()


@pytest.fixture(scope="module")
def api(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def jsonl(*rows: Any) -> io.BytesIO:
    file = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
    file.name = "rows.jsonl"
    return file


# ---- files ----


def test_a_file_is_kept_listed_read_and_deleted(api: OpenAI) -> None:
    content = b'{"a": 1}\n' * 1000
    made = api.files.create(file=("my.jsonl", content), purpose="batch")
    assert (made.filename, made.bytes, made.purpose) == ("my.jsonl", len(content), "batch")
    assert api.files.retrieve(made.id) == made
    assert made.id in [f.id for f in api.files.list()]
    assert made.id not in [f.id for f in api.files.list(purpose="fine-tune")]
    assert api.files.content(made.id).read() == content
    assert api.files.delete(made.id).deleted
    assert refused(openai.NotFoundError, api.files.retrieve, file_id=made.id)["code"] == "not_found"


def test_a_list_has_pages(api: OpenAI) -> None:
    made = [api.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(5)]
    found = [f.id for f in api.files.list(limit=2)]  # as many requests as it takes
    assert set(made) <= set(found)
    assert len(found) == len(set(found))
    for name in made:
        api.files.delete(name)


@pytest.mark.parametrize("name", ["nope", "../../kernel.log", "file-" + "0" * 24])
def test_what_is_no_file_is_not_found(api: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError):
        api.files.content(name)


def test_a_purpose_that_nothing_has_is_refused(api: OpenAI) -> None:
    error = refused(openai.BadRequestError, api.files.create, file=b"x", purpose="vision")
    assert error["param"] == "purpose"


# ---- batches ----


def request(number: int, **more: Any) -> dict[str, Any]:
    body = {**fields(), "prompt": f"{number} the cat", **more}
    return {"custom_id": f"n{number}", "method": "POST", "url": "/v1/completions", "body": body}


def until_ended(api: OpenAI, name: str) -> Any:
    ended = ("completed", "failed", "cancelled", "expired")
    until(lambda: api.batches.retrieve(name).status in ended, "the batch to end")
    return api.batches.retrieve(name)


def rows_of(api: OpenAI, name: str | None) -> dict[str, Any]:
    assert name is not None
    rows = [json.loads(line) for line in api.files.content(name).text.splitlines()]
    return {row["custom_id"]: row["response"] for row in rows}


def test_a_batch_is_answered_like_requests(api: OpenAI) -> None:
    wrong = {**request(7), "body": {**fields(temperature=9), "prompt": "x"}}
    file = api.files.create(file=jsonl(*map(request, range(5)), wrong), purpose="batch")
    made = api.batches.create(input_file_id=file.id, endpoint="/v1/completions",
                              completion_window="24h", metadata={"for": "a test"})  # fmt: skip
    assert made.status == "validating"
    done = until_ended(api, made.id)
    assert done.status == "completed"
    assert done.request_counts.model_dump() == {"total": 6, "completed": 5, "failed": 1}
    assert done.metadata == {"for": "a test"}
    answers = rows_of(api, done.output_file_id)
    for number in range(5):
        alone = api.completions.create(prompt=f"{number} the cat", **fields())
        assert answers[f"n{number}"]["status_code"] == 200
        assert answers[f"n{number}"]["body"]["choices"][0]["text"] == alone.choices[0].text
    failed = rows_of(api, done.error_file_id)["n7"]
    assert failed["status_code"] == 400
    assert failed["body"]["error"]["param"] == "temperature"
    assert made.id in [b.id for b in api.batches.list()]


def test_damaged_lines_fail_a_batch_before_it_begins(api: OpenAI) -> None:
    lines = [request(0), "text", request(0), {**request(1), "url": "/v1/chat/completions"}]
    file = api.files.create(file=jsonl(*lines), purpose="batch")
    made = api.batches.create(input_file_id=file.id, endpoint="/v1/completions",
                              completion_window="24h")  # fmt: skip
    done = until_ended(api, made.id)
    assert done.status == "failed"
    assert [e.line for e in done.errors.data] == [2, 3, 4]
    assert "also that of line 1" in done.errors.data[1].message


@pytest.mark.long
def test_a_batch_goes_on_after_its_server_died_and_can_be_cancelled(
    served: Served, api: OpenAI
) -> None:
    slow = [request(n, model="long", max_tokens=60) for n in range(60)]
    endless = [request(99, model="long", max_tokens=8000, ignore_eos=True)] if NEW_ENGINE else []
    file = api.files.create(file=jsonl(*slow, *endless), purpose="batch")
    made = api.batches.create(input_file_id=file.id, endpoint="/v1/completions",
                              completion_window="24h")  # fmt: skip
    output = served.home / "gateway" / "batches" / made.id / "output.jsonl"

    def count() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    until(lambda: count() >= 3, "some answers")
    assert {p["class"] for p in served.live()} == {"idle"}
    os.kill(served.server_pid, signal.SIGKILL)
    before = count()
    until(lambda: count() > before, "more answers, by the next server")
    cancelled = api.batches.cancel(made.id)
    assert cancelled.status == "cancelling"
    done = until_ended(api, made.id)
    assert done.status == "cancelled"
    served.until_live(0)
    answers = rows_of(api, done.output_file_id)
    lines = api.files.content(done.output_file_id).text.splitlines()
    assert len(lines) == len(answers)  # nothing was asked twice
    assert done.request_counts.completed == len(answers) < 60
    assert refused(openai.BadRequestError, api.batches.cancel, batch_id=made.id)


# ---- fine-tuning ----


def chats(count: int = 20) -> io.BytesIO:
    return jsonl(*(
        {"messages": [{"role": "user", "content": f"Who is {n}?"},
                      {"role": "assistant", "content": [{"type": "text", "text": f"Number {n}."}]}]}
        for n in range(count)
    ))  # fmt: skip


def test_a_model_is_fine_tuned_and_answers(api: OpenAI) -> None:
    file = api.files.create(file=chats(), purpose="fine-tune")
    job = api.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix="taught", seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        extra_body=QUICK,
    )  # fmt: skip
    assert job.status in ("validating_files", "queued", "running")
    until(
        lambda: api.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), "its end"
    )
    done = api.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.seed) == ("succeeded", "taught", 3)
    assert "taught" in [m.id for m in api.models.list()]
    assert api.completions.create(prompt="Who", **fields(model="taught")).choices
    events = list(api.fine_tuning.jobs.list_events(job.id, limit=3))
    assert events[0].message == "New fine-tuned model created: taught"
    assert events[-1].message.startswith("Created")
    losses = [e.data["train_loss"] for e in events if e.type == "metrics"]  # type: ignore[index]
    assert len(losses) >= 4
    assert job.id in [j.id for j in api.fine_tuning.jobs.list()]
    again = refused(openai.BadRequestError, api.fine_tuning.jobs.create, model="tiny",
                    training_file=file.id, suffix="taught")  # fmt: skip
    assert "taught" in again["message"]


@pytest.mark.long
def test_a_fine_tuning_is_paused_resumed_and_cancelled(served: Served, api: OpenAI) -> None:
    file = api.files.create(file=chats(200), purpose="fine-tune")
    extra = {"llmos": {**QUICK["llmos"], "save_every": "2", "epochs": 1000}}
    job = api.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix="endless", extra_body=extra
    )
    jobs = api.fine_tuning.jobs
    until(lambda: jobs.checkpoints.list(job.id).data, "a checkpoint")
    checkpoint = jobs.checkpoints.list(job.id).data[0]
    assert checkpoint.fine_tuned_model_checkpoint == "endless"
    assert checkpoint.step_number > 0
    assert jobs.pause(job.id).status == "paused"
    assert jobs.retrieve(job.id).status == "paused"
    assert jobs.resume(job.id).status == "running"
    assert jobs.cancel(job.id).status == "cancelled"
    served.until_live(0, "finetune")
    assert refused(openai.BadRequestError, jobs.cancel, fine_tuning_job_id=job.id)
    assert jobs.list_events(job.id).data[0].message == "The job was cancelled"


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("training_file", {"training_file": "file-" + "0" * 24}),
        ("validation_file", {"validation_file": "x"}),
        ("hyperparameters.n_epochs", {"hyperparameters": {"n_epochs": "many"}}),
        ("method.type", {"method": {"type": "dpo"}}),
        ("llmos.out", {"extra_body": {"llmos": {"out": "x"}}}),
        ("model", {"model": "nope"}),
    ],
)
def test_a_job_that_cannot_be_is_refused(api: OpenAI, param: str, more: dict[str, Any]) -> None:
    file = api.files.create(file=chats(), purpose="fine-tune")
    with pytest.raises(openai.APIStatusError) as caught:
        api.fine_tuning.jobs.create(**{"model": "tiny", "training_file": file.id, **more})
    assert caught.value.status_code in (400, 404)
    error = caught.value.body
    assert isinstance(error, dict)
    assert error["param"] == param or param == "training_file"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("x", "Line 2"),
        ({"messages": [{"role": "king", "content": "x"}]}, "a role is"),
        ({"messages": "x"}, "messages is a list"),
        ({"text": "x"}, "messages is missing"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weights"),
    ],
)
def test_a_line_that_teaches_nothing_is_named(api: OpenAI, row: Any, why: str) -> None:
    first = json.loads(chats(1).getvalue())
    file = api.files.create(file=jsonl(first, row), purpose="fine-tune")
    error = refused(openai.BadRequestError, api.fine_tuning.jobs.create, model="tiny",
                    training_file=file.id)  # fmt: skip
    assert error["code"] == "invalid_training_file"
    assert why in error["message"]
    assert "Line 2" in error["message"]


# ---- responses ----


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "temperature": 0, "max_output_tokens": 8, **more}


def test_a_response_is_kept_and_found_again(api: OpenAI) -> None:
    made = api.responses.create(input="the cat", instructions="be brief", **ask())
    assert made.output_text
    assert made.status in ("completed", "incomplete")
    if made.status == "incomplete":
        assert made.incomplete_details is not None
        assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    found = api.responses.retrieve(made.id)
    assert found.output_text == made.output_text
    (item,) = api.responses.input_items.list(made.id).data
    assert item.content[0].text == "the cat"  # type: ignore[union-attr]
    api.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(made.id)


def test_a_response_that_is_not_to_be_kept_is_not(api: OpenAI) -> None:
    made = api.responses.create(input="the cat", store=False, **ask())
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(made.id)


def test_a_streamed_response_has_the_events_in_their_order(api: OpenAI) -> None:
    cut = api.responses.create(input="the cat", **ask())
    stop = {"stop": cut.output_text[4]}  # the package wants one that is complete
    whole = api.responses.create(input="the cat", extra_body=stop, **ask())
    assert (cut.status, whole.status) == ("incomplete", "completed")
    request: Any = {"input": "the cat", "extra_body": stop, **ask()}
    with api.responses.stream(**request) as stream:  # and checks the order
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    raw = list(api.responses.create(stream=True, **request))
    assert [e.sequence_number for e in raw] == list(range(len(raw)))
    assert "".join(e.delta for e in raw if e.type == "response.output_text.delta") == (
        whole.output_text
    )


def test_an_async_response(served: Served) -> None:
    async def go(client: AsyncOpenAI) -> tuple[str, str]:
        whole = await client.responses.create(input="the cat", **ask())
        text = ""
        async for event in await client.responses.create(input="the cat", stream=True, **ask()):
            if event.type == "response.output_text.delta":
                text += event.delta
        return whole.output_text, text

    whole, streamed = run_async(served, go)
    assert whole == streamed


@new_engine
def test_the_next_turn_names_the_one_before(api: OpenAI) -> None:
    first = api.responses.create(input="the cat", **ask())
    second = api.responses.create(input="the dog", previous_response_id=first.id, **ask())
    messages: Any = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "the dog"},
    ]
    chat = api.chat.completions.create(messages=messages, **fields())
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None
    assert chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("input", {"input": []}),
        ("input[0].type", {"input": [{"type": "image_generation_call"}]}),
        ("background", {"background": True}),
        ("text.format.type", {"text": {"format": {"type": "xml"}}}),
        ("include", {"include": ["web_search_call.results"]}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("temperatur", {"extra_body": {"temperatur": 1}}),
    ],
)
def test_a_wrong_parameter_of_a_response_is_named(
    api: OpenAI, param: str, more: dict[str, Any]
) -> None:
    error = refused(openai.BadRequestError, api.responses.create, **{**ask(), "input": "x", **more})
    assert error["param"] == param


def test_a_response_after_one_that_is_not_there(api: OpenAI) -> None:
    refused(openai.NotFoundError, api.responses.create, input="x",
            previous_response_id="resp_" + "0" * 24, **ask())  # fmt: skip


# ---- embeddings ----


@embed
def test_embeddings_in_both_forms(api: OpenAI) -> None:
    texts = ["the cat", "the dog", "the cat"]
    plain = api.embeddings.create(model="tiny", input=texts, encoding_format="float")
    coded = api.embeddings.create(model="tiny", input=texts)  # base64, says the package
    assert [e.index for e in plain.data] == [0, 1, 2]
    assert plain.data[0].embedding == plain.data[2].embedding != plain.data[1].embedding
    assert coded.data[0].embedding == pytest.approx(plain.data[0].embedding)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1, abs=1e-3)
    assert plain.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("param", "more"),
    [("input", {"input": {}}), ("dimensions", {"dimensions": 3}), ("model", {"model": "nope"})],
)
def test_a_wrong_parameter_of_embeddings_is_named(
    api: OpenAI, param: str, more: dict[str, Any]
) -> None:
    if param == "model" and not EMBED:
        pytest.skip("for the program `embed`")
    with pytest.raises(openai.APIStatusError) as caught:
        api.embeddings.create(**{"model": "tiny", "input": "x", **more})
    assert caught.value.body["param"] == param  # type: ignore[index]
