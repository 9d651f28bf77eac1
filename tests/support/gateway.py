"""A machine whose models are served over HTTP, for the tests of the gateway."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from safetensors.torch import load_file, save_file

from llmos.shell import Client
from support.machine import Machine, end, make_machine
from support.small_models import TEMPLATE, make_gpt2, make_llama

LIMIT_S = 60.0

# What the engine could not do before it was written anew: these tests wait for that.
NEW_ENGINE = importlib.util.find_spec("llmos.services.engine.batch") is not None
EMBED = importlib.util.find_spec("llmos.services.programs.embed") is not None


def until(true: Callable[[], Any], what: str, within_s: float = LIMIT_S) -> Any:
    """Look often, give up late -> what was true."""
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited {within_s:.0f} s for: {what}"
        time.sleep(0.01)
    return found


class Served:
    """A booted machine with the models `tiny` (a chat template, 128 tokens), `plain` (none, 128
    tokens) and `long` (8192, no end); and its gateway, unless it is to have none."""

    def __init__(self, *flags: str, gateway: bool = True, config: str = "") -> None:
        self.machine: Machine = make_machine()
        self.home = self.machine.home
        (self.home / "config.toml").write_text(config)
        models = self.home / "models"
        models.mkdir(mode=0o700)
        make_llama(models / "tiny", TEMPLATE)
        make_gpt2(models / "plain")
        never_ends(make_llama(models / "long", max_position_embeddings=8192))
        self.machine.ok("boot")
        if gateway:
            self.machine.ok("serve", "-d", "--port", "0", *flags)

    @property
    def url(self) -> str:
        """Of the API: http://127.0.0.1:PORT/v1."""
        return str(self.machine.json("serve", "status")["url"])

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].split("/")[0])

    @property
    def server_pid(self) -> int:
        return int(self.machine.json("serve", "status")["os_pid"])

    def client(self) -> Client:
        return Client(self.home)

    def live(self, program: str = "infer") -> list[dict[str, Any]]:
        """The live processes of a program."""
        with self.client() as client:
            return [p for p in client.ps() if p["program"] == program]

    def until_live(self, count: int, program: str = "infer") -> list[dict[str, Any]]:
        return until(
            lambda: (found := self.live(program)) is not None and len(found) == count and [found],
            f"{count} processes of {program}",
        )[0]

    def kill_kernel(self) -> None:
        with self.client() as client:
            os_pid = client.status()["kernel"]["os_pid"]
        os.kill(os_pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{os_pid}").exists(), "the kernel to be gone")

    def connect(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port))
        made.settimeout(LIMIT_S)
        return made

    def end(self) -> None:
        end(self.machine)
        shutil.rmtree(self.home, ignore_errors=True)


def never_ends(folder: Path) -> None:
    """The likeliest token of this model is never the last one."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def fields(**more: Any) -> dict[str, Any]:
    """A request to `tiny` whose answer is always the same."""
    return {"model": "tiny", "temperature": 0, "max_tokens": 8, **more}


def run_async(served: Served, work: Any) -> Any:
    async def main() -> Any:
        async with AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            return await work(client)

    return asyncio.run(main())


def refused(kind: type[openai.APIStatusError], call: Any, **request: Any) -> dict[str, Any]:
    """The error that a request is answered with."""
    with pytest.raises(kind) as caught:
        call(**request)
    error = caught.value.body
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error
