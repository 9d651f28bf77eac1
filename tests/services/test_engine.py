"""The engine: greedy text is transformers' own, guests share it fairly and disturb nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmos.kernel.errors import BadInput
from llmos.services.engine.native import weights as native
from llmos.services.programs.base import Guest, Idle, Report
from llmos.services.programs.engine import Engine
from support.run_program import FakeContext, Run, admit, make_context
from support.shared import shared
from support.small_models import CONTEXT, make_gpt2, make_llama

PROMPTS = ["Once upon a time", "The cat", "One day, a little bird\n"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2"))


def engine(tmp_path: Path, model: Path, **args: Any) -> Run:
    # One thread: small models gain nothing from two, and lose much on a busy machine.
    ctx = make_context(tmp_path, threads=1)
    return Run.start(Engine, ctx, **{"model": str(model), "dtype": "float32", **args})


def ask(run: Run, pid: int, prompt: str, **args: Any) -> Guest:
    """A greedy guest, unless `args` say otherwise."""
    model = run.program.args.model
    return admit(run, pid, "infer", **{"model": model, "prompt": prompt, "temperature": 0, **args})


def tokens_of(ctx: FakeContext, pid: int) -> list[int]:
    return [token for record in ctx.of_kind("text", pid) for token in record["tokens"]]


def generate(
    model: Path, prompt: str, count: int, dtype: torch.dtype = torch.float32
) -> tuple[list[int], str]:
    """transformers' own greedy continuation: its ids, and its text after the prompt's."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )[0]
    whole, start = (tokenizer.decode(i, skip_special_tokens=True) for i in (out, ids[0]))
    return out[ids.shape[1] :].tolist(), whole[len(start) :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_greedy_text_of_a_real_model_is_that_of_generate(name: str, tmp_path: Path) -> None:
    model = shared(f"models/{name}")
    run = engine(tmp_path, model)
    for pid, prompt in enumerate(PROMPTS, start=1):
        ask(run, pid, prompt, max_tokens=30)
    run.until_idle()
    for pid, prompt in enumerate(PROMPTS, start=1):
        expected = generate(model, prompt, 30)
        assert (tokens_of(run.ctx, pid), run.ctx.text(pid)) == expected


@pytest.mark.parametrize("prompt", ["the cat", "你好", "🙂 café and the dog", "x" * 50])
def test_greedy_tokens_of_random_models_are_those_of_generate(
    prompt: str, llama: Path, gpt2: Path, tmp_path: Path
) -> None:
    for model in (llama, gpt2):
        run = engine(tmp_path, model)
        ask(run, 1, prompt, max_tokens=40)
        run.until_idle()
        assert (tokens_of(run.ctx, 1), run.ctx.text(1)) == generate(model, prompt, 40)


@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_bfloat16_in_another_layout_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    model = shared(f"models/{name}")
    run = engine(tmp_path, model, dtype="bfloat16")
    ask(run, 1, "Once upon a time", max_tokens=20)
    run.until_idle()
    expected = generate(model, "Once upon a time", 20, torch.bfloat16)[0]
    assert tokens_of(run.ctx, 1) == expected


def test_a_prompt_in_pieces_gives_the_same_tokens(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.services.engine.batch.MOST_PIECE", 7)
    run = engine(tmp_path, llama)
    prompt = "the cat sat on the mat and the dog ran " * 2
    ask(run, 1, prompt, max_tokens=20)
    first = run.step()
    assert isinstance(first, Report)
    assert first.shares == {1: 7.0}
    assert not run.ctx.records, "no token before the whole prompt is computed"
    run.until_idle()
    assert tokens_of(run.ctx, 1) == generate(llama, prompt, 20)[0]


def test_the_same_seed_draws_the_same_text_whoever_else_is_served(
    llama: Path, tmp_path: Path
) -> None:
    alone = engine(tmp_path / "alone", llama)
    ask(alone, 1, "the cat", temperature=1.0, seed=7, max_tokens=30)
    alone.until_idle()
    among = engine(tmp_path / "among", llama)
    for pid in (1, 2, 3):
        ask(among, pid, "the cat", temperature=1.0, seed=6 + pid, max_tokens=30)
    among.until_idle()
    assert tokens_of(among.ctx, 1) == tokens_of(alone.ctx, 1)
    assert tokens_of(among.ctx, 2) != tokens_of(alone.ctx, 1)


def test_the_last_record_tells_how_it_went(llama: Path, tmp_path: Path) -> None:
    run = engine(tmp_path, llama)
    ask(run, 5, "the cat", max_tokens=6)
    run.until_idle()
    done = run.ctx.guests_done[5]
    assert done.status == 0
    assert done.result["tokens"] == len(tokens_of(run.ctx, 5)) <= 6
    assert done.result["finish_reason"] in ("stop", "length")
    assert done.result["first_token_s"] > 0


def test_all_guests_get_a_token_in_each_step(llama: Path, tmp_path: Path) -> None:
    run = engine(tmp_path, llama)
    ask(run, 1, "the cat", max_tokens=20)
    ask(run, 2, "the dog", max_tokens=20)
    run.step()  # both prompts
    assert [step_shares(run) for _ in range(3)] == [{1: 1.0, 2: 1.0}] * 3


def test_when_rows_are_few_equals_take_turns_and_the_urgent_goes_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.services.engine.batch.MOST_ROWS", 1)
    run = engine(tmp_path, llama)
    ask(run, 1, "the cat", max_tokens=20)
    ask(run, 2, "the dog", max_tokens=20)
    run.step()
    served = [next(iter(step_shares(run))) for _ in range(6)]
    assert served == [1, 2, 1, 2, 1, 2]
    run.program.rank(run.ctx, 2, (0, -5, 0), parked=False)
    assert [next(iter(step_shares(run))) for _ in range(3)] == [2, 2, 2]


def step_shares(run: Run) -> dict[int, float]:
    report = run.step()
    assert isinstance(report, Report)
    return report.shares


def test_guests_below_the_floor_get_no_step(llama: Path, tmp_path: Path) -> None:
    run = engine(tmp_path, llama)
    model = str(llama)
    args = {"model": model, "prompt": "the", "temperature": 0, "max_tokens": 5}
    admit(run, 1, "infer", (1, 0, 0), **args)
    run.program.floor(0)
    assert isinstance(run.step(), Idle)
    run.program.floor(1)
    assert step_shares(run).keys() == {1}


def test_a_parked_guest_keeps_its_place_and_a_dropped_one_is_gone(
    llama: Path, tmp_path: Path
) -> None:
    run = engine(tmp_path, llama)
    ask(run, 1, "the cat", max_tokens=20)
    run.steps(5)
    run.program.rank(run.ctx, 1, (0, 0, 0), parked=True)
    assert isinstance(run.step(), Idle)
    run.program.rank(run.ctx, 1, (0, 0, 0), parked=False)
    run.steps(3)
    assert tokens_of(run.ctx, 1) == generate(llama, "the cat", 20)[0][:8]
    run.program.drop(run.ctx, 1)
    assert isinstance(run.step(), Idle)
    assert 1 not in run.ctx.guests_done


@pytest.mark.parametrize("sent", [1, 12, 29, 30])
@pytest.mark.parametrize("args", [{"temperature": 1.0}, {"temperature": 0, "stop": ["the"]}])
def test_a_guest_of_a_dead_engine_goes_on_behind_what_it_has_sent(
    llama: Path, tmp_path: Path, sent: int, args: dict[str, Any]
) -> None:
    args = {"model": str(llama), "prompt": "你好 cat", "max_tokens": 30, **args}
    whole = engine(tmp_path / "whole", llama)
    admit(whole, 9, "infer", **args)
    whole.until_idle()
    records = whole.ctx.of_kind("text", 9)
    again = engine(tmp_path / "again", llama)
    begun = [{"kind": "text", **r} for r in records[:sent]]
    again.program.admit(again.ctx, Guest(9, "infer", args, (0, 0, 0), begun))
    again.until_idle()
    assert again.ctx.of_kind("text", 9) == records[sent:]
    before, after = whole.ctx.guests_done[9].result, again.ctx.guests_done[9].result
    for key in ("tokens", "finish_reason", "prompt_tokens"):
        assert before[key] == after[key]


def test_text_ends_before_a_stop_string(llama: Path, tmp_path: Path) -> None:
    whole = generate(llama, "the cat", 40)[1]
    stop = next(whole[i : i + 3] for i in range(5, 40) if "�" not in whole[i : i + 3])
    run = engine(tmp_path, llama)
    ask(run, 1, "the cat", max_tokens=40, stop=[stop])
    run.until_idle()
    assert run.ctx.text(1) == whole[: whole.index(stop)]
    assert run.ctx.guests_done[1].result["finish_reason"] == "stop"


def test_an_answer_ends_where_the_context_ends(llama: Path, tmp_path: Path) -> None:
    run = engine(tmp_path, llama)
    prompt = "the cat sat on the mat and the dog ran " * 4
    ask(run, 1, prompt, max_tokens=1000)
    run.until_idle()
    result = run.ctx.guests_done[1].result
    if result["finish_reason"] == "length":
        assert result["prompt_tokens"] + result["tokens"] == CONTEXT
    else:
        assert tokens_of(run.ctx, 1)[-1] == 0


@pytest.mark.parametrize(("prompt", "says"), [("the cat " * 200, "context"), ("", "empty")])
def test_a_prompt_that_the_model_cannot_take_is_refused(
    prompt: str, says: str, llama: Path, tmp_path: Path
) -> None:
    run = engine(tmp_path, llama)
    with pytest.raises(BadInput, match=says):
        ask(run, 1, prompt)
    assert isinstance(run.step(), Idle)


def test_two_runs_of_an_engine_hold_no_cache_of_guests_that_ended(
    llama: Path, tmp_path: Path
) -> None:
    run = engine(tmp_path, llama)
    for pid in range(1, 4):
        ask(run, pid, "the cat", max_tokens=3)
    run.until_idle()
    assert sorted(run.ctx.guests_done) == [1, 2, 3]
    assert not run.program._host._sessions


def test_weights_are_planned_as_shared_where_they_are_mapped(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(dtype: str) -> list[str]:
        segments = Engine.plan(Engine.Args(str(llama), dtype=dtype)).segments
        assert {s.kind for s in segments} == {"weights", "kv", "activations", "context"}
        return [s.shared for s in segments if s.shared]

    if native.kernels() is not None:
        assert shared("float32") == [f"{llama}#float32"]
    monkeypatch.setitem(native._state, "found", "no compiler")
    assert shared("float32") == [str(llama / "model.safetensors")]
    assert shared("bfloat16") == []  # packed, or cast


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty"):
        Engine.plan(Engine.Args(model=str(tmp_path / "empty")))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:1000])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((llama / name).read_bytes())
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        Engine.plan(Engine.Args(model=str(broken)))


@pytest.mark.parametrize("model_type", ["llmos_rnn", "llmos_lstm", "llmos_gru"])
def test_recurrent_models_are_served_with_their_own_state(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    import llmos.services.model.recurrent
    from support.small_models import VOCABULARY, make_tokenizer

    assert llmos.services.model.recurrent.RecurrentState
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=32, eos_token_id=0, initializer_range=0.5
    )
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    run = engine(tmp_path, model)
    ask(run, 1, "the cat", max_tokens=30)
    run.until_idle()
    assert tokens_of(run.ctx, 1) == generate(model, "the cat", 30)[0]
