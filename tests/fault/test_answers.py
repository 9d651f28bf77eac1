"""Generations and conversations whose engine, kernel or connection dies: one unbroken stream."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel import protocol as p
from llmos.shell import Client
from support.real import Machine, machine, wait_until
from support.small_models import make_llama

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.long]

TOKENS = 250


@pytest.fixture(scope="module")
def m() -> Iterator[Machine]:
    with machine("--device", "cpu0:memory=2GiB") as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Slow enough to be met in the middle, and with no end of its own."""
    folder = make_llama(
        tmp_path_factory.mktemp("slow"), hidden_size=256, num_hidden_layers=4,
        max_position_embeddings=2048, eos_token_id=None,
    )  # fmt: skip
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


class Reader:
    """A client in a thread that reads one attached generation to its end."""

    def __init__(self, m: Machine, model: str, seed: int) -> None:
        self.tokens: list[int] = []
        self.error: BaseException | None = None
        self.ended: dict[str, Any] = {}
        self.pid = 0
        self._args = {"model": model, "prompt": "the cat", "max_tokens": TOKENS, "seed": seed,
                      "dtype": "float32", "temperature": 1.0, "exact": True}  # fmt: skip
        self.thread = threading.Thread(target=self._read, args=(m.home,))
        self.thread.start()

    def _read(self, home: Path) -> None:
        try:
            with Client(home) as client:
                self.client = client
                self.pid = client.submit("infer", self._args, attached=True)
                stream = client.attach(self.pid)
                for record in stream:
                    self.tokens += record.get("tokens", ())
                self.ended = stream.result or {}
        except BaseException as exc:  # noqa: BLE001  whatever it is, the test fails with it
            self.error = exc

    def until(self, tokens: int) -> None:
        wait_until(lambda: len(self.tokens) >= tokens or self.error, f"{tokens} tokens")

    def whole(self) -> list[int]:
        self.thread.join(120)
        assert not self.thread.is_alive(), "the stream never ended"
        assert self.error is None, self.error
        assert self.ended["exit_status"] == 0, self.ended
        return self.tokens


@pytest.fixture(scope="module")
def calm(m: Machine, model: str) -> dict[int, list[int]]:
    """What each seed comes to when nobody is disturbed."""
    return {seed: Reader(m, model, seed).whole() for seed in (1, 2, 3)}


def kill_engine(m: Machine, readers: list[Reader]) -> None:
    os.kill(m.worker_of(readers[0].pid), signal.SIGKILL)


def kill_kernel(m: Machine, readers: list[Reader]) -> None:
    m.kill_kernel()
    m.boot()


def kill_both(m: Machine, readers: list[Reader]) -> None:
    os.kill(m.zygote, signal.SIGKILL)
    kill_kernel(m, readers)


def kill_engine_and_kernel(m: Machine, readers: list[Reader]) -> None:
    """In the same moment: nobody lives who knows the guests."""
    os.kill(m.worker_of(readers[0].pid), signal.SIGKILL)
    kill_kernel(m, readers)


def drop_connections(m: Machine, readers: list[Reader]) -> None:
    for reader in readers:
        reader.client._socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "fault", [kill_engine, kill_kernel, kill_both, kill_engine_and_kernel, drop_connections]
)
def test_no_token_is_lost_and_none_comes_twice(
    m: Machine, model: str, calm: dict[int, list[int]], fault: Callable[..., None]
) -> None:
    readers = [Reader(m, model, seed) for seed in calm]
    for reader in readers:
        reader.until(20)
    fault(m, readers)
    for reader, seed in zip(readers, calm, strict=True):
        tokens = reader.whole()
        assert len(tokens) == TOKENS
        pairs = enumerate(zip(tokens, calm[seed], strict=True))
        same = next((i for i, (a, b) in pairs if a != b), TOKENS)
        # What an engine computes again as a prompt may round differently, so that a later draw
        # falls otherwise; what was sent stays, and an engine that lives says the same to the end.
        assert same >= (20 if fault in (kill_engine, kill_engine_and_kernel) else TOKENS), (
            fault.__name__,
            same,
        )


def test_a_conversation_goes_on_over_the_deaths_of_kernel_and_engine(
    m: Machine, model: str
) -> None:
    with Client(m.home) as client:
        args = {"model": model, "max_tokens": 5, "temperature": 0, "dtype": "float32"}
        pid = client.submit("chat", args, attached=True)
        stream = client.attach(pid)

        def turn(text: str) -> str:
            connection = client.connections
            try:
                client.send(pid, {"prompt": text}, key=text)
            except Exception:  # noqa: BLE001  as `llmos chat` does
                client.reconnect(connection)
                stream.reopen()
                client.send(pid, {"prompt": text}, key=text)
            said = ""
            for record in stream:
                said += record.get("text", "") if record["kind"] == "text" else ""
                if record["kind"] == "turn":
                    return said
            raise AssertionError(stream.result)

        def conversation(between: list[Callable[[], None]]) -> list[str]:
            return [turn(f"turn {n}") for n, what in enumerate(between) if what() is None]

        said = conversation(
            [lambda: None, lambda: kill_kernel(m, []), lambda: os.kill(m.worker_of(pid), 9)]
        )
        again = client.submit("chat", args, attached=True)
        pid, stream = again, client.attach(again)
        assert said == conversation([lambda: None] * 3)
    wait_until(lambda: not [r for r in m.ask(p.Ps()) if r["program"] == "chat"], "both to be gone")
