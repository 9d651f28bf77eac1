"""A plan answers quickly, allocates nothing, and says what is wrong with the input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.programs.base import Footprint, describe
from llmos.services.programs.finetune import Finetune
from llmos.services.programs.pretrain import Pretrain
from support.texts import story_file, toy_model


def plan(tmp_path: Path, **args: Any) -> Footprint:
    data = story_file(tmp_path / "t.txt", 200)
    return Pretrain.plan(Pretrain.Args(**{"data": str(data), "out": "m", **args}))


def kind(footprint: Footprint, name: str) -> int:
    return sum(s.bytes for s in footprint.segments if s.kind == name)


def test_the_schemas_import_without_torch() -> None:
    code = (
        "import sys, llmos.services.programs.pretrain, llmos.services.programs.finetune\n"
        "raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_positional_arguments_come_in_the_order_in_which_they_are_typed() -> None:
    def positional(program: Any) -> list[str]:
        return [a["name"] for a in describe(program)["args"] if a["positional"]]

    assert positional(Pretrain) == ["data"]
    assert positional(Finetune) == ["model", "data"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["rnn", "lstm", "gru", "transformer"])
def test_weights_gradients_and_moments_are_counted_exactly(arch: str, tmp_path: Path) -> None:
    from llmos.services.model.families import Shape, build

    footprint = plan(tmp_path, arch=arch, width=64, layers=2, vocab_size=500)
    model = build(arch, Shape(500, 128, 64, layers=2, heads=4))
    count = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert kind(footprint, "weights") == 4 * count + buffers
    assert kind(footprint, "gradients") == 4 * count
    # Two moments, and a counter of steps for each parameter.
    assert 0 <= kind(footprint, "optimizer") - 8 * count <= 8 * len(list(model.parameters()))


@pytest.mark.slow
def test_a_rank_of_a_gang_is_planned_with_gradients_that_stay(tmp_path: Path) -> None:
    one, two = plan(tmp_path), plan(tmp_path, devices=2)
    assert two.total_bytes == plan(tmp_path, devices=4).total_bytes  # of one device, however many
    assert two.total_bytes == plan(tmp_path, accumulate=2).total_bytes
    assert two.total_bytes - one.total_bytes <= 1.05 * kind(two, "gradients")


@pytest.mark.slow
def test_a_plan_for_a_gpu_counts_nothing_of_the_hosts_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = plan(tmp_path)
    monkeypatch.setenv("LLMOS_DEVICE", "cuda")
    there = plan(tmp_path)
    assert (kind(there, "context"), kind(there, "export")) == (0, 0)
    assert kind(there, "activations") < kind(here, "activations")
    assert kind(there, "optimizer") == kind(here, "optimizer")


@pytest.mark.slow
def test_an_absurd_batch_gives_an_absurd_number_quickly(tmp_path: Path) -> None:
    plan(tmp_path)  # imports
    began = time.perf_counter()
    footprint = plan(tmp_path, batch=10_000_000, width=8192, layers=96, heads=64)
    assert footprint.total_bytes > 1 << 50
    assert time.perf_counter() - began < 5.0


@pytest.mark.slow
def test_a_larger_batch_needs_more_and_bfloat16_less(tmp_path: Path) -> None:
    small, middle, large = (plan(tmp_path, batch=n).total_bytes for n in (8, 16, 24))
    assert large - middle == pytest.approx(middle - small, rel=0.1)  # and what the heap makes of it
    full, half = plan(tmp_path, dtype="float32"), plan(tmp_path, dtype="bfloat16")
    assert kind(half, "activations") < kind(full, "activations")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"data": "/no/such/file.txt"}, BadInput, "no such file or folder: /no/such/file.txt"),
        ({"width": 100, "heads": 3}, BadArgument, "width 100 cannot be divided among 3 heads"),
        ({"optimizer": "lion"}, BadArgument, "no optimizer 'lion'"),
        ({"context": 1_000_000}, BadInput, "is too short"),
        ({"tokenizer": "/no/such/model"}, BadInput, "no such model folder"),
    ],
)
def test_wrong_input_is_found_before_anything_runs(
    args: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        plan(tmp_path, **args)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"ab\xff", "is not UTF-8: byte 2 is 0xff")]
)
def test_unreadable_text_is_found_before_anything_runs(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        plan(tmp_path, data=str(path))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a", "answer": "b"}) for _ in range(9)))
    return path


def finetune_plan(model: Path, data: Path, **args: Any) -> Footprint:
    given = {"model": str(model), "data": str(data), "out": "m", "context": 64, **args}
    return Finetune.plan(Finetune.Args(**given))


@pytest.mark.slow
def test_lora_needs_far_less_and_shares_the_weights_it_leaves_alone(
    tmp_path: Path, pairs: Path
) -> None:
    model = toy_model(tmp_path / "base", "transformer", width=128)
    full = finetune_plan(model, pairs)
    lora = finetune_plan(model, pairs, method="lora", lora_rank=1)
    assert kind(lora, "optimizer") < kind(full, "optimizer") / 10
    (shared,) = [s for s in lora.segments if s.shared]
    assert shared.shared == str(model / "model.safetensors")
    assert shared.bytes == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.05)


def test_a_broken_model_is_found_before_anything_runs(tmp_path: Path, pairs: Path) -> None:
    model = toy_model(tmp_path / "base", "transformer")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BadInput, match=r"model\.safetensors is not a whole safetensors file"):
        finetune_plan(model, pairs)


def test_a_context_beyond_the_positions_of_the_model_is_refused(
    tmp_path: Path, pairs: Path
) -> None:
    model = toy_model(tmp_path / "base", "transformer", context=64)
    with pytest.raises(BadArgument, match="the model has 64 positions, --context is 65"):
        finetune_plan(model, pairs, context=65)


def test_lora_on_a_recurrent_model_is_found_before_anything_runs(
    tmp_path: Path, pairs: Path
) -> None:
    model = toy_model(tmp_path / "base", "gru")
    with pytest.raises(BadArgument, match="no linear layers for LoRA"):
        finetune_plan(model, pairs, method="lora")


def test_a_layer_that_lora_cannot_find_is_named_with_those_there_are(
    tmp_path: Path, pairs: Path
) -> None:
    model = toy_model(tmp_path / "base", "transformer")
    with pytest.raises(BadArgument, match="no linear layer qkv") as caught:
        finetune_plan(model, pairs, method="lora", lora_targets=["qkv"])
    assert "q_proj" in caught.value.hint
