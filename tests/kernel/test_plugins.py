"""Plugins' services on a real kernel: what they may do wrong, and what their callers see."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.base import WorkerSaid
from llmos.drivers.cpu import procfs
from llmos.kernel import protocol as p
from llmos.kernel.errors import BadArgument, LlmosError, NoSuchThing, ServiceFailed, TimedOut
from llmos.kernel.process import State
from llmos.kernel.wire import pack
from support.live import Live, in_kernel, wait_until
from support.plugins import GOOD, ROGUE, install, on_path, uninstall
from support.real import Machine

pytestmark = [pytest.mark.fault, pytest.mark.slow]

BROKEN = "import os\nos._exit(7)\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of installed plugins that every child of this process finds."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "good", GOOD, services={"weather": "good:Weather"})
    other = GOOD.replace('"weather"', '"climate"').replace("Weather", "Climate")
    install(folder, "other", other, services={"climate": "other:Climate"})
    install(folder, "rogue", ROGUE, services={"rogue": "rogue:Rogue"})
    install(folder, "broken", BROKEN, services={"broken": "broken:B"}, programs={"bad": "broken:P"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", on_path(folder))
        yield folder


@pytest.fixture(scope="module")
def live(site: Path) -> Iterator[Live]:
    made = Live()
    made.run(made.boot())
    made.run(made.ask(p.Programs(checked=True)))
    yield made
    assert not made.problems
    made.run(made.down())
    made.dispose()


async def call(live: Live, method: str, /, limit_s: float = 20.0, **args: Any) -> Any:
    return await live.ask(p.Call(method, args, limit_s))


async def row(live: Live, name: str) -> dict[str, Any]:
    return next(s for s in await live.ask(p.Services()) if s["name"] == name)


# Each restart costs a second of pause: what shows in a default run is one of each kind.
QUICK = {"raises", "exits", "returns_a_set", "asks_for_too_much"}

MISBEHAVIOURS = [
    ("raises", r"rogue\.raises raised ZeroDivisionError: oops$", False),
    ("hangs", r"service rogue hung in hangs for 0\.4 s", True),
    ("hangs_in_c", r"service rogue hung in hangs_in_c for 0\.4 s", True),
    ("exits", r"service rogue ended with exit status 3 while it served exits", True),
    ("exits_politely", r"rogue\.exits_politely raised SystemExit: 4", False),
    ("is_killed", r"service rogue was killed by SIGKILL while it served is_killed", True),
    ("crashes", r"service rogue was killed by SIGSEGV while it served crashes", True),
    ("leaks", r"service rogue outgrew its limit of 100 MiB of memory \(it had \d+\) while", True),
    (
        "asks_for_too_much",
        r"rogue\.asks_for_too_much raised MemoryError \(the service may have 100 MiB",
        False,
    ),
    ("returns_a_set", r"rogue\.returns_a_set returned what cannot be sent \(TypeError", False),
    ("returns_too_much", r"rogue\.returns_too_much returned more than 16 MiB", False),
    ("writes_on_its_connection", r"service rogue wrote what is not the protocol on its conn", True),
]


@pytest.mark.parametrize(
    ("method", "says", "restarts"),
    [
        pytest.param(*row, id=row[0], marks=() if row[0] in QUICK else pytest.mark.long)
        for row in MISBEHAVIOURS
    ],
)
def test_who_calls_a_service_that_misbehaves_hears_its_name_and_nobody_else_notices(
    live: Live, method: str, says: str, restarts: bool
) -> None:
    async def go() -> None:
        await live.ask(p.Services("restart", "rogue"))
        await call(live, "weather.count")  # it is up
        weather, rogue = await row(live, "weather"), await row(live, "rogue")
        calling = live.talk.begin(p.Call(f"rogue.{method}", {}, 20.0))
        counted = [await call(live, "weather.count") for _ in range(3)]  # beside it
        with pytest.raises(ServiceFailed) as caught:
            await live.talk.answer(calling)
        assert re.search(says, caught.value.message), caught.value.message
        assert "\n" not in caught.value.message
        assert counted == list(range(counted[0], counted[0] + 3)), "the same process, in order"
        if restarts:
            await live.until(rogue["pid"], lambda proc: proc.restarts == 1)
        assert await call(live, "rogue.ok") == "ok", "the next caller is served"
        after = await row(live, "rogue")
        assert (after["os_pid"] != rogue["os_pid"]) == restarts
        assert (await row(live, "weather"))["os_pid"] == weather["os_pid"]
        assert (await row(live, "weather"))["restarts"] == 0

    live.run(go())


@in_kernel
async def test_what_is_no_answer_changes_nothing_and_the_answer_still_comes(live: Live) -> None:
    calling = live.talk.begin(p.Call("rogue.floods_its_log", {"lines": 50_000}, 20.0))
    queue = live.kernel.calls._queues["rogue"]
    await wait_until(lambda: queue.serving is not None)
    number = queue.number
    for wrong in ({"error": "x"}, {"error": 3}, {}, {"id": number + 1}, {"id": "1", "ok": 1}):
        message = {"k": "answer", "id": number, **wrong} if wrong else {"k": "answer"}
        live.kernel.inbox._said(WorkerSaid(queue.worker_id, message))
    assert await live.talk.answer(calling) == "done"


@pytest.mark.long
@in_kernel
async def test_a_hang_leaves_a_traceback_in_the_log(live: Live) -> None:
    with pytest.raises(ServiceFailed):
        await call(live, "rogue.hangs")
    pid = (await row(live, "rogue"))["pid"]
    log = live.path / "procs" / str(pid) / "log"
    await wait_until(lambda: "in hangs" in log.read_text())


@pytest.mark.long
@in_kernel
async def test_who_waits_behind_a_call_that_hangs_is_served_by_the_next_process(live: Live) -> None:
    await live.ask(p.Services("restart", "rogue"))
    hanging = live.talk.begin(p.Call("rogue.hangs", {}, 20.0))
    behind = live.talk.begin(p.Call("rogue.ok", {}, 20.0))
    impatient = live.talk.begin(p.Call("rogue.ok", {}, 0.05))
    with pytest.raises(TimedOut, match=r"get its turn in 0\.05 s: the service was busy with hangs"):
        await live.talk.answer(impatient)
    with pytest.raises(ServiceFailed, match="hung"):
        await live.talk.answer(hanging)
    assert await live.talk.answer(behind) == "ok"


@pytest.mark.long
@in_kernel
async def test_one_that_keeps_failing_waits_longer_each_time_and_says_until_when(
    live: Live,
) -> None:
    await live.ask(p.Services("restart", "rogue"))
    proc = live.proc((await row(live, "rogue"))["pid"])
    for _ in range(2):
        with pytest.raises(ServiceFailed):
            await call(live, "rogue.exits")
    proc.failures = 6  # as after some more
    with pytest.raises(ServiceFailed):
        await call(live, "rogue.exits")
    await live.until(proc.pid, lambda q: q.state is State.BACKOFF)
    shown = await row(live, "rogue")
    assert (shown["state"], shown["os_pid"]) == ("backoff", None)
    assert shown["next_start_at"] > live.kernel.now() + 10
    assert "ended with exit status 3" in shown["why"]
    with pytest.raises(ServiceFailed, match=r"exit status 3; it starts again in \d+ s"):
        await call(live, "rogue.ok")
    await live.ask(p.Services("restart", "rogue"))
    assert await call(live, "rogue.ok") == "ok"


@in_kernel
async def test_a_flooded_log_stays_small(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(live.kernel.config, log_size=1 << 20)
    monkeypatch.setattr(live.kernel, "config", small)
    assert await call(live, "rogue.floods_its_log", lines=20_000) == "done"
    log = live.path / "procs" / str((await row(live, "rogue"))["pid"]) / "log"
    await wait_until(lambda: log.stat().st_blocks * 512 <= 1 << 20)
    assert log.read_bytes().startswith(bytes(4096)), "its beginning is a hole"
    assert log.read_text().endswith("19999\n")


@in_kernel
async def test_what_a_service_has_started_ends_with_it(live: Live) -> None:
    child = await call(live, "rogue.leaves_a_child")
    assert procfs.started(child) > 0
    await live.ask(p.Services("restart", "rogue"))
    await wait_until(lambda: procfs.started(child) < 0)


@in_kernel
async def test_services_call_each_other_and_a_circle_is_an_error(live: Live) -> None:
    async def relay(*chain: str) -> Any:
        args: dict[str, Any] = {"method": chain[-1], "args": {}}
        for method in reversed(chain[:-1]):
            args = {"method": method, "args": args}
        return await call(live, args["method"], **args["args"])

    assert await relay("weather.relay", "climate.count") == 1
    with pytest.raises(ServiceFailed, match="a circle, weather -> weather"):
        await relay("weather.relay", "weather.count")
    with pytest.raises(ServiceFailed, match="a circle, climate -> weather -> climate"):
        await relay("weather.relay", "climate.relay", "weather.count")
    # Two that call each other at the same moment: one of them is refused, nobody waits for ever.
    both = [("weather.relay", "climate.relay", "models.ls"),
            ("climate.relay", "weather.relay", "models.ls")]  # fmt: skip
    results = await asyncio.gather(*(relay(*c) for c in both), return_exceptions=True)
    assert all(isinstance(r, list | ServiceFailed) for r in results), results
    with pytest.raises(NoSuchThing, match="no model 'nobody'"):
        await call(live, "weather.relay", method="models.show", args={"name": "nobody"})
    with pytest.raises(BadArgument, match=r"models\.show has no argument 'nam'"):
        await call(live, "weather.relay", method="models.show", args={"nam": "x"})


@pytest.mark.long
@in_kernel
async def test_the_clock_of_a_service_stands_while_it_waits_for_another(live: Live) -> None:
    """`rogue.hangs` may take 0.4 s; a caller of it that has less is not what has hung."""
    before = (await row(live, "weather"))["os_pid"]
    with pytest.raises(ServiceFailed, match="rogue hung in hangs"):
        await call(live, "weather.relay", method="rogue.hangs", args={})
    assert (await row(live, "weather"))["os_pid"] == before


WRONG = [
    ("weather.forcast", {}, NoSuchThing, "no call 'forcast'", "did you mean forecast?"),
    ("wether.forecast", {}, NoSuchThing, "no service 'wether'", "did you mean weather?"),
    ("weather.forecast", {}, BadArgument, "weather.forecast needs city", "llmos help"),
    ("weather.forecast", {"city": 1}, BadArgument, "city is text, not 1", ""),
    ("weather.forecast", {"city": "x", "dys": 1}, BadArgument, "no argument 'dys'", "mean days?"),
    ("weather.forecast", {"city": "x", "days": "1"}, BadArgument, "days is a whole number", ""),
    ("weather.forecast", {"city": "x", "days": True}, BadArgument, "days is a whole number", ""),
    ("weather.forecast", {"city": "x", "unit": "K"}, BadArgument, "unit is one of C, F", ""),
    ("weather.forecast", {"city": "x", "hints": [1]}, BadArgument, "each item is text", ""),
    ("broken.x", {}, ServiceFailed, "importing it ended the process (exit status 7)", "mend it"),
]


@pytest.mark.parametrize(("method", "args", "error", "says", "hint"), WRONG)
def test_a_wrong_call_is_refused_before_anybody_is_called(
    live: Live, method: str, args: dict[str, Any], error: type[LlmosError], says: str, hint: str
) -> None:
    async def go() -> None:
        with pytest.raises(error) as caught:
            await call(live, method, **args)
        assert says in caught.value.message
        assert hint in caught.value.hint

    live.run(go())


@in_kernel
async def test_declared_arguments_arrive_as_they_were_declared(live: Live) -> None:
    told = await call(live, "weather.forecast", city="Basel", hints=["a"], exact=True)
    assert told == {"city": "Basel", "days": 1, "unit": "C", "hints": ["a"], "exact": True}


@in_kernel
async def test_what_cannot_be_imported_is_shown_with_its_error(live: Live) -> None:
    shown = await row(live, "broken")
    assert (shown["state"], shown["pid"]) == ("broken", None)
    assert "exit status 7" in shown["why"]
    manifest = await live.ask(p.Programs(checked=True))
    assert [b["name"] for b in manifest["broken"]] == ["bad", "broken"]
    assert {"weather", "climate", "rogue", "models"} <= set(manifest["services"])


@in_kernel
async def test_a_stopped_service_stays_stopped_until_it_is_started(live: Live) -> None:
    await live.ask(p.Services("stop", "climate"))
    shown = await row(live, "climate")
    assert (shown["state"], shown["os_pid"], shown["enabled"]) == ("stopped", None, True)
    with pytest.raises(ServiceFailed, match="service climate is stopped"):
        await call(live, "climate.count")
    await live.ask(p.Services("stop", "climate"))  # twice is harmless
    started = await live.ask(p.Services("start", "climate"))
    assert await call(live, "climate.count") == 1
    assert (await live.ask(p.Services("start", "climate")))["pid"] == started["pid"]


ASKED_FOR = """
from llmos.services.base import Service, call

