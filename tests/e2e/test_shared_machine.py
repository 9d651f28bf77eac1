"""A kernel that serves a group: each member's processes are himself, and nobody else's business.

Needs root. The users are some that the machine has; nothing is added to its database.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, NotFoundError, OpenAI

from llmos.kernel import access
from llmos.kernel import protocol as p
from llmos.kernel.drop import become
from llmos.kernel.errors import BadInput, LlmosError, NoSuchThing, NotAllowed
from llmos.kernel.syscalls.services import ACTIONS
from llmos.shell import keys
from llmos.shell.home import Home
from support.plugins import SPY, install
from support.real import Machine, wait_until
from support.shared import shared
from support.small_models import TEMPLATE, make_llama
from support.users import Two, as_user, two_users

pytestmark = [pytest.mark.long, pytest.mark.fault]

TEXT = "the quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture(scope="module")
def two() -> Two:
    return two_users()


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """An interpreter that has two more services installed, and that everybody may run."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        venv.create(folder, symlinks=True)
        (site,) = Path(folder).glob("lib/*/site-packages")
        ours = [p for p in sys.path if p.endswith("site-packages")]
        (site / "ours.pth").write_text(f"import site; list(map(site.addsitedir, {ours!r}))\n")
        install(site, "spy_mod", SPY, services={"spy": "spy_mod:Spy", "handler": "spy_mod:Handler"})
        yield f"{folder}/bin/python"


@pytest.fixture(scope="module")
def m(two: Two, python: str) -> Iterator[Machine]:
    made = Machine("--group", two.group, "--device", "cpu0:memory=3GiB")
    made.python = python
    try:
        made.boot()
        wait_until(made.zygote_is_ready, "the zygote")
        yield made
        made.shutdown()
        made.check_nobody_is_left()
    finally:
        made.dispose()


@pytest.fixture(scope="module")
def texts(two: Two) -> Iterator[Path]:
    """A folder that everybody reaches, with a text for everybody and one for ann alone."""
    folder = Path("/tmp") / f"llmos-texts-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "all.txt").write_text(TEXT)
    (folder / "all.txt").chmod(0o644)
    (folder / "anns.txt").write_text(TEXT)
    (folder / "anns.txt").chmod(0o600)
    os.chown(folder / "anns.txt", pwd.getpwnam(two.ann).pw_uid, -1)
    yield folder
    shutil.rmtree(folder)


def submit(m: Machine, user: str, program: str, **args: Any) -> int:
    return int(as_user(user, lambda: m.submit(program, **args)))


def ask(m: Machine, user: str, request: Any) -> Any:
    return as_user(user, lambda: m.ask(request))


def pretrain(m: Machine, user: str, data: Path, out: str, **more: Any) -> int:
    return submit(m, user, "pretrain", data=str(data), out=out, steps=3, width=32, layers=1,
                  heads=2, context=64, batch=2, vocab_size=300, dtype="float32", threads=1,
                  **more)  # fmt: skip


def test_members_get_in_and_others_do_not(m: Machine, two: Two) -> None:
    assert ask(m, two.ann, p.Ping()) is None
    assert ask(m, two.bob, p.Ping()) is None
    with pytest.raises(PermissionError):
        ask(m, two.other, p.Ping())


def test_of_the_home_a_member_reaches_the_socket_and_nothing_else(m: Machine, two: Two) -> None:
    def reached() -> list[str]:
        found = []
        for path in files:
            try:
                os.close(os.open(path, os.O_RDONLY))
            except OSError:
                continue
            found.append(path)
        return found

    files = [str(f) for f in m.home.rglob("*")]
    assert str(m.home / "journal.db") in files
    assert as_user(two.ann, reached) == [str(m.home / "models")]
    with pytest.raises(PermissionError):
        as_user(two.ann, lambda: os.listdir(m.home))


def test_a_worker_is_its_user_for_good(m: Machine, two: Two) -> None:
    pid = submit(m, two.ann, "spin", steps=100_000)
    m.until_step(pid, 2)
    entry = pwd.getpwnam(two.ann)
    status = Path(f"/proc/{m.worker_of(pid)}/status").read_text()
    ids = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert ids["Uid"].split() == [str(entry.pw_uid)] * 4
    assert ids["Gid"].split() == [str(entry.pw_gid)] * 4
    assert ids["CapEff"].strip("0") == ids["CapPrm"].strip("0") == ""
    work = (m.home / "procs" / str(pid)).stat()
    assert (work.st_uid, work.st_mode & 0o777) == (entry.pw_uid, 0o700)
    ask(m, two.ann, p.Kill(pid))


