"""The gateway under clients that go, do not read, send too much; without its kernel; with keys."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from support.gateway import Served, fields, until

pytestmark = pytest.mark.slow

LONG = {"model": "long", "prompt": "the cat", "max_tokens": 8000, "temperature": 0}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served(
        "--max-active", "3", "--max-waiting", "1", "--max-body", "64KiB", "--max-file", "1MiB",
        "--cors", "http://good.test",
    )  # fmt: skip
    yield made
    made.end()


@pytest.fixture(autouse=True)
def nobody_is_left(served: Served) -> Iterator[None]:
    yield
    served.until_live(0)


def client_of(served: Served, key: str = "none") -> OpenAI:
    return OpenAI(base_url=served.url, api_key=key, max_retries=0)


def post(path: str, body: bytes, *headers: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if not any(h.lower().startswith(("content-length", "transfer")) for h in headers):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


def answer_of(line: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """A whole answer: to its length, or to the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += line.recv(1 << 16) or _closed(data)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (r.partition(":") for r in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        body += line.recv(1 << 16) or _closed(data)
    return int(first.split()[1]), headers, body


def _closed(data: bytes) -> bytes:
    raise AssertionError(f"closed after {data!r}")


def begun(served: Served, request: dict[str, Any], receive_bytes: int = 0) -> socket.socket:
    """A connection over which a stream has begun."""
    line = socket.socket()
    if receive_bytes:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    line.settimeout(60)
    line.connect(("127.0.0.1", served.port))
    line.sendall(post("/v1/completions", json.dumps({**request, "stream": True}).encode()))
    assert line.recv(8).startswith(b"HTTP/1.1")
    return line


# ---- clients that go ----


def test_a_client_that_goes_takes_its_process_along(served: Served) -> None:
    with begun(served, LONG):
        served.until_live(1)
    served.until_live(0)


def test_so_does_one_that_waits_for_the_whole_answer(served: Served) -> None:
    with served.connect() as line:
        line.sendall(post("/v1/completions", json.dumps(LONG).encode()))
        served.until_live(1)
    served.until_live(0)


def test_all_prompts_of_a_request_end_with_its_client(served: Served) -> None:
    with begun(served, {**LONG, "prompt": ["the cat", "the dog", "a mat"]}):
        served.until_live(3)
    served.until_live(0)


def test_one_who_does_not_read_holds_nobody(served: Served) -> None:
    with begun(served, LONG, receive_bytes=4096), client_of(served) as api:
        for _ in range(3):
            assert api.completions.create(prompt="x", **fields()).choices[0].text


# ---- too much ----


def test_a_body_above_the_limit_is_refused_before_it_comes(served: Served) -> None:
    with served.connect() as line:
        line.sendall(post("/v1/completions", b"", "Content-Length: 100000"))
        status, headers, body = answer_of(line)
        assert (status, headers["connection"]) == (413, "close")
        assert json.loads(body)["error"]["code"] == "request_too_large"
        assert line.recv(1) == b""


def test_one_that_says_no_length_is_refused_while_it_comes(served: Served) -> None:
    with served.connect() as line:
        line.sendall(post("/v1/completions", b"", "Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                line.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        status, _, _ = answer_of(line)
        assert status == 413


def test_a_file_may_be_larger_and_has_a_limit_too(served: Served) -> None:
    with client_of(served) as api, pytest.raises(openai.APIStatusError) as caught:
        api.files.create(file=b"x" * (2 << 20), purpose="batch")
    assert caught.value.status_code == 413


def test_who_comes_to_a_full_queue_hears_his_place(served: Served) -> None:
    lines = [begun(served, LONG) for _ in range(3)]
    try:
        with served.connect() as waits, served.connect() as late:
            waits.sendall(post("/v1/completions", json.dumps(LONG).encode()))
            until(lambda: served.machine.json("serve", "status")["waiting"] == 1, "one to wait")
            late.sendall(post("/v1/completions", json.dumps(LONG).encode()))
            status, headers, body = answer_of(late)
            error = json.loads(body)["error"]
            assert (status, error["code"]) == (503, "queue_full")
            assert int(headers["retry-after"]) > 0
            assert "number 2 in the queue" in error["message"]
            lines.pop().close()  # there is room now
            until(lambda: served.machine.json("serve", "status")["waiting"] == 0, "nobody to wait")
    finally:
        for line in lines:
            line.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 5000,
        b'{"model": NaN}',
        b"\xff",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "seed": 1e400}',
        b'{"model": "tiny", "prompt": "a", "guided_json": {"a": ' + b"9" * 30 + b"}}",
    ],
)
def test_what_is_no_request_is_refused(served: Served, body: bytes) -> None:
    with served.connect() as line:
        line.sendall(post("/v1/completions", body))
        status, _, told = answer_of(line)
        assert status == 400
        assert set(json.loads(told)["error"]) == {"message", "type", "param", "code"}


# ---- where from ----


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.test"}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "http://good.test"}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]"}, 200),
    ],
)
def test_pages_of_others_are_refused(served: Served, headers: dict[str, str], status: int) -> None:
    request = urllib.request.Request(f"{served.url}/models", headers=headers)
    if status != 200:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == status
        caught.value.close()
        return
    with urllib.request.urlopen(request) as found:
        assert found.headers.get("Access-Control-Allow-Origin") == headers.get("Origin")


