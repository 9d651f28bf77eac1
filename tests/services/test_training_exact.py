"""A training that is interrupted and restored ends in the same bits as an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmos.kernel.errors import BadInput
from llmos.services.programs.base import Program
from llmos.services.programs.finetune import Finetune
from llmos.services.programs.pretrain import Pretrain
from support.run_program import Run, make_context
from support.texts import story_file, toy_model

SMALL: dict[str, Any] = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "vocab_size": 300,
    "context": 16,
    "batch": 2,
    "accumulate": 2,
    "steps": 9,
    "dropout": 0.1,
    "threads": 1,
}


def weights(run: Run) -> dict[str, torch.Tensor]:
    assert run.done is not None
    return load_file(Path(run.done.result["folder"]) / "model.safetensors")


def losses(run: Run) -> list[float]:
    return [r.metrics["loss"] for r in run.reports if "lr" in r.metrics]


def check_exact(program: type[Program], tmp_path: Path, **args: Any) -> Run:
    """Undisturbed against saved after 4 steps and restored by a new instance."""
    whole = Run.start(program, make_context(tmp_path / "a"), **args)
    whole.to_end()
    first = Run.start(program, make_context(tmp_path / "b"), **args).steps(4)
    folder = first.save(tmp_path / "checkpoint")
    first.steps(2)  # what is lost with the first worker
    second = Run.resume(program, make_context(tmp_path / "b"), folder, **args)
    second.to_end()
    assert losses(second) == losses(whole)[4:]
    assert second.done is not None
    assert whole.done is not None
    assert second.done.result["loss"] == whole.done.result["loss"]
    mine, theirs = weights(second), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["rnn", "lstm", "gru", "transformer"])
def test_a_restored_pretraining_ends_in_the_same_bits(
    arch: str, dtype: str, tmp_path: Path
) -> None:
    data = story_file(tmp_path / "t.txt", 60)
    check_exact(Pretrain, tmp_path, data=str(data), out="m", arch=arch, dtype=dtype, **SMALL)


@pytest.mark.slow
def test_an_epoch_can_be_left_and_entered_in_its_middle(tmp_path: Path) -> None:
    # 6 examples a step of about 11 blocks: the save after step 4 lies inside a later epoch.
    data = story_file(tmp_path / "t.txt", 16)
    args = {**SMALL, "accumulate": 3, "steps": 12}
    run = check_exact(Pretrain, tmp_path, data=str(data), out="m", **args)
    assert isinstance(run.program, Pretrain)
    order = json.loads((tmp_path / "checkpoint" / "state.json").read_text())["order"]
    assert order["epoch"] > 0
    assert 0 < order["position"] < run.program.session.order.count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_restored_finetuning_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    base = toy_model(tmp_path / "base", "transformer")
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"what is {i}?", "answer": f"it is {i * i}"} for i in range(30)]
    data.write_text("\n".join(map(json.dumps, rows)))
    check_exact(
        Finetune,
        tmp_path,
        model=str(base),
        data=str(data),
        out="m",
        method=method,
        lora_dropout=0.1,
        context=64,
        batch=2,
        accumulate=2,
        steps=9,
        threads=1,
    )


@pytest.mark.slow
def test_a_validation_can_be_left_and_entered_in_its_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.services.programs.lm_session.EVALUATION_SLICE_S", 1e-9)
    data = story_file(tmp_path / "t.txt", 60)
    args = {**SMALL, "data": str(data), "out": "m", "steps": 3, "val_fraction": 0.3}
    whole = Run.start(Pretrain, make_context(tmp_path / "a"), **args)
    whole.to_end()
    first = Run.start(Pretrain, make_context(tmp_path / "b"), **args).steps(5)
    assert isinstance(first.program, Pretrain)
    assert first.program.session.place.phase == "validate"
    folder = first.save(tmp_path / "checkpoint")
    second = Run.resume(Pretrain, make_context(tmp_path / "b"), folder, **args)
    assert second.to_end().result["perplexity"] == whole.done.result["perplexity"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    data = story_file(tmp_path / "t.txt", 60)
    args = {**SMALL, "data": str(data), "out": "m", "steps": 3}
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs.append(Run.start(Pretrain, make_context(tmp_path / name), seed=seed, **args))
        runs[-1].to_end()
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0]) != losses(runs[2])


@pytest.mark.slow
def test_a_checkpoint_is_a_model_folder_without_pickles(tmp_path: Path) -> None:
    from llmos.services.model.load import load_causal_lm, load_tokenizer

    data = story_file(tmp_path / "t.txt", 60)
    run = Run.start(Pretrain, make_context(tmp_path), data=str(data), out="m", **SMALL).steps(2)
    folder = run.save(tmp_path / "checkpoint")
    assert isinstance(run.program, Pretrain)
    model = load_causal_lm(folder, "float32")
    trained = run.program.session.loop.model.state_dict()
    assert all(torch.equal(t, trained[k]) for k, t in model.state_dict().items())
    ids = load_tokenizer(folder)("One day", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape[-1] == model.config.vocab_size
    assert {p.suffix for p in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}


@pytest.mark.slow
def test_a_run_restored_on_another_machine_says_so_and_keeps_its_threads(tmp_path: Path) -> None:
    data = story_file(tmp_path / "t.txt", 60)
    args = {**SMALL, "data": str(data), "out": "m", "threads": 0}
    run = Run.start(Pretrain, make_context(tmp_path, threads=1), **args).steps(1)
    folder = run.save(tmp_path / "checkpoint")
    state = json.loads((folder / "state.json").read_text())
    state["machine"]["torch"] = "2.0"
    (folder / "state.json").write_text(json.dumps(state))
    ctx = make_context(tmp_path, threads=2)
    Run.resume(Pretrain, ctx, folder, **args)
    (note,) = ctx.of_kind("note")
    assert "torch" in note["text"]
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    args = {**SMALL, "out": "m"}
    one, two = story_file(tmp_path / "1.txt", 60), story_file(tmp_path / "2.txt", 80)
    run = Run.start(Pretrain, make_context(tmp_path / "a"), data=str(one), **args).steps(1)
    folder = run.save(tmp_path / "checkpoint")
    with pytest.raises(BadInput, match="changed since its checkpoint"):
        Run.resume(Pretrain, make_context(tmp_path / "b"), folder, data=str(two), **args)


@pytest.mark.slow
def test_data_that_changes_during_a_run_changes_nothing(tmp_path: Path) -> None:
    data = story_file(tmp_path / "t.txt", 60)
    args = {**SMALL, "data": str(data), "out": "m"}
    folder = (
        Run.start(Pretrain, make_context(tmp_path), **args).steps(1).save(tmp_path / "checkpoint")
    )
    data.unlink()
    Run.resume(Pretrain, make_context(tmp_path), folder, **args).steps(1)


def shrunk(tmp_path: Path, **args: Any) -> Run:
    """Four steps, then half the micro-batch."""
    run = Run.start(Pretrain, make_context(tmp_path), **args).steps(4)
    assert run.program.shrink(run.ctx, "caches"), "nothing to drop is no refusal"
    assert run.program.shrink(run.ctx, "batch")
    return run


def test_a_smaller_micro_batch_keeps_the_batch_and_is_said_and_recorded(tmp_path: Path) -> None:
    data = story_file(tmp_path / "t.txt", 100)
    args = {**SMALL, "data": str(data), "out": "m", "batch": 5, "dropout": 0.0,
            "dtype": "float32", "may_shrink": True}  # fmt: skip
    whole = Run.start(Pretrain, make_context(tmp_path / "a"), **args)
    whole.to_end()
    run = shrunk(tmp_path / "b", **args)
    run.to_end()
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(run)[:4] == losses(whole)[:4]
    assert run.done is not None
    assert run.done.result["shrunk"] == [{"step": 4, "micro_batch": 3}]
    assert whole.done is not None
    assert "shrunk" not in whole.done.result
    (note,) = [r["text"] for r in run.ctx.of_kind("note") if "micro-batch" in r["text"]]
    assert note.startswith("micro-batch 5 -> 3 after step 4")
    (registered,) = [a for method, a in run.ctx.calls if method == "models.register"]
    assert registered["made_by"]["shrunk"] == run.done.result["shrunk"]


def test_a_run_that_shrank_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data = story_file(tmp_path / "t.txt", 100)
    args = {**SMALL, "data": str(data), "out": "m", "may_shrink": True}
    whole = shrunk(tmp_path / "a", **args)
    whole.to_end()
    first = shrunk(tmp_path / "b", **args).steps(2)
    folder = first.save(tmp_path / "checkpoint")
    second = Run.resume(Pretrain, make_context(tmp_path / "b"), folder, **args)
    second.to_end()
    assert losses(second) == losses(whole)[6:]
    mine, theirs = weights(second), weights(whole)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_run_shrinks_only_where_that_was_allowed_and_to_one_example_at_least(
    tmp_path: Path,
) -> None:
    data = story_file(tmp_path / "t.txt", 100)
    args = {**SMALL, "data": str(data), "out": "m", "batch": 3}
    run = Run.start(Pretrain, make_context(tmp_path / "a"), **args).steps(1)
    assert not run.program.shrink(run.ctx, "batch")
    assert not run.ctx.of_kind("note")
    run = Run.start(Pretrain, make_context(tmp_path / "b"), **args, may_shrink=True).steps(1)
    assert [run.program.shrink(run.ctx, "batch") for _ in range(3)] == [True, True, False]
    run.steps(1)
