"""What the pages say about a running machine, compared with one.

The blocks of python-api.md run in their order; the plugins of the guides run; the JSON keys and the
files of the home are those of the kernel that did all that.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel.errors import BadInput, NoSuchThing
from llmos.shell import Client
from support.pages import DOCS, ROOT, blocks, named_files, table_keys, table_rows
from support.run_program import Run, make_context

pytestmark = pytest.mark.slow  # one real kernel for all of them

REFERENCE = DOCS / "reference"


@pytest.fixture(scope="module")
def client(machine: Any) -> Iterator[Client]:
    with Client(machine.home) as connected:
        yield connected


@pytest.fixture(scope="module")
def ran(machine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blocks of python-api.md, run in one namespace; where they ran."""
    folder = tmp_path_factory.mktemp("api")
    namespace: dict[str, Any] = {"__name__": "python_api"}
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOS_HOME", str(machine.home))
        os.chdir(folder)
        try:
            for number, block in enumerate(blocks(DOCS / "guides" / "python-api.md", "python"), 1):
                exec(compile(block, f"python-api.md, block {number}", "exec"), namespace)
        finally:
            os.chdir(before)
    return folder


def test_the_blocks_of_the_python_page_run(ran: Path, client: Client) -> None:
    assert (ran / "fox.txt").is_file()
    assert "fox" in [m["name"] for m in client.call("models.ls")]
    assert not [p for p in client.ps() if p["role"] in ("process", "guest")], "left running"


@pytest.mark.long
def test_the_python_example_of_the_readme_runs(
    machine: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 2000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMOS_HOME", str(machine.home))
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.startswith("1 ")


def test_the_program_of_the_guide_runs(client: Client, tmp_path: Path) -> None:
    pid = client.submit("linefit", {"data": write_points(tmp_path), "steps": 2000})
    ended = client.wait(pid, 60)
    assert ended["exit_status"] == 0, ended
    assert ended["result"]["slope"] == pytest.approx(3, abs=1e-3)
    assert ended["result"]["offset"] == pytest.approx(1, abs=1e-3)


def test_the_program_of_the_guide_goes_on_exactly_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = named_files(DOCS / "guides" / "write-a-program.md")["linefit/llmos_linefit.py"]
    (tmp_path / "llmos_linefit.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    program = importlib.import_module("llmos_linefit").LineFit
    ctx, args = make_context(tmp_path), {"data": str(write_points(tmp_path)), "steps": 50}
    whole = Run.start(program, ctx, **args).to_end()
    folder = Run.start(program, ctx, **args).steps(20).save(tmp_path / "checkpoint")
    assert Run.resume(program, ctx, folder, **args).to_end() == whole


def write_points(folder: Path) -> Path:
    points = folder / "points.csv"
    points.write_text("".join(f"{x / 10},{3 * x / 10 + 1}\n" for x in range(10)))
    return points


def test_the_program_of_the_guide_refuses_what_is_no_file_of_points(
    client: Client, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n")
    with pytest.raises(BadInput, match=r"wrong\.csv"):
        client.submit("linefit", {"data": wrong})


def test_the_program_of_the_guide_is_a_command(machine: Any) -> None:
    assert "Usage: llmos linefit [options] DATA" in machine.llmos("linefit", "--help").stdout


def test_the_service_of_the_guide_answers_and_keeps_what_it_was_told(client: Client) -> None:
    client.call("glossary.define", word="lease", meaning="the right to use a device", kind="noun")
    assert client.call("glossary.of_models") == {}
    client.restart_service("glossary")
    assert client.call("glossary.look_up", word="lease") == "the right to use a device"
    with pytest.raises(NoSuchThing, match="not in the glossary"):
        client.call("glossary.look_up", word="unknown")


def keys(heading: str) -> set[str]:
    return set(table_keys(REFERENCE / "json.md", f"## {heading}\n"))


def parts_of(heading: str, key: str) -> set[str]:
    """The keys that a row lists for a value that is an object, or a list of them."""
    rows = table_rows(REFERENCE / "json.md", f"## {heading}\n")
    row = next(r for r in rows if f"`{key}`" in r[0])
    return set(re.findall(r"`(\w+)`", row[1]))


def shown(machine: Any, *words: str) -> Any:
    return json.loads(machine.llmos(*words, "--json").stdout)


def test_json_of_ps(machine: Any, ran: Path) -> None:
    processes = shown(machine, "ps", "-a")
    for process in processes:
        assert set(process) == keys("ps")
        assert set(process["memory"]) == parts_of("ps", "memory")
    progress = [p["progress"] for p in processes if p["progress"]]
    assert progress
    assert all(set(p) == parts_of("ps", "progress") for p in progress)
    saved = [p["checkpoint"] for p in processes if p["checkpoint"]]
    assert saved
    assert all(set(c) == parts_of("ps", "checkpoint") for c in saved)


def test_json_of_mem(machine: Any, ran: Path) -> None:
    for device in shown(machine, "mem"):
        assert set(device) == keys("mem")
        assert device["segments"]
        for segment in device["segments"]:
            assert set(segment) == parts_of("mem", "segments")


def test_json_of_status(machine: Any) -> None:
    status = shown(machine, "status")
    assert set(status) == keys("status")
    for key in ("kernel", "journal"):
        assert set(status[key]) == parts_of("status", key)
    assert set(status["devices"][0]) == parts_of("status", "devices")


def test_json_of_explain_and_wait(machine: Any, ran: Path) -> None:
    pid = str(next(p["pid"] for p in shown(machine, "ps", "-a") if p["program"] == "pretrain"))
    story = shown(machine, "explain", pid)
    assert set(story) == keys("explain")
    assert set(story["story"][0]) == parts_of("explain", "story")
    (ended,) = shown(machine, "wait", pid)
    assert set(ended) == keys("wait")


def test_json_of_models_and_services(machine: Any, ran: Path) -> None:
    for model in shown(machine, "models"):
        assert set(model) == keys("models")
    for service in shown(machine, "service"):
        assert set(service) == keys("service")


def test_every_file_of_the_home_is_documented(machine: Any, ran: Path) -> None:
    patterns = [_pattern(k) for k in table_keys(REFERENCE / "home.md", "# The home")]
    mine = {"site", "glossary.json"}  # put there by these tests, and by the guide's own service
    found = [p for p in machine.home.rglob("*") if p.relative_to(machine.home).parts[0] not in mine]
    strange = []
    for path in found:
        name = path.relative_to(machine.home).as_posix() + ("/" if path.is_dir() else "")
        if name.rstrip("/") not in ("models", "procs", "w") and not any(
            p.match(name) for p in patterns
        ):
            strange.append(name)
    assert not [s for s in strange if not re.fullmatch(r"(procs|w)/[\w-]+/(checkpoints/)?", s)]


def _pattern(documented: str) -> re.Pattern[str]:
    """`procs/PID/log` as a regular expression; a folder stands for what is in it too."""
    words = {"PID": r"\d+", "NAME": r"[\w.-]+", "WORKER": r"w\d+-\d+", "STEP": r"\d{9}"}
    text = re.escape(documented).replace(r"\.\.\.", ".*")
    for word, meaning in words.items():
        text = text.replace(word, meaning)
    return re.compile(f"{text}(?:.*)" if documented.endswith("/") else f"{text}/?$")


def test_the_driver_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(DOCS / "guides" / "write-a-driver.md", "python")
    exec(compile(block, "write-a-driver.md", "exec"), {"__name__": "driver_page"})
    assert "a_held_worker_can_be_killed" in capsys.readouterr().out