def test_health_and_metrics(served: Served) -> None:
    base = served.url.removesuffix("/v1")
    with client_of(served) as api:
        api.completions.create(prompt="x", **fields())
    with urllib.request.urlopen(f"{base}/health") as found:
        assert json.load(found) == {"status": "ok"}
    with urllib.request.urlopen(f"{base}/metrics") as found:
        text = found.read().decode()
    assert 'llmos_gateway_requests_total{endpoint="/v1/completions",status="200"}' in text
    assert "llmos_gateway_first_token_seconds_bucket" in text
    assert 'llmos_gateway_tokens_total{kind="completion"}' in text
    assert "llmos_gateway_active 0.0" in text


# ---- keys ----


def test_with_a_key_nobody_is_served_without_one(served: Served) -> None:
    key = served.machine.ok("key", "new", "mine").strip()
    try:
        assert key not in (served.home / "gateway" / "keys.json").read_text()
        for wrong in ("none", key[:-1], key + "x"):
            with (
                client_of(served, wrong) as api,
                pytest.raises(openai.AuthenticationError) as caught,
            ):
                api.models.list()
            assert caught.value.body["code"] == "invalid_api_key"  # type: ignore[index]
        with client_of(served, key) as api:
            assert api.completions.create(prompt="x", **fields()).choices
        assert [k["name"] for k in served.machine.json("key")] == ["mine"]
        assert "already" in served.machine("key", "new", "mine").stderr
    finally:
        served.machine.ok("key", "rm", "mine")
    with client_of(served) as api:
        assert api.models.list().data


# ---- what dies ----


@pytest.mark.long
def test_a_stream_outlives_the_kernel(served: Served) -> None:
    """The same text as undisturbed: nothing is lost, nothing comes twice."""
    request = {**LONG, "max_tokens": 600, "extra_body": {"ignore_eos": True}}
    with client_of(served) as api:
        calm = api.completions.create(**request).choices[0].text
        server = served.server_pid
        stream = iter(api.completions.create(stream=True, **request))
        text = next(stream).choices[0].text
        served.kill_kernel()
        served.machine.ok("boot")
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == calm
        assert served.server_pid == server
        assert api.completions.create(prompt="x", **fields()).choices


@pytest.mark.long
def test_without_a_kernel_a_request_is_told_to_come_again(served: Served) -> None:
    port = served.port
    served.kill_kernel()
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as api:
            with pytest.raises(openai.APIStatusError) as caught:
                api.completions.create(prompt="x", **fields())
            assert caught.value.status_code == 503
            assert int(caught.value.response.headers["retry-after"]) > 0
    finally:
        served.machine.ok("boot")
    until(lambda: served.machine("serve", "status").returncode == 0, "the gateway to be back")
    with client_of(served) as api:
        assert api.completions.create(prompt="x", **fields()).choices


def test_a_server_that_dies_is_started_again_on_its_port(served: Served) -> None:
    port, server = served.port, served.server_pid
    line = begun(served, LONG)
    os.kill(server, signal.SIGKILL)
    served.until_live(0)  # whose requests it served, ended with it
    line.close()
    until(lambda: _serves_anew(served, server), "another server")
    assert served.port == port


def _serves_anew(served: Served, before: int) -> bool:
    done = served.machine("serve", "status", "--json")
    return done.returncode == 0 and json.loads(done.stdout)["os_pid"] != before


# ---- the command ----


def test_a_second_gateway_says_where_the_first_is(served: Served) -> None:
    done = served.machine("serve")
    assert done.returncode == 1
    assert served.url in done.stderr
    assert "serve stop" in done.stderr


@pytest.mark.long
def test_serve_in_the_foreground_ends_with_ctrl_c(served: Served) -> None:
    served.machine.ok("serve", "stop")
    try:
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "llmos.shell", "serve", "--port", "0"],
            env={**os.environ, "LLMOS_HOME": str(served.home)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert process.stdout.readline() == f"export OPENAI_BASE_URL={url}\n"
            with urllib.request.urlopen(f"{url}/models") as found:
                assert found.status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{url}/models")
    finally:
        served.machine.ok("serve", "-d", "--port", "0", "--max-active", "3", "--max-waiting", "1")


@pytest.mark.long
def test_a_port_that_is_taken_is_one_line(served: Served) -> None:
    port = served.port
    served.machine.ok("serve", "stop")
    try:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            taken = other.getsockname()[1]
            done = served.machine("serve", "-d", "--port", str(taken))
        assert done.returncode == 1
        assert f"cannot listen on 127.0.0.1:{taken}" in done.stderr
        assert len(done.stderr.splitlines()) <= 2
        rows = {s["name"]: s["state"] for s in served.machine.json("service")}
        assert rows["gateway"] == "disabled"  # and is not tried again
    finally:
        served.machine.ok("serve", "-d", "--port", str(port))


@pytest.mark.long
def test_beyond_this_machine_a_key_is_needed(served: Served) -> None:
    port = served.port
    served.machine.ok("serve", "stop")
    try:
        done = served.machine("serve", "-d", "--host", "0.0.0.0", "--port", "0")
        assert done.returncode == 1
        assert "llmos key new" in done.stderr
    finally:
        served.machine.ok("serve", "-d", "--port", str(port))
