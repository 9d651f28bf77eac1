"""The interactive shell: lines, background, completion, the toolbar. No terminal is needed."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.base import PipeInput
from prompt_toolkit.output import DummyOutput

from llmos.shell.completer import ShellCompleter
from llmos.shell.context import Context
from llmos.shell.poller import Known, Poller
from llmos.shell.repl import Repl, make_session, read_lines, run_script, start
from llmos.shell.toolbar import describe, toolbar
from support.shell import Site, until


@pytest.fixture
def typed() -> Iterator[PipeInput]:
    """A keyboard: what is sent to it is typed."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


@pytest.fixture
def poller(site: Site) -> Iterator[Poller]:
    made = Poller(site.home, refresh_s=0.01)
    made.start()
    yield made
    made.stop()
    made._thread.join()


def known_to(poller: Poller) -> Known:
    def whole() -> Known | None:
        known = poller.known
        return known if known.status and known.models else None

    found: Known = until(whole)
    return found


def type_lines(site: Site, keys: PipeInput, text: str) -> Repl:
    repl = Repl(Context(site.home))
    session = make_session(Context(site.home), Poller(site.home))
    keys.send_text(text)
    read_lines(repl, session)
    return repl


def test_lines_are_commands_and_ctrl_d_leaves(
    site: Site, typed: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = type_lines(site, typed, "status\rllmos version\rnonsense\r\x04")
    out, err = capsys.readouterr()
    assert "sim0" in out
    assert "torch" in out, "`llmos` before a command does no harm"
    assert "there is no command 'nonsense'" in err
    assert repl.status == 2


def test_ctrl_c_drops_the_line_and_not_the_session(
    site: Site, typed: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(site, typed, "shutdown\x03version\rexit\r")
    assert "llmos 0" in capsys.readouterr().out
    with site.client() as client:
        client.ping()


def test_a_quote_may_span_lines(
    site: Site, typed: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(site, typed, 'run toy "one\rtwo" -d\r\x04')
    pid = int(capsys.readouterr().out)
    assert site.process(pid)["args"]["prompt"] == "one\ntwo"


def test_a_program_goes_to_the_background_and_comes_back(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = Repl(Context(site.home))
    repl.execute("run toy x --max-tokens 40 &")
    [pid] = repl.jobs
    assert capsys.readouterr().out == f"[{pid}] infer\n"
    repl.execute("fg")
    assert capsys.readouterr().out.startswith("1 2 3 ")
    assert repl.status == 0
    repl.report_ended()
    assert f"[{pid}] infer: done" in capsys.readouterr().err
    assert not repl.jobs
    repl.execute("jobs")
    assert capsys.readouterr().out == ""


def test_jobs_lists_what_was_started_here_and_lives(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.spin(steps=0, name="elsewhere")
    repl = Repl(Context(site.home))
    repl.execute("run toy x --max-tokens 100000 --name mine&")
    repl.execute("jobs")
    out = capsys.readouterr().out
    assert "mine" in out
    assert "elsewhere" not in out
    repl.execute("kill mine")
    repl.report_ended()
    assert "killed by SIGTERM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [("ps &", "only programs go to the background"), ("fg", "no process that was started here"),
     ("fg 999999", "there is no process 999999"), ('run "toy', "the line cannot be read")],
)  # fmt: skip
def test_wrong_lines_are_answered(
    site: Site, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    repl = Repl(Context(site.home))
    repl.execute(line)
    assert says in capsys.readouterr().err
    assert repl.status != 0
    assert not repl.leaving


def test_lines_from_a_pipe_are_a_script(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("version # which\n\nkill 999999\nexit\nps\n"))
    repl = Repl(Context(site.home))
    run_script(repl)
    out, err = capsys.readouterr()
    assert "llmos 0" in out
    assert "PID" not in out, "nothing runs after exit"
    assert "no process 999999" in err


def test_bare_llmos_boots_a_kernel_if_none_runs(
    off: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("status --json\n"))
    assert start(Context(off.home)) == 0
    assert '"os_pid"' in capsys.readouterr().out
    off.os_pid = off.client_status()["kernel"]["os_pid"]


def complete(known: Known, text: str) -> list[str]:
    problems: list[str] = []
    completer = ShellCompleter(lambda: known, problems.append)
    found = [c.text for c in completer.get_completions(Document(text), CompleteEvent())]
    assert not problems
    return found


def test_completion_knows_commands_flags_choices_pids_models_and_services(
    site: Site, poller: Poller
) -> None:
    pid = site.spin(steps=0, name="spinner")
    until(lambda: any(p["pid"] == pid for p in poller.known.processes))
    known = known_to(poller)
    assert complete(known, "pa") == ["pause"]
    assert {"pretrain", "gan", "jobs", "fg"} <= set(complete(known, ""))
    assert "infer" not in complete(known, "")
    assert complete(known, "llmos shut") == ["shutdown"]
    assert complete(known, "pretrain --ste") == ["--steps"]
    assert complete(known, "run m p --dtype fl") == ["float32"]
    assert {str(pid), "spinner"} <= set(complete(known, "kill "))
    assert complete(known, "attach spi") == ["spinner"]
    assert complete(known, "kill -s KI") == ["KILL"]
    assert complete(known, "run to")[:1] == ["toy"]
    assert complete(known, "nice -n 5 run to")[:1] == ["toy"]
    assert complete(known, "nice -n 5 pret") == ["pretrain"]
    assert complete(known, "service restart mo") == ["models"]
    assert complete(known, "call models.l") == ["models.ls"]
    assert complete(known, "call models.show --na") == ["--name"]
    assert complete(known, "call models.register --over") == ["--overwrite"]
    assert complete(known, "service en") == ["enable"]
    assert complete(known, "pretrain --optimizer adamw8") == ["adamw8bit"]
    assert complete(known, "help wai") == ["wait"]
    assert complete(known, "help models.re") == ["models.register"]


def test_completion_offers_files_where_a_path_goes(
    site: Site, poller: Poller, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert complete(known_to(poller), "pretrain shak") == ["espeare.txt"]


def test_a_bug_in_the_completer_does_not_end_the_session() -> None:
    problems: list[str] = []

    def broken() -> Known:
        raise ZeroDivisionError("oops")

    completer = ShellCompleter(broken, problems.append)
    assert list(completer.get_completions(Document("ps"), CompleteEvent())) == []
    assert problems == ["completion failed: ZeroDivisionError: oops"]


def test_the_toolbar_shows_load_memory_and_what_runs(site: Site, poller: Poller) -> None:
    pid = site.spin(steps=0)
    until(lambda: any(p["pid"] == pid and p["state"] == "running" for p in poller.known.processes))
    line = toolbar(poller, 80)
    assert len(line) == 80
    assert "sim0" in line
    assert "mem " in line
    assert "1 running" in line
    assert len(toolbar(poller, 30)) == 30
    assert toolbar(poller, 40, "a trouble").startswith(" a trouble")


def test_the_toolbar_survives_a_kernel_that_goes_and_comes_back(off: Site) -> None:
    off.boot()
    poller = Poller(off.home, refresh_s=0.01)
    poller.start()
    until(lambda: "nothing runs" in toolbar(poller, 80))
    until(lambda: poller.known.models == ["toy"])
    off.kill()
    until(lambda: "no kernel" in toolbar(poller, 80))
    assert poller.known.models == ["toy"], "names are still good for completion"
    off.boot()
    until(lambda: "sim0" in toolbar(poller, 80))
    poller.stop()
    poller._thread.join()


def test_the_toolbar_drops_devices_before_processes() -> None:
    device = {"kind": "sim", "load": 0.5}
    status = {"devices": [{**device, "device": f"sim{i}"} for i in range(4)]}
    processes = [{"state": "running", "role": "process"}]
    line = describe(Known(status=status, processes=processes), 40)
    assert "sim0" in line
    assert "sim3" not in line
    assert line.endswith("1 running")
