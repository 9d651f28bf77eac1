"""Whose call it is: a service serves each caller as himself, whoever else is in between.

Needs root, which alone can become others. The kernel serves one user; what a group's would hear
from its clients is given to `Calls` directly.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.cpu import procfs
from llmos.kernel import protocol as p
from llmos.kernel.errors import LlmosError, NotAllowed, ServiceFailed
from support.live import Live, in_kernel, wait_until
from support.plugins import SPY, install, on_path

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users"),
]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "spy_mod", SPY, services={"spy": "spy_mod:Spy", "handler": "spy_mod:Handler"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", on_path(folder))
        made = Live()
        made.run(made.boot())
        made.run(made.ask(p.Programs(checked=True)))
        yield made
        assert not made.problems
        made.run(made.down())
        made.dispose()


def nobody() -> int:
    return next(e.pw_uid for e in pwd.getpwall() if e.pw_uid and e.pw_uid != os.getuid())


async def call(live: Live, method: str, /, uid: int | None = None, **args: Any) -> Any:
    """As a client of that user would."""
    return await live.kernel.calls.call(method, args, 20.0, nobody() if uid is None else uid)


async def relay(live: Live, *chain: str, uid: int | None = None, **args: Any) -> Any:
    """`chain[0]` calls `chain[1]` ... calls the last one with `args`."""
    for method in reversed(chain[1:]):
        args = {"method": method, "args": args}
    return await call(live, chain[0], uid, **args)


async def os_pid(live: Live) -> int:
    """Of the host of `spy`, once it is up (again)."""
    await call(live, "spy.who")
    rows = await live.ask(p.Services())
    return int(next(s for s in rows if s["name"] == "spy")["os_pid"])


@in_kernel
async def test_a_call_is_its_users_however_many_services_it_goes_through(live: Live) -> None:
    assert await relay(live, "spy.who") == nobody()
    assert await relay(live, "handler.relay", "spy.who") == nobody()
    for chain in (["handler.relay", "spy.relay"], ["spy.relay", "handler.relay"]):
        with pytest.raises(NotAllowed, match=r"models\.ls: .*/models: Permission denied"):
            await relay(live, *chain, "models.ls")
        assert [m["name"] for m in await relay(live, *chain, "models.ls", uid=0)] == ["toy"]
    assert await relay(live, "handler.relay", "spy.who", uid=0) == 0
    assert await call(live, "handler.began") == 0, "in its constructor it is itself"
    assert live.kernel.calls.works_for("handler") == live.kernel.calls.works_for("spy") == 0


@in_kernel
async def test_nobody_reads_through_a_service_what_he_may_not_read(
    live: Live, tmp_path: Path
) -> None:
    (secret := tmp_path / "secret").write_text("of root")
    secret.chmod(0o600)
    for chain in (["spy.read"], ["handler.relay", "spy.read"]):
        with pytest.raises(NotAllowed, match=f"{re.escape(str(secret))}: Permission denied"):
            await relay(live, *chain, path=str(secret))
        assert await relay(live, *chain, uid=0, path=str(secret)) == "of root"


@in_kernel
async def test_while_it_serves_somebody_a_service_works_for_him_until_it_has_ended(
    live: Live,
) -> None:
    queue = live.kernel.calls._queues["spy"]
    calling = live.kernel.spawn(call(live, "spy.hangs"), answers=True)
    await wait_until(lambda: queue.serving is not None)
    assert live.kernel.calls.works_for("spy") == nobody()
    # It hung, and is being killed: what it says now is still not said by root.
    await wait_until(lambda: queue.serving is None)
    assert live.kernel.calls.works_for("spy") == nobody()
    with pytest.raises(ServiceFailed, match=r"service spy hung in hangs for 1\.5 s"):
        await calling
    await wait_until(lambda: live.kernel.calls.works_for("spy") == 0)
    assert await call(live, "spy.who") == nobody(), "the next one is served"


@in_kernel
async def test_a_child_that_hangs_says_where_and_is_gone(live: Live) -> None:
    pid = next(s for s in await live.ask(p.Services()) if s["name"] == "spy")["pid"]
    log = live.path / "procs" / str(pid) / "log"
    before = log.read_text().count("in hangs") if log.exists() else 0
    queue = live.kernel.calls._queues["spy"]
    host = await os_pid(live)
    older = set(procfs.children(host))
    calling = live.kernel.spawn(call(live, "spy.hangs"), answers=True)
    await wait_until(lambda: queue.serving is not None)
    await wait_until(lambda: bool(set(procfs.children(host)) - older) or calling.done())
    (child,) = set(procfs.children(host)) - older
    with pytest.raises(ServiceFailed, match="hung"):
        await calling
    await wait_until(lambda: procfs.started(child) < 0)
    await wait_until(lambda: log.read_text().count("in hangs") > before)


MISBEHAVIOURS = [
    ("raises", r"spy\.raises raised ZeroDivisionError: oops$"),
    ("is_killed", r"the child of service spy that served is_killed was killed by signal 9$"),
    # Who is faster: whoever looks at its memory, or its own allocator.
    ("asks_for_more_and_more", r"(outgrew its limit of|MemoryError .the service may have) 100 MiB"),
    ("garbles", r"the child of service spy that served garbles said what makes no sense"),
]


@pytest.mark.parametrize(("method", "says"), MISBEHAVIOURS, ids=[m for m, _ in MISBEHAVIOURS])
def test_a_child_that_misbehaves_costs_its_caller_the_call(
    live: Live, method: str, says: str
) -> None:
    async def go() -> None:
        with pytest.raises(LlmosError) as caught:
            await call(live, f"spy.{method}")
        assert re.search(says, caught.value.message), caught.value.message
        assert await call(live, "spy.who") == nobody(), "the next one is served"
        host = await os_pid(live)
        await wait_until(lambda: len(procfs.children(host)) == 1)

    live.run(go())


@in_kernel
async def test_what_a_child_changes_in_memory_is_lost_and_its_host_lives(live: Live) -> None:
    host = await os_pid(live)
    await call(live, "spy.who")
    assert await call(live, "spy.has_seen") == [0, host]
    await call(live, "spy.who", uid=0)
    assert (await call(live, "spy.has_seen", uid=0))[0] == 1
