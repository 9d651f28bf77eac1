"""Models load from folders, and what is wrong with one is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.model.load import load_causal_lm, load_config, load_tokenizer, resolve_dtype
from support.shared import shared
from support.texts import toy_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toy_model(tmp_path / "toy", "transformer")


def test_a_cut_weight_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"toy/model\.safetensors is not a whole safetensors file"):
        load_causal_lm(folder)


def test_a_weight_file_of_other_bytes_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a model at all, but longer than a header")
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        load_causal_lm(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"has no \.safetensors file"):
        load_causal_lm(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no config\.json"):
        load_causal_lm(tmp_path)


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such model folder"):
        load_causal_lm(tmp_path / "gone")


def test_a_file_is_not_a_model_folder(folder: Path) -> None:
    with pytest.raises(BadInput, match="is a file"):
        load_config(folder / "config.json")


def test_a_broken_tokenizer_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot load the tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in caught.value.message


def test_a_broken_config_is_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match="cannot load the model") as caught:
        load_config(folder)
    assert "\n" not in caught.value.message


def test_code_of_a_model_repository_is_never_run(folder: Path) -> None:
    config = folder / "config.json"
    text = config.read_text().replace('"model_type": "llama"', '"model_type": "theirs"')
    text = text.replace("{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1)
    config.write_text(text)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(BadInput):
        load_config(folder)
    assert not (folder / "ran").exists()


def test_weights_of_the_stored_type_stay_mapped(folder: Path) -> None:
    file = str(folder / "model.safetensors")
    model = load_causal_lm(folder, "float32")
    mapped = [
        tuple(int(x, 16) for x in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(file)
    ]
    for parameter in model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped)


def test_auto_is_one_of_the_two_types_and_others_are_refused() -> None:
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(BadArgument, match="no dtype 'int8'"):
        resolve_dtype("int8")


@pytest.mark.slow
def test_a_real_model_loads_in_both_types() -> None:
    ref = shared("models/stories260K")
    assert load_causal_lm(ref, "float32").dtype is torch.float32
    assert load_causal_lm(ref, "bfloat16").dtype is torch.bfloat16
    tokenizer = load_tokenizer(ref)
    assert tokenizer.decode(tokenizer("Once upon a time").input_ids[1:]) == "Once upon a time"
