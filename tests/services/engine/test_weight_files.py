"""Weights are converted once, mapped by every engine, and made anew when something is wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmos.kernel.errors import BadArgument
from llmos.services.engine import weight_files
from llmos.services.engine.native import weights as native
from llmos.services.engine.plan import plan_engine
from llmos.services.engine.weights import load
from support.small_models import VOCABULARY, make_gpt2, make_llama

KINDS = ["float32", "int8"]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if native.kernels() is None:
        pytest.skip(f"no kernels here: {native.why_not()}")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def files(home: Path) -> list[Path]:
    return sorted((home / "weights").iterdir())


def scores(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def refuse(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_second_engine_maps_what_the_first_has_made(
    dtype: str, llama: Path, home: Path
) -> None:
    first = load(str(llama), dtype, "cpu", home, refuse)
    (path,) = files(home)
    inode = path.stat().st_ino
    second = load(str(llama), dtype, "cpu", home, refuse)
    private = load(str(llama), dtype, "cpu")
    assert [p.stat().st_ino for p in files(home)] == [inode]
    assert torch.equal(scores(first), scores(second))
    assert torch.equal(scores(first), scores(private))
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    assert len(mapped) >= 2
    weight = second.model.layers[0].self_attn.q_proj.panels.data
    assert weight.data_ptr() % 64 == 0
    assert second.generation_config.eos_token_id == 0
    assert path.stat().st_mode & 0o077 == 0


def test_each_kind_of_weights_has_a_file_of_its_own(llama: Path, home: Path) -> None:
    for dtype in KINDS:
        load(str(llama), dtype, "cpu", home, refuse)
    assert len(files(home)) == len(KINDS)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "other"])
def test_a_damaged_file_is_made_anew(damage: str, llama: Path, home: Path) -> None:
    expected = scores(load(str(llama), "float32", "cpu", home, refuse))
    (path,) = files(home)
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-1],
        "header": whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        "empty": b"",
        "other": b"x" * len(whole),
    }[damage]
    assert broken != whole
    path.write_bytes(broken)
    assert torch.equal(scores(load(str(llama), "float32", "cpu", home, refuse)), expected)
    assert [p.read_bytes() for p in files(home)] == [whole]


def test_a_model_that_changed_has_a_new_file_and_the_old_one_goes(
    tmp_path: Path, home: Path
) -> None:
    model = make_llama(tmp_path / "model")
    before = scores(load(str(model), "float32", "cpu", home, refuse))
    (old,) = files(home)
    make_llama(model, seed=1)
    after = scores(load(str(model), "float32", "cpu", home, refuse))
    assert not torch.equal(before, after)
    (new,) = files(home)
    assert new != old


def test_a_model_that_is_removed_takes_its_files_along(
    tmp_path: Path, llama: Path, home: Path
) -> None:
    model = make_llama(tmp_path / "model", seed=3)
    for folder in (llama, model):
        load(str(folder), "float32", "cpu", home, refuse)
    (gone,) = [p for p in files(home) if p.name.startswith("model-")]
    size = gone.stat().st_size
    assert weight_files.forget(home, model) == size
    assert not gone.exists()
    assert len(files(home)) == 1
    assert weight_files.forget(home, model) == 0


def test_what_was_not_used_for_longest_goes_when_there_are_too_many(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_llama(tmp_path / f"m{n}", seed=n) for n in range(3)]
    load(str(models[0]), "float32", "cpu", home, refuse)
    load(str(models[1]), "float32", "cpu", home, refuse)
    for path, age in zip(files(home), (10, 20), strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    load(str(models[1]), "float32", "cpu", home, refuse)  # used: now it is the newer one
    size = files(home)[0].stat().st_size

    class Disk:
        f_bavail, f_frsize = 8 * size, 1

    monkeypatch.setattr(weight_files.os, "statvfs", lambda path: Disk)
    monkeypatch.setattr(weight_files, "LEFT_BYTES", 0)
    load(str(models[2]), "float32", "cpu", home, refuse)
    assert [p.name[:3] for p in files(home)] == ["m1-", "m2-"]


@pytest.mark.parametrize("where", ["posix_fallocate", "link", "fsync"])
def test_without_room_for_a_file_the_weights_are_private(
    where: str, llama: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_files.os, where, full)
    notes: list[str] = []
    made = load(str(llama), "float32", "cpu", home, notes.append)
    (note,) = notes
    assert "No space left" in note
    assert "\n" not in note
    assert files(home) == []
    assert torch.equal(scores(made), scores(load(str(llama), "float32", "cpu")))


def test_of_two_that_make_a_file_at_once_the_first_one_stays(llama: Path, home: Path) -> None:
    key, table = {"files": []}, [["a", "torch.uint8", [4], 0]]
    path = home / "weights" / "a.weights"

    def fill(number: int) -> Callable[[memoryview], None]:
        def filled(memory: memoryview) -> None:
            memory[:4] = bytes([number]) * 4

        return filled

    def slow(memory: memoryview) -> None:
        fill(1)(memory)
        weight_files.make(path, key, llama, table, 4, fill(2))

    weight_files.make(path, key, llama, table, 4, slow)
    found = weight_files.opened(path, key, table)
    assert found is not None
    assert found.memory[found.start :] == b"\2\2\2\2"
    assert files(home) == [path]


def test_numbers_of_a_mapped_file_are_not_changed_by_writing_to_them(
    llama: Path, home: Path
) -> None:
    model = load(str(llama), "float32", "cpu", home, refuse)
    (path,) = files(home)
    whole = path.read_bytes()
    model.model.norm.weight.add_(1)
    assert path.read_bytes() == whole


def test_a_plan_counts_the_file_once_for_all_engines(
    llama: Path, home: Path, tmp_path: Path
) -> None:
    load(str(llama), "int8", "cpu", home, refuse)
    (path,) = files(home)
    segments = [s for s in plan_engine(str(llama), "int8").segments if s.kind == "weights"]
    (segment,) = segments
    assert 0 <= path.stat().st_size - segment.bytes <= 2 * weight_files.PAGE + 4096
    again = [s for s in plan_engine(str(llama), "int8").segments if s.kind == "weights"]
    other = [s for s in plan_engine(str(llama), "float32").segments if s.kind == "weights"]
    assert segments == again
    assert segment.shared != other[0].shared
    assert segment.bytes < 0.45 * other[0].bytes


def test_int8_is_refused_where_it_is_not_known(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadArgument, match="CPU"):
        load(str(llama), "int8", "cuda:0")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    with pytest.raises(BadArgument, match="bloom"):
        load(str(tmp_path / "bloom"), "int8", "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_without_a_compiler_every_kind_is_served_in_torch_alone(
    dtype: str, llama: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scores(load(str(llama), "float32", "cpu"))
    monkeypatch.setitem(native._state, "found", "there is no C++ compiler (g++) here")
    model = load(str(llama), dtype, "cpu", home, refuse)
    tolerance = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1}[dtype]
    found = scores(model).float()
    assert (found - expected).norm() < tolerance * expected.norm()
    assert not (home / "weights").exists()
    assert not [s for s in plan_engine(str(llama), "bfloat16").segments if s.shared]


def test_gpt2_is_served_from_panels_too(tmp_path: Path, home: Path) -> None:
    folder = make_gpt2(tmp_path / "gpt2")
    model = load(str(folder), "float32", "cpu", home, refuse)
    from transformers import AutoModelForCausalLM

    expected = scores(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(scores(model), expected, rtol=1e-4, atol=1e-4)