@pytest.mark.parametrize(
    "request_of",
    [p.Kill, p.Pause, p.Resume, p.Checkpoint, p.Wait, p.Attach, p.Logs,
     lambda pid: p.Renice(pid, 19), lambda pid: p.Send(pid, {})],
)  # fmt: skip
def test_who_is_not_its_user_does_nothing_to_a_process(
    m: Machine, two: Two, request_of: Any
) -> None:
    pid = submit(m, two.ann, "spin", steps=100_000)
    try:
        with pytest.raises(NotAllowed, match=f"is {two.ann}'s"):
            ask(m, two.bob, request_of(pid))
        assert m.row(pid)["state"] != "exited"
    finally:
        m.ask(p.Kill(pid))  # root may


def test_others_see_that_it_is_there_and_not_what_it_is_about(m: Machine, two: Two) -> None:
    pid = submit(m, two.ann, "spin", steps=100_000)
    (row,) = ask(m, two.bob, p.Ps(pid=pid))
    assert (row["user"], row["program"]) == (two.ann, "spin")
    assert (row["args"], row["log"], row["progress"]) == ({}, "", {})
    told = ask(m, two.bob, p.Explain(pid))
    assert (told["story"], told["process"]["args"]) == ([], {})
    assert not [e for e in ask(m, two.bob, p.Events()) if e["pid"] == pid and e["why"]]
    (own,) = ask(m, two.ann, p.Ps(pid=pid))
    assert own["args"]["steps"] == 100_000
    ask(m, two.ann, p.Kill(pid))


def test_only_root_makes_a_process_more_important(m: Machine, two: Two) -> None:
    with pytest.raises(NotAllowed, match="nice below 0"):
        as_user(two.ann, lambda: m.ask(p.Submit("spin", {"steps": 1}, nice=-1)))
    with pytest.raises(NotAllowed):
        as_user(two.ann, lambda: m.ask(p.Submit("spin", {"steps": 1}, cls="interactive")))
    pid = submit(m, two.ann, "spin", steps=100_000)
    assert ask(m, two.ann, p.Renice(pid, 5, "idle"))["nice"] == 5
    for request in (p.Renice(pid, 4), p.Renice(pid, cls="batch"), p.Renice(pid, deadline_s=60)):
        with pytest.raises(NotAllowed, match="only root"):
            ask(m, two.ann, request)
    assert m.ask(p.Renice(pid, -5, "batch"))["nice"] == -5
    ask(m, two.ann, p.Kill(pid))


def test_root_submits_for_others_and_nobody_else_does(m: Machine, two: Two) -> None:
    pid = int(m.ask(p.Submit("spin", {"steps": 100_000}, user=two.ann))["pid"])
    m.until_step(pid, 2)
    assert m.row(pid)["user"] == two.ann
    assert os.stat(f"/proc/{m.worker_of(pid)}").st_uid == pwd.getpwnam(two.ann).pw_uid
    ask(m, two.ann, p.Kill(pid))
    with pytest.raises(NotAllowed, match="cannot be made here"):
        as_user(two.ann, lambda: m.ask(p.Submit("spin", {"steps": 1}, user=two.bob)))
    with pytest.raises(NotAllowed, match="nice below 0"):  # he could not do it himself
        m.ask(p.Submit("spin", {"steps": 1}, nice=-1, user=two.ann))
    with pytest.raises(NoSuchThing, match="no user"):
        m.ask(p.Submit("spin", {"steps": 1}, user="nobody-of-that-name"))


@pytest.mark.parametrize(
    "request_",
    [p.Shutdown(), p.Dmesg(), p.Services("reload"),
     *(p.Services(action, "models") for action in ACTIONS)],
)  # fmt: skip
def test_the_kernel_itself_is_roots(m: Machine, two: Two, request_: Any) -> None:
    with pytest.raises(NotAllowed, match="for root"):
        ask(m, two.ann, request_)


