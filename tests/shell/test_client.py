"""The Python API against a real kernel: both clients, the same answers, the same errors."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel import protocol as p
from llmos.kernel.errors import (
    BadArgument,
    LlmosError,
    NoKernel,
    NoSuchProcess,
    NoSuchThing,
    TimedOut,
)
from llmos.shell import AsyncClient, Client
from support.scripted import Scripted
from support.shell import Site, until

PS_KEYS = {
    "pid", "ppid", "user", "program", "name", "state", "residency", "reason", "class", "nice",
    "device", "device_seconds", "started_at", "ended_at", "exit_status", "memory", "worker_id",
}  # fmt: skip


def test_a_process_is_submitted_watched_and_waited_for(site: Site) -> None:
    with Client(site.home.path) as client:
        pid = client.submit("spin", {"steps": 5, "busy_ms": 1}, name="five", nice=3)
        kinds = [record["kind"] for record in client.attach(pid)]
        ended = client.wait(pid)
        process = client.process(pid)
    assert kinds.count("progress") == 5
    assert (ended["exit_status"], process["name"], process["nice"]) == (0, "five", 3)
    assert set(process) >= PS_KEYS


def test_a_stream_that_is_resumed_by_its_offset_misses_nothing(site: Site) -> None:
    pid = site.spin(steps=20, busy_ms=1)
    with site.client() as client:
        stream = client.attach(pid)
        seen = [next(stream) for _ in range(7)]
        offset = stream.offset
        stream.close()
        client.ping()  # what was under way to the closed stream is not mistaken for an answer
    with site.client() as client:
        rest = client.attach(pid, offset)
        seen += list(rest)
        whole = list(client.attach(pid))
        assert rest.result is not None
        assert rest.result["exit_status"] == 0
    assert seen == whole


def test_other_calls_may_be_made_while_a_stream_is_read(site: Site) -> None:
    pid = site.spin(steps=10, busy_ms=1)
    with site.client() as client:
        steps = []
        for record in client.attach(pid):
            assert client.process(pid)["pid"] == pid
            steps.append(record["step"])
    assert steps == list(range(1, 11))


def test_run_gives_the_text_and_leaving_it_ends_the_process(site: Site) -> None:
    with site.client() as client:
        assert "".join(client.run("toy", "x", max_tokens=4)) == "1 2 3 4 "
        endless = client.run("toy", "x", max_tokens=100_000)
        next(endless)
        [pid] = [q["pid"] for q in client.ps() if q["program"] == "infer"]
        endless.close()
        assert client.process(pid)["state"] == "exited"


def test_run_raises_what_ended_the_process(site: Site) -> None:
    with site.client() as client:
        text = client.run("toy", "x", max_tokens=100_000)
        next(text)
        [pid] = [q["pid"] for q in client.ps() if q["program"] == "infer"]
        with site.client() as other:
            other.kill(pid, 9)
        with pytest.raises(LlmosError, match="SIGKILL"):
            list(text)


def test_errors_are_the_kernels_own_classes(site: Site) -> None:
    with site.client() as client:
        with pytest.raises(NoSuchProcess, match="999999"):
            client.kill(999_999)
        with pytest.raises(NoSuchThing, match="there is no program 'spinn'") as unknown:
            client.submit("spinn")
        assert unknown.value.hint == "did you mean `spin`?"
        with pytest.raises(BadArgument, match="spin has no argument 'stepz'"):
            client.submit("spin", {"stepz": 3})
        with pytest.raises(TimedOut):
            client.wait(client.submit("spin", {"steps": 0}), timeout_s=0.01)


def test_without_a_kernel_the_error_says_how_to_boot(off: Site) -> None:
    with pytest.raises(NoKernel, match="no kernel runs for the home") as caught:
        Client(off.home.path)
    assert "llmos boot" in caught.value.hint

    async def connect() -> None:
        await AsyncClient(off.home.path).connect()

    with pytest.raises(NoKernel, match="no kernel runs for the home"):
        asyncio.run(connect())


def test_a_kernel_that_hangs_up_is_an_error_and_not_a_hang(off: Site) -> None:
    server = Scripted(off.home.path)
    with Client(off.home.path, reconnect_s=0) as client:
        stream = client.attach(1)
        until(lambda: server.heard)
        server.close()
        with pytest.raises(NoKernel, match="closed the connection"):
            next(stream)


def test_a_stream_goes_on_with_the_next_kernel_where_it_was(off: Site) -> None:
    first = Scripted(off.home.path, attach=lambda args, send: send({"item": item("a", 10)}))
    with Client(off.home.path) as client:
        lost: list[int] = []
        whole = {"ok": {"exit_status": 0}}
        client.on_lost = lambda: lost.append(1)
        stream = client.attach(1)
        assert next(stream) == {"text": "a"}
        first.close()
        (off.home.path / "kernel.sock").unlink()
        second = Scripted(
            off.home.path,
            attach=lambda args, send: (send({"item": item("b", 20)}), send(whole))[0],
        )
        assert list(stream) == [{"text": "b"}]
        assert second.heard[0][1]["offset"] == 10
        assert (lost, stream.result) == ([1], {"exit_status": 0})
    second.close()


def item(text: str, offset: int) -> dict[str, Any]:
    return {"offset": offset, "record": {"text": text}}


def test_a_kernel_that_does_not_answer_is_given_up(off: Site) -> None:
    server = Scripted(off.home.path, ps=lambda args, send: send({"ok": []}))
    with Client(off.home.path) as client:
        with pytest.raises(TimedOut, match="did not answer in time"):
            client.ask(p.Ping(), timeout_s=0.02)
        assert client.ps() == []
    server.close()


def test_local_models_are_sent_as_absolute_paths(
    off: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    schema = {"name": "infer", "args": [{"name": "model", "model": True, "path": False}]}
    manifest = {"programs": {"infer": schema}, "services": {}, "errors": []}
    server = Scripted(
        off.home.path,
        programs=lambda args, send: send({"ok": manifest}),
        submit=lambda args, send: send({"ok": {"pid": 7}}),
    )
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with Client(off.home.path) as client:
        for model in ("mine", Path("mine"), "org/hub-name"):
            assert client.submit("infer", {"model": model}) == 7
    sent = [args["args"]["model"] for call, args in server.heard if call == "submit"]
    assert sent == [f"{tmp_path}/mine", f"{tmp_path}/mine", "org/hub-name"]
    server.close()


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    for_streams = ("connect", "begin", "next_answer", "ready", "fail")

    def public(cls: type[Any]) -> dict[str, str]:
        return {
            name: str(inspect.signature(member).replace(return_annotation=inspect.Signature.empty))
            for name, member in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") and name not in for_streams
        }

    assert public(Client) == public(AsyncClient)
    calls = {name for name in p.REQUESTS if name != "services"}
    assert calls - set(public(Client)) <= {"restart_service"}


def test_one_async_client_serves_many_tasks(site: Site) -> None:
    async def work() -> list[Any]:
        async with AsyncClient(site.home.path) as client:
            pids = await asyncio.gather(
                *(client.submit("spin", {"steps": 3, "busy_ms": 1}) for _ in range(4))
            )
            return await asyncio.gather(
                *(client.wait(pid) for pid in pids),
                *(_collect(client, pid) for pid in pids),
                _text(client),
            )

    *found, text = asyncio.run(work())
    assert [e["exit_status"] for e in found[:4]] == [0, 0, 0, 0]
    assert found[4:] == [[1, 2, 3]] * 4
    assert text == "1 2 3 "


async def _collect(client: AsyncClient, pid: int) -> list[int]:
    return [r["step"] async for r in client.attach(pid) if r["kind"] == "progress"]


async def _text(client: AsyncClient) -> str:
    return "".join([t async for t in client.run("toy", "x", max_tokens=3)])


def test_who_wants_it_whole_hears_nothing_before_the_end(site: Site) -> None:
    pid = site.spin(steps=1_000_000)
    with site.client() as client:
        until(lambda: client.process(pid)["progress"].get("step", 0) >= 3)
        stream = client.attach(pid, at_end=True)
        with pytest.raises(TimedOut):
            stream.next(0.05)
        assert next(client.attach(pid))["kind"] == "progress"  # which others do
        with site.client() as other:
            other.kill(pid)
        steps = [r["step"] for r in stream if r["kind"] == "progress"]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= 3
        assert stream.result is not None
        assert stream.result["exit_status"] == 143


def test_a_stream_gives_what_has_come_together_and_then_its_end(off: Site) -> None:
    def attach(args: Any, send: Any) -> None:
        for offset in (10, 20, 30):
            send({"item": {"offset": offset, "record": {"n": offset}}})
        if args["pid"] == 1:
            send({"ok": {"exit_status": 0, "offset": 30}})
        elif args["pid"] == 2:
            send({"error": NoSuchProcess("it was forgotten").to_wire()})

    async def work() -> None:
        async with AsyncClient(off.home.path) as client:
            streams = [client.attach(pid) for pid in (1, 2, 3)]
            for stream in streams:
                found: list[Any] = []
                while len(found) < 3:  # how many come at once is the system's to say
                    found += await stream.batch()
                assert [record["n"] for record in found] == [10, 20, 30]
                assert stream.offset == 30
            with pytest.raises(StopAsyncIteration):
                await streams[0].batch()
            assert streams[0].result == {"exit_status": 0, "offset": 30}
            with pytest.raises(NoSuchProcess):
                await streams[1].batch()
            waiting = asyncio.create_task(streams[2].batch())
            await asyncio.sleep(0)
            streams[2].fail(TimedOut("enough"))
            with pytest.raises(TimedOut, match="enough"):
                await waiting

    server = Scripted(off.home.path, attach=attach)
    asyncio.run(work())
    server.close()


def test_an_async_client_tells_its_waiters_when_the_kernel_goes(off: Site) -> None:
    server = Scripted(off.home.path)

    async def work() -> None:
        async with AsyncClient(off.home.path) as client:
            waiting = [asyncio.create_task(client.wait(pid)) for pid in (1, 2)]
            await asyncio.to_thread(until, lambda: len(server.heard) == 2)
            server.close()
            for task in waiting:
                with pytest.raises(NoKernel):
                    await task
            with pytest.raises(NoKernel):
                await client.ping()

    asyncio.run(work())


@pytest.mark.slow
def test_the_command_line_imports_neither_torch_nor_asyncio_nor_rich() -> None:
    code = (
        "import sys, llmos.shell.main, llmos.shell.commands.ps\n"
        "heavy = {'torch', 'asyncio', 'rich', 'prompt_toolkit', 'numpy'} & set(sys.modules)\n"
        "raise SystemExit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
