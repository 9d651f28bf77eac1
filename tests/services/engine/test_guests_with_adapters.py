"""Guests with adapters in one running batch get the tokens that peft makes for each alone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmos.kernel.errors import BadInput
from llmos.services.engine import batch
from llmos.services.engine.adapters import Adapter
from llmos.services.engine.host import Host
from llmos.services.programs.base import Guest, Idle, OpenGate
from support.adapters import make_adapter, peft_model, write_with_peft
from support.run_program import make_context
from support.small_models import VOCABULARY, make_gpt2, make_llama

NEARLY_EQUAL = 1e-4

FORMS: list[dict[str, Any]] = [
    {},
    {"r": 9, "lora_alpha": 4},
    {"target_modules": ["q_proj", "v_proj", "c_attn"]},
    {"use_rslora": True},
]


class Engine:
    def __init__(self, folder: Path, tmp_path: Path, blocks: int = 0) -> None:
        self.folder = folder
        self.host = Host(str(folder), "float32", "cpu", 1, OpenGate(), 0)
        if blocks:
            size = self.host._loaded.model.pool.shape.block_bytes
            self.host = Host(str(folder), "float32", "cpu", 1, OpenGate(), blocks * size)
        self.ctx = make_context(tmp_path)

    def ask(self, pid: int, program: str = "infer", **args: Any) -> None:
        given = {"model": str(self.folder), "max_tokens": 20, "temperature": 0.0, **args}
        self.host.admit(self.ctx, Guest(pid, program, given, (0, 0, pid)))

    def until_idle(self) -> None:
        while not isinstance(self.host.step(self.ctx), Idle):
            pass

    def tokens(self, pid: int) -> list[int]:
        return [t for r in self.ctx.of_kind("text", pid) for t in r["tokens"]]

    def users(self) -> list[int]:
        return [adapter.users for adapter in self.loaded()]

    def loaded(self) -> list[Adapter]:
        return list(self.host._adapters._loaded.values())


def prompts(count: int) -> list[list[int]]:
    """Of mixed lengths; many begin alike."""
    rng = random.Random(7)
    common = [rng.randrange(1, VOCABULARY) for _ in range(40)]
    made = []
    for _ in range(count):
        own = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 40))]
        made.append(common[: rng.choice([0, 17, 32, 40])] + own)
    return made


def flips(model: Any, prompt: list[int], tokens: list[int]) -> int:
    """How many tokens are not the likeliest by a hair; fails for one by more."""
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    found = 0
    for row, token in zip(scores, tokens, strict=True):
        if int(row.argmax()) != token:
            assert float(row.max() - row[token]) <= NEARLY_EQUAL, "another token"
            found += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_gets_its_own_tokens_in_a_batch_that_is_short_of_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST_PIECE", 33)  # prompts come in pieces
    base = (make_llama if kind == "llama" else make_gpt2)(tmp_path / "base")
    folders = [
        write_with_peft(base, tmp_path / str(n), seed=n, **form) for n, form in enumerate(FORMS)
    ]
    whose = [*folders, None]
    # Blocks for a few texts only: guests have to make room, and are computed again.
    engine = Engine(base, tmp_path, blocks=40)
    given = prompts(25)
    for pid, ids in enumerate(given):
        folder = whose[pid % len(whose)]
        more = {"adapter": str(folder)} if folder else {}
        engine.ask(pid, prompt_ids=ids, ignore_eos=True, **more)
        engine.host.step(engine.ctx)  # they come while others are served
    assert len(engine.loaded()) == len(folders)
    engine.until_idle()
    cached = [engine.ctx.guests_done[pid].result["cached_tokens"] for pid in range(25)]
    assert sum(cached) > 0, "no prompt began like another"
    models = [peft_model(base, folder) for folder in folders]
    models.append(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    counted = [
        flips(models[pid % len(models)], ids, engine.tokens(pid)) for pid, ids in enumerate(given)
    ]
    assert sum(counted) <= 2
    assert engine.users() == [0] * len(folders)
    engine.host.trim()
    assert engine.loaded() == []


def test_what_one_adapter_has_computed_is_no_prefix_for_another(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a")
    ids = [n + 1 for n in range(50)]
    engine = Engine(base, tmp_path)
    for pid, adapter in enumerate(["", str(folder), "", str(folder)]):
        engine.ask(pid, prompt_ids=ids, adapter=adapter, max_tokens=2)
        engine.until_idle()
    found = [engine.ctx.guests_done[pid].result["cached_tokens"] for pid in range(4)]
    assert found[:2] == [0, 0]
    assert min(found[2:]) > 0
    assert engine.tokens(1) == engine.tokens(3)


def test_an_adapter_is_let_go_however_its_guest_leaves(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    folder = str(make_adapter(base, tmp_path / "a"))
    engine = Engine(base, tmp_path)
    engine.ask(1, prompt_ids=[1, 2], adapter=folder)
    engine.ask(2, prompt_ids=[1, 2], adapter=folder)
    engine.ask(3, "chat", adapter=folder)
    with pytest.raises(BadInput, match="context"):
        engine.ask(4, prompt_ids=[1] * 500, adapter=folder)
    assert engine.users() == [3]
    engine.host.drop(2)
    engine.until_idle()
    assert engine.users() == [1], "the chat waits for its user"
    engine.host.drop(3)
    assert engine.users() == [0]


def test_an_adapter_that_does_not_fit_is_its_guests_error_alone(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    other = make_llama(tmp_path / "other", hidden_size=48)
    engine = Engine(base, tmp_path)
    engine.ask(1, prompt_ids=[1, 2])
    with pytest.raises(BadInput, match="does not fit"):
        engine.ask(2, prompt_ids=[1, 2], adapter=str(make_adapter(other, tmp_path / "a")))
    engine.until_idle()
    assert len(engine.tokens(1)) > 0


def test_conversations_are_written_as_they_were_when_the_adapter_was_trained(
    tmp_path: Path,
) -> None:
    base = make_llama(tmp_path / "base")
    templated = make_adapter(base, tmp_path / "templated", scale=0.1)
    bare = shutil.copytree(templated, tmp_path / "bare")
    (templated / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    )
    engine = Engine(base, tmp_path)
    tokenizer = engine.host._loaded.tokenizer
    for pid, (folder, text) in enumerate([(templated, "<the cat>"), (bare, "the cat")]):
        engine.ask(pid, prompt="the cat", adapter=str(folder))
        engine.until_idle()
        count = len(tokenizer(text).input_ids)
        assert engine.ctx.guests_done[pid].result["prompt_tokens"] == count


def test_an_adapter_that_overflows_spoils_nobody_elses_text(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    bad = str(make_adapter(base, tmp_path / "bad", scale=1e20, lora_alpha=1e30))
    alone = Engine(base, tmp_path / "alone", blocks=12)
    alone.ask(1, prompt_ids=[5, 6, 7], ignore_eos=True)
    alone.until_idle()
    engine = Engine(base, tmp_path / "among", blocks=12)
    engine.ask(2, prompt_ids=list(range(1, 60)), adapter=bad, max_tokens=30, ignore_eos=True)
    engine.host.step(engine.ctx)
    engine.ask(1, prompt_ids=[5, 6, 7], ignore_eos=True)
    engine.until_idle()
    done = engine.ctx.guests_done[2]
    assert (done.status, "no numbers" in done.reason) == (1, True), done
    assert engine.users() == [0]
    assert engine.tokens(1) == alone.tokens(1)
    engine.ask(3, prompt_ids=[5, 6, 7], ignore_eos=True)  # in blocks that had no numbers
    engine.until_idle()
    assert engine.tokens(3) == alone.tokens(1)