def test_nobody_reads_through_the_kernel_what_he_may_not_read(
    m: Machine, two: Two, texts: Path
) -> None:
    command = ["/bin/sh", "-c", "id -u; echo $HOME; cat /etc/shadow && echo READ"]
    pid = submit(m, two.ann, "exec", command=command, memory="64MiB", cwd="/")
    assert m.end_of(pid)["exit_status"] != 0
    said = b"".join(i["data"] for i in m.collect(p.Logs(pid))[0]).decode()
    entry = pwd.getpwnam(two.ann)
    assert said.splitlines()[:2] == [str(entry.pw_uid), entry.pw_dir]
    assert "READ" not in said
    with pytest.raises(LlmosError, match="permission"):
        pretrain(m, two.bob, texts / "anns.txt", "bobs-theft")
    assert m.end_of(pretrain(m, two.ann, texts / "anns.txt", "anns"))["exit_status"] == 0


def test_nobody_reads_through_a_service_what_he_may_not_read(
    m: Machine, two: Two, texts: Path
) -> None:
    anns = {"path": str(texts / "anns.txt")}
    through = p.Call("handler.relay", {"method": "spy.read", "args": anns})
    uid = pwd.getpwnam(two.ann).pw_uid
    assert ask(m, two.ann, p.Call("handler.relay", {"method": "spy.who", "args": {}})) == uid
    assert m.ask(p.Call("handler.relay", {"method": "spy.who", "args": {}})) == 0
    for request in (p.Call("spy.read", anns), through):
        assert ask(m, two.ann, request) == TEXT
        with pytest.raises(NotAllowed, match=r"anns\.txt: Permission denied"):
            ask(m, two.bob, request)


def test_whether_a_folder_exists_is_not_told_to_who_may_not_see_it(m: Machine, two: Two) -> None:
    closed = m.home / "closed"
    (closed / "there").mkdir(parents=True, mode=0o700)
    closed.chmod(0o700)
    said = []
    for name in ("there", "not-there"):
        for program, more in (("infer", {"prompt": "x"}), ("finetune", {"data": "/x", "out": "y"})):
            with pytest.raises(LlmosError) as caught:
                submit(m, two.ann, program, model=str(closed / name), **more)
            said.append(caught.value.message.replace(name, "NAME"))
    assert said[:2] == said[2:]


def test_a_link_that_a_user_plants_shows_him_nothing_of_roots(m: Machine, two: Two) -> None:
    secret = m.home / "secret"
    secret.write_text('{"root": "only"}')
    secret.chmod(0o600)
    pid = submit(m, two.ann, "spin", steps=100_000)
    m.until_step(pid, 1)
    work = m.home / "procs" / str(pid)

    def plant() -> None:
        for name in ("log", "stream"):
            os.rename(work / name, work / f"{name}.old")
            os.symlink(secret, work / name)

    as_user(two.ann, plant)
    assert as_user(two.ann, lambda: m.collect(p.Logs(pid))[0]) == []
    assert as_user(two.ann, lambda: m.collect(p.Attach(pid, follow=False))[0]) == []
    ask(m, two.ann, p.Kill(pid, 9))


def test_a_new_model_is_its_makers_until_it_is_shared(m: Machine, two: Two, texts: Path) -> None:
    assert m.end_of(pretrain(m, two.ann, texts / "all.txt", "mine"))["exit_status"] == 0

    def names(user: str) -> list[str]:
        return [e["name"] for e in ask(m, user, p.Call("models.ls"))]

    assert "mine" in names(two.ann)
    assert "mine" not in names(two.bob)
    with pytest.raises(BadInput, match="cannot be read"):
        submit(m, two.bob, "infer", model="mine", prompt="the")
    for call in ("rm", "share", "show"):
        with pytest.raises((NotAllowed, NoSuchThing)):
            ask(m, two.bob, p.Call(f"models.{call}", {"name": "mine"}))
    ask(m, two.ann, p.Call("models.share", {"name": "mine"}))
    assert "mine" in names(two.bob)
    pid = submit(m, two.bob, "infer", model="mine", prompt="the", max_tokens=3)
    assert m.end_of(pid)["exit_status"] == 0
    with pytest.raises(NotAllowed, match="mine"):
        ask(m, two.bob, p.Call("models.rm", {"name": "mine"}))
    ask(m, two.ann, p.Call("models.share", {"name": "mine", "private": True}))
    with pytest.raises(BadInput, match="cannot be read"):
        submit(m, two.bob, "infer", model="mine", prompt="the")
    ask(m, two.ann, p.Call("models.rm", {"name": "mine"}))


