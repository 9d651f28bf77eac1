"""The model registry: folders are the truth, a model is there whole or not at all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmos.kernel.errors import BadArgument, BadInput, Busy, NoSuchThing
from llmos.kernel.names import user_name
from llmos.services.engine import weight_files
from llmos.services.model.registry import ModelRegistry

MADE_BY = {"program": "pretrain", "pid": 12, "args": {"steps": 3}}


def write_model(folder: Path, numbers: int = 6) -> Path:
    """A whole causal-lm folder, as far as the registry looks."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.zeros((2, numbers // 2), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The processes that the kernel says use a model; a test may add some."""
    found: list[dict[str, Any]] = []

    def answer(method: str, arguments: dict[str, Any], limit_s: float | None) -> Any:
        assert method == "kernel.users_of"
        return [u for u in found if u["path"] == arguments["path"]]

    monkeypatch.setattr(ModelRegistry, "caller", staticmethod(answer))
    return found


@pytest.fixture
def registry(tmp_path: Path, users: list[dict[str, Any]]) -> ModelRegistry:
    return ModelRegistry(tmp_path)


def test_a_registered_model_is_listed_with_where_it_is_from(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "models" / ".partial-12")
    assert registry.ls() == [], "what is being made is not listed"
    registry.register("shakespeare", str(source), "causal-lm", MADE_BY)
    (entry,) = registry.ls()
    assert entry["name"] == "shakespeare"
    assert entry["kind"] == "causal-lm"
    assert entry["source"] == "pretrain (pid 12)"
    assert entry["parameters"] == 6
    assert entry["architecture"] == "LlamaForCausalLM"
    assert entry["folder"] == str(tmp_path / "models" / "shakespeare")
    assert entry["bytes"] > 24
    assert abs(entry["created_at"] - time.time()) < 60
    assert not source.exists()
    assert registry.show("shakespeare")["made_by"] == MADE_BY


def test_a_folder_copied_by_hand_is_a_model_too(registry: ModelRegistry, tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "copied", numbers=10)
    (entry,) = registry.ls()
    assert (entry["name"], entry["source"]) == ("copied", "local folder")
    assert (entry["kind"], entry["parameters"]) == ("causal-lm", 10)
    (tmp_path / "models" / "copied" / "model.safetensors").write_bytes(b"broken")
    assert registry.ls()[0]["parameters"] is None, "a broken file hides no model"


def test_an_adapter_names_its_base_as_this_home_does(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    write_model(models / "base")
    for name, base in (("mine", str(models / "base")), ("theirs", "org/model")):
        folder = models / name
        folder.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({"a": np.zeros((2, 3), np.float32)}, folder / "adapter_model.safetensors")
    found = {e["name"]: (e["kind"], e["base"], e["parameters"]) for e in registry.ls()}
    assert found == {
        "base": ("causal-lm", "", 6),
        "mine": ("adapter", "base", 6),
        "theirs": ("adapter", "org/model", 6),
    }
    with pytest.raises(Busy, match="adapter 'mine' cannot run without model 'base'"):
        registry.rm("base")
    registry.rm("mine")
    assert registry.rm("base")["freed_bytes"] > 0


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "with space", "x" * 129, "naïve"])
def test_names_that_are_no_folder_names_are_refused(
    name: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "models" / ".partial-1")
    with pytest.raises(BadArgument, match="name of a model"):
        registry.register(name, str(source), "causal-lm")
    assert source.exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_file_missing_is_refused(
    missing: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "models" / ".partial-1")
    (source / missing).unlink()
    with pytest.raises(BadInput, match="not a whole"):
        registry.register("m", str(source), "causal-lm")
    assert registry.ls() == []


def test_a_model_is_replaced_only_when_told_to(registry: ModelRegistry, tmp_path: Path) -> None:
    for pid, numbers in ((1, 6), (2, 8)):
        write_model(tmp_path / "models" / f".partial-{pid}", numbers)
    registry.register("m", str(tmp_path / "models" / ".partial-1"), "causal-lm")
    second = str(tmp_path / "models" / ".partial-2")
    with pytest.raises(BadArgument, match="already"):
        registry.register("m", second, "causal-lm")
    registry.register("m", second, "causal-lm", overwrite=True)
    assert [e["parameters"] for e in registry.ls()] == [8]
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["m"]


