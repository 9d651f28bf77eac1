"""What pretraining and fine-tuning do: they learn, report, obey limits and leave a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.model.load import load_causal_lm, load_tokenizer
from llmos.services.programs.finetune import Finetune
from llmos.services.programs.pretrain import Pretrain
from support.run_program import Run, make_context
from support.shared import shared
from support.texts import story_file, toy_model

SMALL: dict[str, Any] = {
    "out": "m",
    "width": 32,
    "layers": 1,
    "heads": 2,
    "vocab_size": 300,
    "context": 32,
    "batch": 8,
    "steps": 40,
    "lr": 1e-2,
    "threads": 1,
    "dtype": "float32",
}


def pretrained(tmp_path: Path, **args: Any) -> Run:
    data = story_file(tmp_path / "t.txt", 200)
    run = Run.start(Pretrain, make_context(tmp_path), **{**SMALL, "data": str(data), **args})
    run.to_end()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["rnn", "lstm", "gru", "transformer"])
def test_every_architecture_learns_and_leaves_a_model(arch: str, tmp_path: Path) -> None:
    run = pretrained(tmp_path, arch=arch)
    assert run.done is not None
    result = run.done.result
    assert run.reports[0].step == 1
    assert run.reports[0].metrics.keys() == {"loss", "tokens_per_s", "lr"}
    assert run.reports[0].metrics["loss"] == pytest.approx(math.log(300), rel=0.2)
    # The stories draw from few words: a model that learns nothing stays above 200.
    assert result["perplexity"] < 60
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["folder"] == str(run.ctx.home / "models" / "m")
    model = load_causal_lm(result["folder"], "float32")
    tokenizer = load_tokenizer(result["folder"])
    ids = tokenizer("One day", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("One day")
    assert not list((run.ctx.home / "models").glob(".partial*"))


@pytest.mark.slow
def test_the_perplexity_is_that_of_the_saved_model(tmp_path: Path) -> None:
    run = pretrained(tmp_path, steps=5)
    assert run.done is not None
    assert isinstance(run.program, Pretrain)
    session = run.program.session
    model = load_causal_lm(run.done.result["folder"], "float32")
    total, count = 0.0, 0
    for i in range(len(session.data.validation)):
        inputs, labels = map(
            torch.from_numpy, session.data.validation.batch(torch.tensor([i]).numpy())
        )
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
        total += loss.item()
        count += labels.numel()
    assert run.done.result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert run.ctx.of_kind("eval")[-1]["metrics"]["perplexity"] == run.done.result["perplexity"]


@pytest.mark.slow
def test_the_rate_follows_warmup_and_schedule(tmp_path: Path) -> None:
    run = pretrained(tmp_path, steps=20, warmup=0.25, lr=1.0e-3)
    rates = [r.metrics["lr"] for r in run.reports if "lr" in r.metrics]
    assert rates.index(max(rates)) == 4
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.slow
def test_a_time_limit_ends_a_run_and_its_schedule(tmp_path: Path) -> None:
    run = pretrained(tmp_path, steps=1_000_000, time_limit_s=0.5)
    assert run.done is not None
    rates = [r.metrics["lr"] for r in run.reports if "lr" in r.metrics]
    assert 1 < run.done.result["steps"] < 10_000
    assert rates[-1] < 0.5 * max(rates)
    assert all(r.total is not None and r.total >= r.step for r in run.reports)


@pytest.mark.slow
def test_validations_on_the_way_do_not_change_the_training(tmp_path: Path) -> None:
    plain = pretrained(tmp_path / "a", steps=12, dropout=0.1)
    looked = pretrained(tmp_path / "b", steps=12, dropout=0.1, eval_every=5)
    evals = [r["step"] for r in looked.ctx.of_kind("eval")]
    assert evals == [5, 10, 12]
    for run in (plain, looked):
        assert run.done is not None
    one, two = (
        load_file(Path(r.done.result["folder"]) / "model.safetensors") for r in (plain, looked)
    )  # type: ignore[union-attr]
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_accumulated_micro_batches_move_the_weights_as_one_batch(tmp_path: Path) -> None:
    whole = pretrained(tmp_path / "a", steps=4, batch=8)
    parts = pretrained(tmp_path / "b", steps=4, batch=2, accumulate=4)
    for a, b in zip(whole.reports[:4], parts.reports[:4], strict=True):
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_tokenizer_of_a_model_can_be_taken(tmp_path: Path) -> None:
    base = toy_model(tmp_path / "base", "gru")
    run = pretrained(tmp_path, steps=1, tokenizer=str(base))
    assert run.done is not None
    taken = load_tokenizer(run.done.result["folder"])
    assert taken.get_vocab() == load_tokenizer(base).get_vocab()


def test_a_name_that_is_taken_is_refused_unless_told(tmp_path: Path) -> None:
    toy_model(tmp_path / "home" / "models" / "m", "gru")
    with pytest.raises(BadArgument, match="there is a model 'm' already"):
        pretrained(tmp_path, steps=1)
    run = pretrained(tmp_path, steps=1, overwrite=True)
    assert run.done is not None
    assert load_causal_lm(run.done.result["folder"]).config.model_type == "llama"


def test_too_little_text_is_said_with_what_to_do(tmp_path: Path) -> None:
    data = tmp_path / "t.txt"
    data.write_text("only a few words")
    with pytest.raises(BadInput, match=r"t\.txt is too short: 0 blocks of 32 tokens") as caught:
        Run.start(Pretrain, make_context(tmp_path), **{**SMALL, "data": str(data)})
    assert "--context" in caught.value.hint


def pairs_file(path: Path, count: int) -> Path:
    rows = [{"question": f"what follows {i}?", "answer": f"{i + 1}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def finetuned(tmp_path: Path, data: Path, arch: str = "transformer", **args: Any) -> Run:
    base = toy_model(tmp_path / "base", arch)
    given = {"model": str(base), "data": str(data), "out": "m", "threads": 1, "lr": 1e-2}
    given |= {"context": 64, "dtype": "float32"}
    run = Run.start(Finetune, make_context(tmp_path), **{**given, **args})
    run.to_end()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gru", "transformer"])
def test_answers_are_learnt_and_asked_for_in_the_saved_format(arch: str, tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    rows = [("name the dog", "Rex"), ("name the cat", "Tom")]
    data.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in rows * 8))
    run = finetuned(tmp_path, data, arch, epochs=25, val_fraction=0.0)
    assert run.done is not None
    assert "perplexity" not in run.done.result
    model = load_causal_lm(run.done.result["folder"], "float32")
    tokenizer = load_tokenizer(run.done.result["folder"])
    for prompt, answer in rows:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == f"{answer}</s>"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_leaves_a_merged_model_and_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    run = finetuned(
        tmp_path, pairs_file(tmp_path / "p.jsonl", 30), method="lora", steps=5, lora_rank=2
    )
    assert run.done is not None
    folder = Path(run.done.result["folder"])
    merged = load_causal_lm(folder, "float32")
    base = load_causal_lm(tmp_path / "base", "float32")
    assert {k for k, _ in merged.named_parameters()} == {k for k, _ in base.named_parameters()}
    ids = torch.tensor([[5, 6, 7, 8]])
    untouched = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits)
    assert not torch.allclose(untouched, merged(input_ids=ids).logits)


@pytest.mark.slow
def test_an_adapter_alone_is_made_where_it_is_asked_for(tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "p.jsonl", 30)
    run = finetuned(tmp_path, data, method="lora", steps=2, lora_rank=2, adapter_only=True)
    assert run.done is not None
    folder = Path(run.done.result["folder"])
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert not (folder / "config.json").exists()
    entry = run.ctx.call("models.show", name=run.done.result["model"])
    assert (entry["kind"], entry["base"]) == ("adapter", str(tmp_path / "base"))
    assert entry["parameters"] > 0


def test_an_adapter_alone_is_not_what_a_full_training_makes(tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "p.jsonl", 30)
    args = Finetune.Args(model="m", data=str(data), out="x", adapter_only=True)
    with pytest.raises(BadArgument, match="goes with --method lora"):
        Finetune.plan(args)


@pytest.mark.slow
def test_a_lora_checkpoint_holds_the_adapter_only(tmp_path: Path) -> None:
    base = toy_model(tmp_path / "base", "transformer", width=64)
    data = pairs_file(tmp_path / "p.jsonl", 30)
    args = {"model": str(base), "data": str(data), "out": "m", "method": "lora", "context": 64}
    run = Run.start(Finetune, make_context(tmp_path), **args, lora_rank=1, threads=1).steps(1)
    folder = run.save(tmp_path / "checkpoint")
    names = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in names)
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_lora_learns_in_the_layers_of_gpt2_too(tmp_path: Path) -> None:
    from support.small_models import make_gpt2

    base = make_gpt2(tmp_path / "base")
    data = pairs_file(tmp_path / "p.jsonl", 30)
    args = {"model": str(base), "data": str(data), "out": "m", "method": "lora", "context": 64}
    run = Run.start(Finetune, make_context(tmp_path), **args, steps=3, lr=0.01, threads=1)
    run.to_end()
    assert run.done is not None
    before = load_file(base / "model.safetensors")
    after = load_file(Path(run.done.result["folder"]) / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("attn" in name or "mlp" in name for name in changed)


def test_lora_on_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "p.jsonl", 30)
    with pytest.raises(BadArgument, match="no linear layers for LoRA") as caught:
        finetuned(tmp_path, data, "lstm", method="lora")
    assert caught.value.hint == "use --method full"


@pytest.mark.slow
def test_finetuning_on_text_goes_on_from_the_model(tmp_path: Path) -> None:
    first = pretrained(tmp_path / "a", steps=40)
    assert first.done is not None
    data = story_file(tmp_path / "more.txt", 200, seed=1)
    args = {"model": first.done.result["folder"], "data": str(data), "out": "m2", "steps": 2}
    run = Run.start(Finetune, make_context(tmp_path / "a"), context=32, threads=1, **args)
    run.to_end()
    assert run.reports[0].metrics["loss"] < 1.2 * first.done.result["loss"]


@pytest.mark.slow
def test_epochs_decide_the_steps(tmp_path: Path) -> None:
    run = finetuned(
        tmp_path, pairs_file(tmp_path / "p.jsonl", 40), epochs=2, batch=4, val_fraction=0.1
    )
    assert run.done is not None
    assert run.done.result["steps"] == 18  # 36 pairs are trained on, twice, 4 a step


@pytest.mark.slow
def test_long_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    rows = [{"prompt": "q", "answer": "a" * (900 if i == 3 else 2)} for i in range(9)]
    data.write_text("\n".join(map(json.dumps, rows)))
    run = finetuned(tmp_path, data, steps=1)
    (note,) = run.ctx.of_kind("note")
    assert note["text"].startswith("1 pairs are longer than --context 64")


@pytest.mark.slow
@pytest.mark.long
def test_a_real_model_is_finetuned_on_real_pairs(tmp_path: Path) -> None:
    args = {
        "model": str(shared("models/stories260K")),
        "data": str(shared("data/reddit_qa/pairs.jsonl.gz")),
        "out": "m",
    }
    run = Run.start(Finetune, make_context(tmp_path), **args, context=128, steps=8, threads=1)
    done = run.to_end()
    assert run.reports[0].metrics["loss"] > run.reports[7].metrics["loss"]
    assert load_tokenizer(done.result["folder"]).chat_template