def test_the_requests_of_a_key_are_its_users(m: Machine, two: Two) -> None:
    """The gateway is root's; what it asks for somebody is his process, his engine, his files."""
    for path in make_llama(m.home / "models" / "tiny", TEMPLATE).iterdir():
        path.chmod(0o644)
    mine = make_llama(m.home / "models" / "anns", TEMPLATE)
    for path in (mine, *mine.rglob("*")):
        os.chown(path, pwd.getpwnam(two.ann).pw_uid, -1)
        path.chmod(0o700)
    home = Home(m.home)
    ann, bob, own = (keys.new(home, n, user)[1] for n, user in
                     (("a", two.ann), ("b", two.bob), ("r", "")))  # fmt: skip
    keys.write(keys.folder_of(home) / "settings.json", '{"port": 0}')
    m.ask(p.Services("start", "gateway"))
    (row,) = [s for s in m.ask(p.Services()) if s["name"] == "gateway"]

    def api(key: str) -> OpenAI:
        return OpenAI(base_url=row["about"], api_key=key, max_retries=0)

    try:
        with api(ann) as anns, api(bob) as bobs, api(own) as roots:
            for client, user in ((anns, two.ann), (bobs, two.bob), (roots, "root")):
                done = client.completions.create(model="tiny", prompt="the cat", max_tokens=2)
                assert done.choices
                (newest,) = [x for x in m.ask(p.Ps(all=True)) if x["program"] == "infer"][-1:]
                assert newest["user"] == user
            assert "anns" in [x.id for x in anns.models.list()]
            assert "anns" not in [x.id for x in bobs.models.list()]
            assert anns.completions.create(model="anns", prompt="x", max_tokens=2).choices
            with pytest.raises(APIStatusError):
                bobs.completions.create(model="anns", prompt="x", max_tokens=2)
            with pytest.raises(APIStatusError) as caught:  # only root makes something urgent
                anns.completions.create(model="tiny", prompt="x", extra_body={"priority": -5})
            assert caught.value.status_code == 403
            file = anns.files.create(file=("x.jsonl", b"{}"), purpose="batch")
            for other in (bobs, roots):
                with pytest.raises(NotFoundError):
                    other.files.retrieve(file.id)
            data = b"".join(
                json.dumps({"messages": [{"role": "user", "content": f"{n}?"},
                                         {"role": "assistant", "content": f"{n}"}]}).encode()
                + b"\n" for n in range(8)
            )  # fmt: skip
            file = anns.files.create(file=("t.jsonl", data), purpose="fine-tune")
            job = anns.fine_tuning.jobs.create(
                model="tiny", training_file=file.id, suffix="anns-own",
                extra_body={"llmos": {"dtype": "float32", "epochs": 1, "context": 64}},
            )  # fmt: skip
            wait_until(lambda: anns.fine_tuning.jobs.retrieve(job.id).finished_at, "the job to end")
            told = anns.fine_tuning.jobs.retrieve(job.id)
            (row,) = [x for x in m.ask(p.Ps(all=True)) if x["program"] == "finetune"]
            assert row["user"] == two.ann
            # What it needs of Python's library may be closed to her here; its data is not.
            assert "data.jsonl" not in str(told.error)
    finally:
        m.ask(p.Services("disable", "gateway"))


def test_each_user_has_an_engine_of_his_own(m: Machine, two: Two) -> None:
    model = str(shared("models/stories260K"))
    pids = {u: submit(m, u, "infer", model=model, prompt="Once", max_tokens=3) for u in
            (two.ann, two.bob)}  # fmt: skip
    assert all(m.end_of(pid)["exit_status"] == 0 for pid in pids.values())
    engines = [r for r in m.ask(p.Ps()) if r["program"] == "engine" and r["name"] == "stories260K"]
    assert sorted(r["user"] for r in engines) == sorted(pids)
    for row in engines:
        worker = Path(f"/proc/{m.worker_of(row['pid'])}")
        status = (worker / "status").read_text()
        assert f"Uid:\t{pwd.getpwnam(row['user']).pw_uid}\t" in status
        with pytest.raises(PermissionError):  # what root's zygote knew is not its user's to read
            as_user(row["user"], (worker / "mem").open)