class Shop(Service):
    name = "shop"
    summary = "Open when somebody opens it"
    at_boot = False

    @call
    def move(self, place: str) -> None:
        self.about(place)
"""


@in_kernel
async def test_one_that_is_not_started_at_boot_is_there_when_it_is_wanted(
    live: Live, site: Path
) -> None:
    install(site, "shop_mod", ASKED_FOR, services={"shop": "shop_mod:Shop"})
    await live.ask(p.Services("reload"))
    shown = await row(live, "shop")
    assert (shown["state"], shown["enabled"], shown["about"]) == ("disabled", False, "")
    await live.ask(p.Services("start", "shop"))
    await call(live, "shop.move", place="at the corner")
    shown = await row(live, "shop")
    assert (shown["about"], shown["enabled"]) == ("at the corner", False)
    await live.ask(p.Services("enable", "shop"))
    assert json.loads(live.kernel.home.services.read_text())["enabled"] == ["shop"]
    await live.ask(p.Services("restart", "shop"))
    assert (await row(live, "shop"))["about"] == ""  # what the one before it said
    await live.ask(p.Services("disable", "shop"))
    uninstall(site, "shop_mod")
    await live.ask(p.Services("reload"))


@in_kernel
async def test_a_call_that_is_being_served_ends_before_its_service_is_restarted(live: Live) -> None:
    calling = live.talk.begin(p.Call("rogue.floods_its_log", {"lines": 5_000}, 20.0))
    restarting = live.talk.begin(p.Services("restart", "rogue"))
    assert await live.talk.answer(calling) == "done"
    await live.talk.answer(restarting)


@pytest.mark.long
@in_kernel
async def test_reload_starts_restarts_and_stops_what_has_changed(live: Live, site: Path) -> None:
    fresh = GOOD.replace('"weather"', '"fresh"').replace("Weather", "Fresh")
    install(site, "fresh_mod", fresh, services={"fresh": "fresh_mod:Fresh"})
    weather = await row(live, "weather")
    told = await live.ask(p.Services("reload"))
    assert (told["added"], told["removed"], told["changed"]) == (["service fresh"], [], [])
    assert await call(live, "fresh.count") == 1
    install(site, "fresh_mod", fresh.replace("self.calls_made += 1", "self.calls_made += 10"), "2",
            services={"fresh": "fresh_mod:Fresh"})  # fmt: skip
    assert (await live.ask(p.Services("reload")))["changed"] == ["service fresh"]
    assert await call(live, "fresh.count") == 10, "the new code"
    install(site, "fresh_mod", "import nothing_of_this_name", "3",
            services={"fresh": "fresh_mod:Fresh"})  # fmt: skip
    told = await live.ask(p.Services("reload"))
    assert told["removed"] == ["service fresh"]
    assert any("No module named 'nothing_of_this_name'" in line for line in told["broken"])
    assert (await row(live, "fresh"))["state"] == "broken"
    (broken,) = [b for b in (await live.ask(p.Programs()))["broken"] if b["name"] == "fresh"]
    assert "fresh_mod.py" in broken["printed"], "the traceback"
    uninstall(site, "fresh_mod")
    await live.ask(p.Services("reload"))
    with pytest.raises(NoSuchThing):
        await call(live, "fresh.count")
    assert (await row(live, "weather"))["os_pid"] == weather["os_pid"], "it was left alone"


@pytest.mark.long
def test_a_plugin_that_hangs_while_it_is_imported_keeps_nobody_waiting(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first boot of a home: ours serve at once, other plugins when that is given up."""
    (marker := site / "marker").touch()
    hangs = f"import os, time\nwhile os.path.exists({str(marker)!r}): time.sleep(0.05)\n"
    install(site, "hangs", hangs + "class H: pass\n", services={"hangs": "hangs:H"})
    live = Live()

    async def go() -> None:
        await live.boot()
        assert [m["name"] for m in await call(live, "models.ls")] == ["toy"]
        assert not live.kernel.installed.checked.is_set()
        models = await row(live, "models")
        marker.unlink()
        assert await call(live, "climate.count") == 1
        assert "H" in (await row(live, "hangs"))["why"]
        assert (await row(live, "models"))["os_pid"] == models["os_pid"], "it is the only one"
        assert len([q for q in await live.ask(p.Ps()) if q["name"] == "models"]) == 1
        await live.down()

    try:
        live.run(go())
    finally:
        marker.unlink(missing_ok=True)
        uninstall(site, "hangs")
    live.dispose()


