"""Every command against a real kernel with a simulated device."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.kernel.errors import LlmosError
from llmos.shell import commands
from llmos.shell.context import Context
from llmos.shell.follow import Background
from llmos.shell.main import find, guarded
from support.plugins import install, on_path
from support.shell import Shell, Site, until

READING = ["ps", "ps -a", "status", "mem", "models", "service", "explain 1", "version"]


def test_the_table_of_commands_is_the_folder() -> None:
    folder = Path(commands.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "program"}
    assert set(commands.NAMES) == files
    for name in commands.NAMES:
        assert commands.named(name).name == name


@pytest.mark.parametrize("name", commands.NAMES)
def test_every_command_has_help_with_examples_at_80_columns(sh: Shell, name: str) -> None:
    text = sh.ok(name, "--help")
    assert text.startswith(f"Usage: llmos {name}")
    assert "Examples:\n  llmos " in text or f"llmos {name}" in text.partition("Examples:")[2]
    assert max(map(len, text.splitlines())) <= 80
    assert sh.ok("help", name) == text


def test_help_lists_every_command_and_the_programs_of_the_manifest(sh: Shell) -> None:
    text = sh.ok("help")
    words = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert words >= {*commands.NAMES, "pretrain", "finetune", "gan"}
    assert not words & {"spin", "engine", "infer"}
    assert max(map(len, text.splitlines())) <= 80
    assert sh.ok("--help") == text


@pytest.mark.parametrize("line", READING)
def test_commands_that_read_have_json_and_fit_80_columns(sh: Shell, line: str) -> None:
    ran = sh(*line.split(), "--json")
    assert ran.status == 0
    assert ran.json is not None
    assert ran.err == ""
    assert max(map(len, sh.ok(*line.split()).splitlines())) <= 80


def test_the_json_of_status_and_mem_has_the_keys_that_scripts_use(sh: Shell) -> None:
    status = sh("status", "--json").json
    assert set(status["kernel"]) >= {"os_pid", "uptime_s", "version"}
    assert status["devices"][0]["device"] == "sim0"
    [device] = sh("mem", "--json").json
    assert set(device) >= {
        "device", "kind", "capacity_bytes", "foreign_bytes", "promised_bytes", "measured_bytes",
        "free_bytes", "segments",
    }  # fmt: skip
    total = device["foreign_bytes"] + device["promised_bytes"] + device["free_bytes"]
    assert total == device["capacity_bytes"]


def test_ps_shows_a_process_in_80_columns_and_wide_shows_all(sh: Shell, site: Site) -> None:
    long = "a-name-that-is-much-too-long-for-a-column"
    pid = site.spin(steps=0, name=long)
    until(lambda: site.process(pid)["state"] == "running")
    narrow, wide = sh.ok("ps"), sh.ok("ps", "-w")
    assert max(map(len, narrow.splitlines())) <= 80
    assert "a-name-t" in narrow
    assert long not in narrow
    assert long in wide
    header = "PID USER PROG NAME STATE CLASS NI DEV MEM TIME PROGRESS REASON"
    assert narrow.splitlines()[0].split() == header.split()


def test_pause_resume_renice_checkpoint_and_kill_take_effect(sh: Shell, site: Site) -> None:
    pid = site.spin(steps=0, name="spinner")
    with site.client() as client:
        until(lambda: client.process(pid)["progress"])
        sh.ok("pause", "spinner")
        assert client.process(pid)["state"] == "paused"
        sh.ok("resume", str(pid))
        assert client.process(pid)["state"] != "paused"
        sh.ok("renice", "7", "spinner")
        assert client.process(pid)["nice"] == 7
        sh.ok("renice", "-n", "-3", "spinner")
        assert client.process(pid)["nice"] == -3
        assert f"{pid}: step " in sh.ok("checkpoint", "spinner")
        assert "checkpoint" in sh.ok("explain", "spinner")
        sh.ok("kill", "-9", "spinner")
        assert client.process(pid)["exit_status"] == 137


@pytest.mark.parametrize(
    ("words", "status"),
    [(["-TERM"], 143), (["-SIGINT"], 130), (["-s", "KILL"], 137), (["--signal", "15"], 143)],
)
def test_kill_takes_signals_as_every_kill_does(
    sh: Shell, site: Site, words: list[str], status: int
) -> None:
    pid = site.spin(steps=0)
    sh.ok("kill", *words, str(pid))
    assert sh("wait", str(pid)).status == status


def test_kill_goes_on_after_a_pid_that_is_not_there(sh: Shell, site: Site) -> None:
    pid = site.spin(steps=0)
    ran = sh("kill", "999999", str(pid))
    assert ran.status == 1
    assert "no process 999999" in ran.err
    assert sh("wait", str(pid)).status == 143


def test_wait_exits_as_the_process_did(sh: Shell, site: Site) -> None:
    good, bad = site.spin(steps=2, busy_ms=1), site.spin(steps=2, busy_ms=1, exit_status=7)
    assert sh("wait", str(good)).status == 0
    assert sh("wait", str(bad)).status == 7
    assert sh("wait", str(bad), str(good)).status == 0, "as wait in sh: the last one's"
    assert sh("wait", "--json", str(bad)).json[0]["exit_status"] == 7


def test_wait_tells_an_unknown_pid_from_a_wait_that_failed(
    sh: Shell, site: Site, off: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = sh("wait", "999999")
    assert (unknown.status, unknown.err.count("\n")) == (127, 2)
    endless = site.spin(steps=0)
    assert sh("wait", "--timeout", "10ms", str(endless)).status == 125
    assert guarded(["wait", "1"], Context(off.home)) == 125


def test_a_program_shows_its_progress_and_its_end(sh: Shell, site: Site) -> None:
    pid = site.spin(steps=30, busy_ms=1)
    ran = sh("attach", "--from-start", str(pid))
    assert ran.status == 0
    assert "spin" in ran.err
    assert "30/30" in ran.err
    assert "is done" in ran.err


def test_attach_ends_with_the_status_of_the_process_and_its_reason(sh: Shell, site: Site) -> None:
    ran = sh("attach", str(site.spin(steps=3, busy_ms=1, fail_at=2)))
    assert ran.status == 1
    assert "llmos: spin" in ran.err
    assert "told to fail" in ran.err
    assert "llmos logs" in ran.err


def test_run_prints_the_continuation_and_nothing_else(sh: Shell) -> None:
    ran = sh("run", "toy", "x", "--max-tokens", "5", "--temperature", "0", "--seed", "1")
    assert (ran.status, ran.out, ran.err) == (0, "1 2 3 4 5 ", "")


def test_detached_prints_the_pid_and_nothing_else(sh: Shell) -> None:
    ran = sh("run", "toy", "x", "-d", "--max-tokens", "5")
    assert ran.out == f"{int(ran.out)}\n"
    assert ran.err == ""
    assert sh("attach", ran.out.strip()).out == "1 2 3 4 5 "
    assert sh("attach", "--from-start", ran.out.strip()).out == "1 2 3 4 5 "


def test_run_reads_the_prompt_from_standard_input(
    sh: Shell, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["run", "toy"], ["run", "toy", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon\n")))
        pid = sh.ok(*words, "-d").strip()
        with site.client() as client:
            assert client.process(int(pid))["args"]["prompt"] == "Once upon"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff")))
    ran = sh("run", "toy", "-")
    assert (ran.status, "not UTF-8" in ran.err) == (2, True)


def test_nice_runs_a_program_with_that_nice_value(sh: Shell, site: Site) -> None:
    pid = sh.ok("nice", "-n", "12", "run", "toy", "x", "-d").strip()
    default = sh.ok("nice", "run", "toy", "x", "-d").strip()
    with site.client() as client:
        assert [client.process(int(q))["nice"] for q in (pid, default)] == [12, 10]
    assert sh("nice", "ps").status == 2
    assert sh("nice", "run", "--help").out == sh.ok("run", "--help")


def test_ctrl_c_on_a_run_ends_it_and_on_a_training_leaves_it(
    sh: Shell, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmos.shell.view import View

    def interrupt(self: View, record: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(View, "show", interrupt)
    ran = sh("run", "toy", "x", "--max-tokens", "100000")
    assert ran.status == 130
    with site.client() as client:
        ended = max((q for q in client.ps(all=True) if q["program"] == "infer"),
                    key=lambda q: q["pid"])  # fmt: skip
        assert ended["exit_status"] == 130
        pid = site.spin(steps=0)
        until(lambda: site.process(pid)["progress"])
        left = sh("attach", "--from-start", str(pid))
        assert left.status == 130
        assert f"llmos attach {pid}" in left.err
        assert client.process(pid)["state"] != "exited"


def test_a_program_in_the_background_is_left_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch, sh: Shell
) -> None:
    from llmos.shell.view import View

    def leave(self: View, record: object) -> None:
        raise Background

    pid = site.spin(steps=0)
    until(lambda: site.process(pid)["progress"])
    monkeypatch.setattr(View, "show", leave)
    assert sh("attach", "--from-start", str(pid)).status == 0
    with site.client() as client:
        assert client.process(pid)["state"] != "exited"


def test_logs_call_and_models_reach_what_they_name(sh: Shell, site: Site) -> None:
    models = until(lambda: sh("models", "--json").json)
    assert [m["name"] for m in models] == ["toy"]
    assert "toy" in sh.ok("models")
    assert "toy" in sh.ok("models", "show", "toy")
    assert json.loads(sh.ok("call", "models.ls"))[0]["name"] == "toy"
    assert json.loads(sh.ok("call", "models.show", "name=toy"))["name"] == "toy"
    assert "models" in sh.ok("service")
    assert sh("service", "logs", "models").status == 0
    assert sh("logs", str(site.spin(steps=1))).status == 0


def test_the_log_of_a_service_that_is_broken_says_what_was_wrong(
    sh_off: Shell, off: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "print('hello')\nimport nothing_of_this_name\n"
    install(tmp_path, "wrong_mod", text, services={"wrong": "wrong_mod:Wrong"})
    monkeypatch.setenv("PYTHONPATH", on_path(tmp_path))
    off.boot()
    ran = sh_off("service", "logs", "wrong")
    assert ran.status == 1
    assert ran.out.startswith("hello\nTraceback (most recent call last):\n")
    assert 'wrong_mod.py", line 2' in ran.out
    assert ran.err.count("\n") <= 2
    assert "service wrong is broken: ModuleNotFoundError: No module named" in ran.err
    ran = sh_off("service", "logs", "wrong", "-n", "1")
    assert ran.out == "ModuleNotFoundError: No module named 'nothing_of_this_name'\n"


def test_a_call_has_flags_help_and_pairs_that_mean_the_same(sh: Shell) -> None:
    flags = sh("call", "models.show", "--name", "toy", "--timeout", "9s").json
    assert flags["name"] == "toy"
    assert sh("call", "--timeout", "9s", "models.show", "name=toy").json == flags
    text = sh.ok("help", "models.register")
    assert text.startswith("Usage: llmos call models.register [options]")
    assert "--overwrite" in text
    assert sh.ok("call", "models.register", "--help") == text
    assert "models.show --name" in sh.ok("call", "models")
    assert max(map(len, sh.ok("call", "models").splitlines())) <= 80


def test_services_are_listed_restarted_and_looked_for(sh: Shell) -> None:
    assert "models runs again" in sh("service", "restart", "models").err
    assert "nothing has changed" in sh("service", "reload").err
    assert set(sh("service", "reload", "--json").json) == {"added", "removed", "changed", "broken"}
    assert "models" in sh.ok("service", "ls")


def test_a_new_service_is_a_distribution_with_tests_that_pass(
    sh: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my weather"
    out = sh.ok("service", "new", "weather_2", "--path", str(folder))
    assert "llmos call weather_2.greet" in out
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "README.md", "llmos_weather_2.py", "pyproject.toml", "test_weather_2.py",
    ]  # fmt: skip
    assert "there already" in sh("service", "new", "weather_2", "--path", str(folder)).err
    # As installed: the entry point is one of the things that its own tests look for.
    (info := folder / "llmos_weather_2-1.dist-info").mkdir()
    (info / "METADATA").write_text("Name: llmos-weather-2\nVersion: 1\n")
    entry = "[llmos.services]\nweather_2 = llmos_weather_2:Weather2\n"
    (info / "entry_points.txt").write_text(entry)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        env={**os.environ, "PYTHONPATH": str(folder)}, cwd=folder, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert "4 passed" in ran.stdout


def test_dry_run_says_what_it_would_take_and_leaves_nothing(sh: Shell, site: Site) -> None:
    before = sh("ps", "-a", "--json").json
    out = sh.ok("run", "toy", "x", "--dry-run")
    assert "would take" in out
    assert sh("ps", "-a", "--json").json == before


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("frobnicate", 2, "there is no command 'frobnicate'"),
        ("kil 3", 2, "did you mean `kill`?"),
        ("pretrian x", 2, "did you mean `pretrain`?"),
        ("infer toy x", 2, "use `llmos run`"),
        ("spin", 2, "there is no command 'spin'"),
        ("ps --jsn", 2, "did you mean `--json`?"),
        ("pretrain --stepz 4 x", 2, "did you mean `--steps`?"),
        ("run toy x --max-tokens many", 2, "takes a whole number"),
        ("run toy x --dtype float99", 2, "is one of auto, float32, bfloat16"),
        ("kill", 2, "PID is missing"),
        ("kill -WHAT 3", 2, "there is no flag -WHAT"),
        ("kill --signal WHAT 3", 2, "there is no signal 'WHAT'"),
        ("renice 20 1", 2, "--nice is at most 19"),
        ("renice 1", 2, "nothing to change"),
        ("renice --deadline -5 1", 2, "--deadline"),
        ("renice --class urgent 1", 2, "--class is one of"),
        ("nice", 2, "COMMAND is missing"),
        ("kill 999999", 1, "there is no process 999999"),
        ("kill nobody", 1, "there is no process 'nobody'"),
        ("attach 999999", 1, "there is no process 999999"),
        ("explain 999999", 1, "there is no process 999999"),
        ("logs 999999", 1, "there is no process 999999"),
        ("run no-such-model x", 1, "no-such-model"),
        ("call models.nothing", 1, "nothing"),
        ("call nobody.ls", 1, "nobody"),
        ("call models.show toy", 2, "an argument is written --name value or name=value"),
        ("call models.show --nam toy", 2, "did you mean `--name`?"),
        ("call models.show nam=toy", 2, "there is no argument nam"),
        ("call models.show", 2, "--name is missing"),
        ("call models.register --name x --folder y --kind z --made-by no", 2, "takes a JSON map"),
        ("service stop models", 1, "cannot be stopped"),
        ("service frobnicate", 2, "action is one of ls, start, stop, restart"),
        ("service new", 2, "needs the name of a service"),
        ("service new 3x", 1, "'3x' is no name for a service"),
        ("help modls.ls", 2, "there is no command 'modls.ls'"),
        ("help models.lss", 1, "service models has no call 'lss'"),
        ("service restart", 2, "needs the name of a service"),
        ("service logs nobody", 1, "there is no service 'nobody'"),
        ("models show absent", 1, "absent"),
        ("run toy x --device cuda7", 1, "cuda7"),
    ],
)
def test_wrong_input_is_one_clear_line_and_what_to_do(
    sh: Shell, line: str, status: int, says: str
) -> None:
    before = sh("ps", "--json").json
    ran = sh(*line.split())
    assert ran.status == status
    assert says in ran.err
    assert ran.err.startswith("llmos: ")
    assert ran.err.count("\n") <= 2
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert [q["pid"] for q in sh("ps", "--json").json] == [q["pid"] for q in before]


def test_a_name_that_two_processes_have_is_refused_with_their_pids(sh: Shell, site: Site) -> None:
    pids = [site.spin(steps=0, name="twin") for _ in range(2)]
    ran = sh("kill", "twin")
    assert ran.status == 1
    assert f"{pids[0]}, {pids[1]}" in ran.err


@pytest.mark.parametrize(
    "line", ["ps", "status", "mem", "top -1", "models", "service", "kill 1", "logs 1", "shutdown",
             "attach 1", "explain 1", "call models.ls", "run m x", "chat m", "pretrain x"],
)  # fmt: skip
def test_without_a_kernel_every_command_says_how_to_boot(sh_off: Shell, line: str) -> None:
    ran = sh_off(*line.split())
    assert ran.status == 1
    assert ran.err.startswith("llmos: no kernel runs for the home")
    assert "llmos boot" in ran.err
    assert ran.out == ""


def test_help_works_without_a_kernel_and_flags_come_from_the_cached_manifest(
    sh_off: Shell, site: Site
) -> None:
    assert "`llmos boot` starts one" in sh_off("help").err
    with pytest.raises(LlmosError, match="the flags of `pretrain` are not known yet"):
        find(Context(sh_off.home), "pretrain")
    cached = (site.home.path / "manifest.json").read_bytes()
    (sh_off.home.path / "manifest.json").write_bytes(cached)
    assert "--steps" in sh_off.ok("pretrain", "--help")
    assert "pretrain" in sh_off.ok("help")


def test_a_bug_is_one_line_too(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Context) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Context, "client", broken)
    ran = sh("ps")
    assert ran.status == 1
    assert "llmos: ZeroDivisionError: oops" in ran.err
    assert "Traceback" not in ran.err


def test_a_model_is_loaded_kept_and_unloaded(sh: Shell, site: Site) -> None:
    loaded = sh("load", "toy", "--keep-alive", "90s")
    assert loaded.status == 0
    assert "for 1:30 after its last use" in loaded.err
    (engine,) = [p for p in sh("ps", "--json").json if p["role"] == "engine"]
    assert engine["args"]["keep_alive_s"] == 90
    again = sh("load", "toy", "--json").json
    assert (again["pid"], again["keep_alive_s"]) == (engine["pid"], -1)
    with site.client() as client:
        guest = client.submit("infer", {"model": "toy", "prompt": "x", "max_tokens": 100_000})
        refused = sh("unload", "toy")
        assert refused.status == 1
        assert f"in use by process {guest} (infer)" in refused.err
        client.kill(guest)
    assert "is unloaded" in sh("stop", "toy").err
    assert not [p for p in sh("ps", "--json").json if p["role"] == "engine"]
    assert "toy is not loaded" in sh("unload", "toy").err
    assert "no-such-model" in sh("load", "no-such-model").err


@pytest.mark.parametrize(
    ("line", "same"), [("list", "models"), ("ls", "models"), ("show toy", "models show toy")]
)
def test_models_have_the_names_that_fingers_know(sh: Shell, line: str, same: str) -> None:
    assert sh.ok(*line.split()) == sh.ok(*same.split())
    assert sh.ok(line.split()[0], "--help") == sh.ok("models", "--help")