def test_a_worker_outlives_its_kernel_as_its_user(m: Machine, two: Two) -> None:
    pid = submit(m, two.ann, "spin", steps=100_000)
    m.until_step(pid, 2)
    worker = m.worker_of(pid)
    m.kill_kernel()
    m.boot()
    m.until_step(pid, m.step(pid) + 1)
    assert m.worker_of(pid) == worker
    ask(m, two.ann, p.Kill(pid))


# ---- refusals ----


def run_kernel(home: Path, *flags: str, python: str = sys.executable) -> tuple[int, str]:
    done = subprocess.run(
        [python, "-P", "-m", "llmos.kernel.main", "--home", str(home), *flags],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_a_group_that_is_not_there_is_said_in_one_line(tmp_path: Path, two: Two) -> None:
    status, said = run_kernel(tmp_path / "h", "--group", "no-such-group")
    assert (status, said.count("\n")) == (1, 1)
    assert "there is no group 'no-such-group'" in said


def test_a_home_that_members_cannot_reach_is_refused(two: Two) -> None:
    closed = Path("/tmp") / f"llmos-closed-{os.getpid()}"
    closed.mkdir(mode=0o700)
    try:
        status, said = run_kernel(closed / "h", "--group", two.group)
        assert (status, said.count("\n")) == (1, 1)
        assert f"{closed} is closed to them" in said
        assert "/var/lib/llmos" in said
    finally:
        shutil.rmtree(closed)


def test_an_environment_that_members_cannot_read_is_refused(two: Two) -> None:
    folder = Path("/tmp") / f"llmos-closed-{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        venv.create(folder / "env", symlinks=True)
        (site,) = folder.glob("env/lib/*/site-packages")
        ours = [p for p in sys.path if p.endswith("site-packages")]
        (site / "ours.pth").write_text(f"import site; list(map(site.addsitedir, {ours!r}))\n")
        (folder / "env").chmod(0o700)
        python = str(folder / "env/bin/python")
        status, said = run_kernel(folder / "h", "--group", two.group, python=python)
        assert (status, said.count("\n")) == (1, 1)
        assert f"members of {two.group} cannot read the environment" in said
    finally:
        shutil.rmtree(folder)


def test_without_root_no_group_is_served(two: Two) -> None:
    with pytest.raises(NotAllowed, match="only root can serve a group"):
        as_user(two.ann, lambda: access.group_of(two.group) and None)


def test_who_became_a_user_cannot_become_root_again(two: Two) -> None:
    def ids() -> list[int]:
        try:
            os.seteuid(0)
        except PermissionError:
            return [*os.getresuid(), *os.getresgid()]
        return [0]

    entry = pwd.getpwnam(two.ann)
    user = access.drop_to(entry.pw_uid)
    assert user is not None
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            become(user)
            os.write(write, repr(ids()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == repr([entry.pw_uid] * 3 + [entry.pw_gid] * 3)
    os.wait()


def test_a_pull_is_its_users(m: Machine, two: Two, texts: Path) -> None:
    """Its worker, what it fetches and the model are whose it is; of another's folder it sees
    nothing. (Its interpreter is not forked from what root has loaded.)"""
    from support.small_models import make_llama

    if not access._can_read(os.__file__, grp.getgrnam(two.group)):
        pytest.skip("members of the group cannot read Python's own library here")

    source = make_llama(texts / "llama")
    for path in (source, *source.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    pid = submit(m, two.ann, "pull", source=str(source), out="anns-pulled")
    end = ask(m, two.ann, p.Wait(pid, 60.0))
    assert end["exit_status"] == 0, end
    found = m.home / "models" / "anns-pulled"
    ann = pwd.getpwnam(two.ann).pw_uid
    assert {path.stat().st_uid for path in (found, *found.iterdir())} == {ann}
    with pytest.raises(NotAllowed):
        ask(m, two.bob, p.Kill(pid, 15))
    (source / "config.json").chmod(0o600)
    other = submit(m, two.bob, "pull", source=str(source), out="bobs-pulled")
    assert ask(m, two.bob, p.Wait(other, 60.0))["exit_status"] == 1
    assert not (m.home / "models" / "bobs-pulled").exists()
    ask(m, two.ann, p.Call("models.rm", {"name": "anns-pulled"}, 30.0))
    assert not found.exists()