@pytest.mark.long
@in_kernel
async def test_a_service_that_hangs_in_its_constructor_is_started_again(
    live: Live, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.services.START_S", 1.0)
    init = "    def __init__(self, home):\n        import time\n        time.sleep(600)\n"
    stuck = GOOD.replace('"weather"', '"stuck"').replace("Weather", "Stuck") + "\n" + init
    install(site, "stuck", stuck, services={"stuck": "stuck:Stuck"})
    try:
        await live.ask(p.Services("reload"))
        pid = (await row(live, "stuck"))["pid"]
        await live.until(pid, lambda proc: proc.restarts == 1)
        assert "did not come up in 1 s" in (await row(live, "stuck"))["why"]
        assert "in __init__" in (live.path / "procs" / str(pid) / "log").read_text()
    finally:
        uninstall(site, "stuck")
        await live.ask(p.Services("reload"))


@pytest.mark.long
def test_a_service_that_hangs_ends_with_a_kernel_that_is_killed(site: Path) -> None:
    install(site, "rogue", ROGUE.replace("limit_s=0.4", "limit_s=600"), "9",
            services={"rogue": "rogue:Rogue"})  # fmt: skip
    made = Machine("--device", "sim0:memory=1GiB")
    try:
        made.boot()
        made.ask(p.Programs(checked=True))
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(made.home / "kernel.sock"))
            line.sendall(pack(p.encode(p.Call("rogue.hangs_in_c", {}, 600.0), 1)))
            # It has begun when the next one gets no turn.
            with pytest.raises(TimedOut, match="busy with hangs_in_c"):
                made.ask(p.Call("rogue.ok", {}, 2.0))
            made.kill_kernel()
        made.check_nobody_is_left()
    finally:
        made.dispose()


