"""Who may do what, asked of the table itself; the whole story, with real users, is in
tests/e2e/test_shared_machine.py."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmos.kernel import access
from llmos.kernel import protocol as p
from llmos.kernel.errors import NotAllowed
from llmos.kernel.home import Home
from llmos.kernel.messages import Inbox
from llmos.kernel.process import Class, Process, Role, State
from llmos.kernel.syscalls.services import ACTIONS
from support.live import Live, in_kernel

STRANGER: Any = SimpleNamespace(uid=54321, attached=set())


def test_a_call_that_is_in_no_list_is_roots() -> None:
    listed = access.OPEN | access.OWN
    assert {c for c in p.REQUESTS.values() if c not in listed} == {p.Shutdown, p.Services, p.Dmesg}
    assert all("pid" in {f.name for f in dataclasses.fields(c)} for c in access.OWN)


@in_kernel
async def test_another_user_acts_on_nothing_and_sees_no_arguments(live: Live) -> None:
    pid = await live.spin(steps=100_000)
    for call in access.OWN:
        request = call(pid, message={}) if call is p.Send else call(pid)
        with pytest.raises(NotAllowed):
            access.check(live.kernel, request, STRANGER)
    row = live.kernel.shown(live.proc(pid), STRANGER)
    assert (row["args"], row["log"], row["program"]) == ({}, "", "spin")
    with pytest.raises(NotAllowed, match="for root"):
        access.check(live.kernel, p.Shutdown(), STRANGER)
    access.check(live.kernel, p.Services(), STRANGER)
    for action in ("reload", "x", *ACTIONS):
        with pytest.raises(NotAllowed, match="for root"):
            access.check(live.kernel, p.Services(action, "models"), STRANGER)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("a process of its own", {"role": Role.PROCESS}),
        ("another user's", {"uid": 0}),
        ("another engine's", {"engine_key": "other"}),
        ("nobody's client", {"attached": False}),
        ("one that has ended", {"state": State.EXITED, "exit_status": 0}),
        ("another's name", {"user": "root"}),
        ("a number that was never given away", {"pid": 950}),
        ("a number without a folder", {"pid": 902}),
        ("a number whose folder is another's", {"pid": 903}),
        ("nice -1", {"nice": -1}),
        ("nice 99", {"nice": 99}),
        ("a class that only root gives", {"cls": Class.INTERACTIVE}),
        ("a deadline", {"deadline_at": 5.0}),
        ("less than nothing had", {"device_seconds": -1.0}),
        ("no number", {"device_seconds": float("nan")}),
        ("input that nobody gave", {"inputs": [{"x": 1}]}),
    ],
)
def test_a_worker_brings_no_process_into_the_table_that_it_could_not_have(
    tmp_path: Path, what: str, changed: dict[str, Any]
) -> None:
    """A worker is in the hands of its user: a row that says `run this as root` is not believed."""
    home = Home(tmp_path)
    for pid, uid in ((901, 1001), (903, 1002), (950, 1001)):
        home.work(pid).mkdir(parents=True)
        os.chown(home.work(pid), uid, -1)
    engine = Process(900, "engine", {}, "ann", 1001, 0.0, role=Role.ENGINE, engine_key="k")
    guest = Process(
        901, "infer", {}, "ann", 1001, 0.0, role=Role.GUEST, engine_key="k", attached=True
    )
    kernel: Any = SimpleNamespace(
        core=SimpleNamespace(m=SimpleNamespace(procs={900: engine})), home=home, first_pid=950,
        manifest={"programs": {"infer": {"default_class": "batch"}}},
    )  # fmt: skip
    inbox = Inbox(kernel)
    assert inbox._may_be_in(guest, engine)
    assert not inbox._may_be_in(dataclasses.replace(guest, **changed), engine), what
    kernel.core.m.procs[901] = guest
    assert not inbox._may_be_in(guest, engine), "it is there already"