def test_a_folder_outside_the_home_and_an_unknown_kind_are_refused(
    registry: ModelRegistry, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = write_model(tmp_path_factory.mktemp("outside") / "m")
    with pytest.raises(BadInput, match="not a folder in"):
        registry.register("m", str(outside), "causal-lm")
    inside = write_model(tmp_path / "models" / ".partial-1")
    with pytest.raises(BadArgument, match="kind"):
        registry.register("m", str(inside), "poem")


def test_a_removed_model_is_gone(registry: ModelRegistry, tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "m")
    assert registry.rm("m")["freed_bytes"] > 0
    assert registry.ls() == []
    assert list((tmp_path / "models").iterdir()) == []
    with pytest.raises(NoSuchThing, match="no model 'm'"):
        registry.rm("m")
    with pytest.raises(NoSuchThing):
        registry.show("m")


def test_what_engines_made_of_a_removed_model_goes_with_it(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    folders = [write_model(tmp_path / "models" / name) for name in ("gone", "kept")]
    for folder in folders:
        path = tmp_path / "weights" / f"{folder.name}-1.weights"
        weight_files.make(path, {"files": []}, folder, [], 5000, lambda memory: None)
    before = (tmp_path / "weights" / "gone-1.weights").stat().st_size
    assert registry.rm("gone")["freed_bytes"] > before
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["kept-1.weights"]


def test_a_model_in_use_is_not_removed(
    registry: ModelRegistry, tmp_path: Path, users: list[dict[str, Any]]
) -> None:
    folder = write_model(tmp_path / "models" / "m")
    me = user_name(os.geteuid())
    engine = {"path": str(folder), "pid": 5, "program": "engine", "role": "engine", "user": me}
    guest = {"path": str(folder), "pid": 6, "program": "chat", "role": "guest"}
    for found, said in (
        ([engine, guest], "process 6 (chat)"),
        ([engine, guest, {**guest, "pid": 7}], "process 6 (chat) and 1 more"),
        ([engine], "process 5 (engine, loaded)"),
    ):
        users[:] = found
        with pytest.raises(Busy) as caught:
            registry.rm("m")
        assert f"model 'm' is in use by {said}" in caught.value.message
    assert "llmos unload m" in caught.value.hint
    users[:] = [{**engine, "user": "somebody else"}]
    assert registry.rm("m")["freed_bytes"] > 0


def test_what_is_shared_with_a_cache_frees_nothing(registry: ModelRegistry, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models" / "m")
    os.link(folder / "model.safetensors", tmp_path / "cached")
    size = (tmp_path / "cached").stat().st_size
    assert registry.rm("m")["freed_bytes"] < size
    assert (tmp_path / "cached").stat().st_size == size


def test_a_pulled_model_tells_its_source_and_its_license(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "models" / ".partial-3")
    made_by = {"program": "pull", "pid": 3, "source": "pip:x", "license": "MIT"}
    entry = registry.register("m", str(source), "causal-lm", made_by)
    assert (entry["source"], entry["license"]) == ("pip:x", "MIT")


def test_what_a_pull_has_fetched_stays_for_two_weeks(tmp_path: Path) -> None:
    for name, days in ((".pull-0-new", 13), (".pull-0-old", 15)):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "half.part").write_text("x")
        for path in (folder / "half.part", folder):
            os.utime(path, (time.time() - days * 86_400,) * 2)
    ModelRegistry(tmp_path)
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".pull-0-new"]


def test_what_a_crash_left_is_cleaned_and_what_is_being_made_stays(tmp_path: Path) -> None:
    old = write_model(tmp_path / "models" / ".partial-1")
    new = write_model(tmp_path / "models" / ".partial-2")
    hour_ago = time.time() - 3600
    for path in (*old.iterdir(), old):
        os.utime(path, (hour_ago, hour_ago))
    ModelRegistry(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_crash_in_the_middle_of_a_replacement_loses_no_model(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / ".replaced-m")
    assert [e["name"] for e in ModelRegistry(tmp_path).ls()] == ["m"]
    write_model(tmp_path / "models" / ".replaced-m", numbers=8)
    (entry,) = ModelRegistry(tmp_path).ls()
    assert entry["parameters"] == 6, "the new one is in place: the old one is not needed"
    assert not (tmp_path / "models" / ".replaced-m").exists()


def test_a_process_that_asks_again_after_a_crash_gets_its_model(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    """The answer, or the process, was lost after the model was in place."""
    partial = tmp_path / "models" / ".partial-12"
    registry.register("m", str(write_model(partial)), "causal-lm", MADE_BY)
    again = registry.register("m", str(partial), "causal-lm", MADE_BY)
    assert again["folder"] == str(tmp_path / "models" / "m")
    registry.register("m", str(write_model(partial)), "causal-lm", MADE_BY)
    assert not partial.exists()
    other = str(write_model(tmp_path / "models" / ".partial-13"))
    with pytest.raises(BadArgument, match="already"):
        registry.register("m", other, "causal-lm", {**MADE_BY, "pid": 13})