@pytest.mark.long
def test_a_manifest_of_an_older_llmos_is_made_anew(site: Path) -> None:
    live = Live()
    old = {"key": "k", "programs": {}, "services": {"models": {"entry": "x:Y"}}, "errors": []}
    (live.path / "manifest.json").write_text(json.dumps(old))

    async def go() -> None:
        await live.boot()
        assert [m["name"] for m in await call(live, "models.ls")] == ["toy"]
        await live.down()

    live.run(go())
    live.dispose()


@pytest.mark.long
def test_disabled_is_remembered_over_a_boot_and_stopped_is_not(site: Path) -> None:
    uninstall(site, "broken")
    uninstall(site, "rogue")
    live = Live()

    async def go() -> None:
        await live.boot()
        await live.ask(p.Services("disable", "weather"))
        await live.ask(p.Services("stop", "climate"))
        await live.down()
        # Installed while nobody looked: it is there after the boot, as soon as that is known.
        install(
            site, "late", GOOD.replace('"weather"', '"late"'), services={"late": "late:Weather"}
        )
        await live.boot()
        assert (await row(live, "weather"))["state"] == "disabled"
        assert await call(live, "climate.count") == 1
        assert await call(live, "late.count") == 1
        with pytest.raises(ServiceFailed, match="service weather is disabled"):
            await call(live, "weather.count")
        await live.ask(p.Services("enable", "weather"))
        assert await call(live, "weather.count") == 1
        assert (await row(live, "weather"))["enabled"]
        await live.down()

    live.run(go())
    live.dispose()
