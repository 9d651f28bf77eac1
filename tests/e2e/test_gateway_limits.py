"""Requests that get nothing: from a process that says nothing, from a quota that is used up."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from support.gateway import Served, fields, until

pytestmark = [pytest.mark.slow, pytest.mark.long]

LONG = {"model": "long", "prompt": "the cat", "max_tokens": 8000, "temperature": 0}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served("--timeout", "3", config="user_device_s = 4\nuser_window_s = 3600\n")
    yield made
    made.end()


@pytest.fixture(scope="module")
def api(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_stream_that_stands_still_is_given_up(served: Served, api: OpenAI) -> None:
    stream = iter(api.completions.create(stream=True, **LONG))
    next(stream)
    with served.client() as llmos:
        llmos.pause(served.live()[0]["pid"])
    with pytest.raises(openai.APIError, match=r"Nothing came for \d+ s: process \d+ is paused"):
        for _ in stream:
            pass
    served.until_live(0)


def test_a_quota_that_is_used_up_is_429(served: Served, api: OpenAI) -> None:
    errors: list[openai.APIStatusError] = []

    def refused() -> bool:
        try:
            api.completions.create(**{**LONG, "max_tokens": 500})
        except openai.APIStatusError as exc:
            errors.append(exc)
        return bool(errors)

    until(refused, "the quota to be used up", 180)
    (error,) = errors
    assert (error.status_code, error.code) == (429, "insufficient_quota")
    assert 0 < int(error.response.headers["retry-after"]) <= 3600
    assert "device-seconds" in error.message
    served.until_live(0)


def test_a_batch_waits_for_its_quota(served: Served, api: OpenAI) -> None:
    """It is patient: nobody at its other end gives up."""
    line = b'{"custom_id": "a", "url": "/v1/completions", "method": "POST", "body": '
    body = b'{"model": "tiny", "prompt": "x"}}\n'
    file = api.files.create(file=("in.jsonl", line + body), purpose="batch")
    made = api.batches.create(input_file_id=file.id, endpoint="/v1/completions",
                              completion_window="24h")  # fmt: skip
    (process,) = served.until_live(1)
    with served.client() as llmos:
        until(lambda: llmos.explain(process["pid"])["quota_opens_in_s"], "it to wait")
    with pytest.raises(openai.RateLimitError):  # longer than anybody else may wait
        api.completions.create(prompt="x", **fields())
    assert api.batches.retrieve(made.id).status == "in_progress"
    api.batches.cancel(made.id)
    served.until_live(0)
