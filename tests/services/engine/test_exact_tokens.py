"""Greedy texts of one running batch are those of generate(), token for token, whatever else goes
on.

Where the reference's own two best scores are nearly equal either may win; such a flip is followed:
from there on the reference goes on with the engine's token.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmos.services.engine import batch
from llmos.services.engine.host import Host
from llmos.services.programs.base import Guest, Idle, OpenGate
from support.run_program import make_context
from support.small_models import make_gpt2, make_llama

NEARLY_EQUAL = 1e-4


def reference_flips(model: Any, prompt: list[int], tokens: list[int]) -> int:
    """How many tokens are not the likeliest by a hair; fails for one by more."""
    with torch.inference_mode():
        ids = torch.tensor([prompt + tokens])
        scores = model(ids).logits[0, len(prompt) - 1 : -1]
    flips = 0
    for row, token in zip(scores, tokens, strict=True):
        best = float(row.max())
        if int(row.argmax()) != token:
            assert best - float(row[token]) <= NEARLY_EQUAL, "another token"
            flips += 1
    return flips


class Engine:
    def __init__(self, folder: Path, tmp_path: Path, kv_bytes: int = 0) -> None:
        self.folder = folder
        self.host = Host(str(folder), "float32", "cpu", 1, OpenGate(), kv_bytes)
        self.ctx = make_context(tmp_path)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.vocabulary = self.reference.config.vocab_size

    def ask(self, pid: int, ids: list[int], tokens: int, **more: Any) -> None:
        args = {"model": str(self.folder), "prompt_ids": ids, "max_tokens": tokens,
                "temperature": 0.0, "ignore_eos": True, **more}  # fmt: skip
        self.host.admit(self.ctx, Guest(pid, "infer", args, (0, 0, pid)))

    def until_idle(self) -> None:
        while not isinstance(self.host.step(self.ctx), Idle):
            pass

    def tokens(self, pid: int, index: int = 0) -> list[int]:
        return [
            t
            for r in self.ctx.of_kind("text", pid)
            if r.get("index", 0) == index
            for t in r["tokens"]
        ]


def prompts(count: int, vocabulary: int, seed: int, longest: int = 90) -> list[list[int]]:
    """Of mixed lengths; some begin alike."""
    rng = random.Random(seed)
    common = [rng.randrange(vocabulary) for _ in range(40)]
    made = []
    for _ in range(count):
        own = [rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))]
        made.append(common[: rng.choice([0, 17, 32, 40])] + own)
    return made


def small_model(kind: str, folder: Path) -> Path:
    return make_gpt2(folder) if kind == "gpt2" else make_llama(folder, max_position_embeddings=512)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mixed_prompts_in_one_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST_PIECE", 33)  # prompts come in pieces
    # Blocks for a few texts only: guests have to make room, and are computed again.
    engine = Engine(small_model(kind, tmp_path / "model"), tmp_path)
    shape = engine.host._loaded.model.pool.shape
    engine = Engine(engine.folder, tmp_path, 40 * shape.block_bytes)
    given = prompts(24, engine.vocabulary, 1)
    for pid, ids in enumerate(given, 1):
        engine.ask(pid, ids, 20)
        engine.host.step(engine.ctx)  # they come while others are served
    engine.until_idle()
    cached = [engine.ctx.guests_done[pid].result["cached_tokens"] for pid in range(1, 25)]
    assert sum(cached) > 0, "no prompt began like another"
    flips = sum(
        reference_flips(engine.reference, ids, engine.tokens(pid))
        for pid, ids in enumerate(given, 1)
    )
    assert flips <= 2
    engine.host._loaded.model.blocks.check()
    assert engine.host._loaded.model.blocks.in_use == 0, "all memory is free at the end"


def test_without_the_native_library_the_tokens_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_llama(tmp_path / "model")
    engine = Engine(folder, tmp_path / "a")
    monkeypatch.setattr("llmos.services.engine.native.paged.library", lambda: None)
    other = Engine(folder, tmp_path / "b")
    for one in (engine, other):
        for pid, ids in enumerate(prompts(6, one.vocabulary, 3), 1):
            one.ask(pid, ids, 12)
        one.until_idle()
    for pid in range(1, 7):
        assert engine.tokens(pid) == other.tokens(pid)


def test_answers_side_by_side_begin_with_the_same_blocks(tmp_path: Path) -> None:
    engine = Engine(make_llama(tmp_path / "model"), tmp_path)
    ids = prompts(1, engine.vocabulary, 5)[0]
    engine.ask(1, ids, 10, n=3)
    engine.host.step(engine.ctx)
    blocks = engine.host._loaded.model.blocks
    assert blocks.in_use <= -(-len(ids) // 16) + 2
    engine.until_idle()
    texts = [engine.tokens(1, index) for index in range(3)]
    assert texts[0] == texts[1] == texts[2], "greedy"
    assert reference_flips(engine.reference, ids, texts[0]) == 0
    assert [c["index"] for c in engine.ctx.guests_done[1].result["choices"]] == [0, 1, 2]
    assert blocks.in_use == 0


def test_more_answers_than_there_is_room_for_are_made_one_after_the_other(tmp_path: Path) -> None:
    engine = Engine(make_llama(tmp_path / "model", max_position_embeddings=128), tmp_path)
    shape = engine.host._loaded.model.pool.shape
    engine = Engine(engine.folder, tmp_path, 9 * shape.block_bytes)
    ids = prompts(1, engine.vocabulary, 5, longest=30)[0]
    engine.ask(1, ids, 60, n=4)
    engine.until_idle()
    for index in range(4):
        assert len(engine.tokens(1, index)) == 60
        assert reference_flips(engine.reference, ids, engine.tokens(1, index)) == 0


def test_who_is_computed_alone_gets_the_bits_of_a_run_alone(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    alone = Engine(folder, tmp_path / "a")
    ids = prompts(1, alone.vocabulary, 9)[0]
    alone.ask(1, ids, 8, exact=True, logprobs=0)
    alone.until_idle()
    among = Engine(folder, tmp_path / "b")
    for pid in range(2, 7):
        among.ask(pid, prompts(1, among.vocabulary, pid)[0], 20)
    among.ask(1, ids, 8, exact=True, logprobs=0)
    among.until_idle()

    def told(engine: Engine) -> list[Any]:
        return [r["logprobs"][0]["logprob"] for r in engine.ctx.of_kind("text", 1)]

    assert told(alone) == told(among)


def test_log_probabilities_of_a_prompt_are_those_of_the_model(tmp_path: Path) -> None:
    engine = Engine(make_llama(tmp_path / "model"), tmp_path)
    ids = prompts(1, engine.vocabulary, 9)[0]
    engine.ask(2, ids, 3)  # what it has computed must not be used
    engine.until_idle()
    engine.ask(1, ids, 0, prompt_logprobs=2)
    engine.until_idle()
    (record,) = engine.ctx.of_kind("prompt", 1)
    with torch.inference_mode():
        scores = engine.reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert record["tokens"] == ids
    assert record["logprobs"][0] is None
    for at, entry in enumerate(record["logprobs"][1:], 1):
        assert entry["id"] == ids[at]
        assert entry["logprob"] == pytest.approx(float(scores[at - 1, ids[at]]), abs=1e-4)
        assert entry["top"][0]["logprob"] == pytest.approx(float(scores[at - 1].max()), abs=1e-4)
        assert len(entry["top"]) == 2
    result = engine.ctx.guests_done[1].result
    assert (result["finish_reason"], result["tokens"]) == ("length", 0)


def test_vectors_are_the_mean_of_the_last_states(tmp_path: Path) -> None:
    import numpy as np

    engine = Engine(make_llama(tmp_path / "model"), tmp_path)
    given = prompts(3, engine.vocabulary, 4)
    args = {"model": str(engine.folder), "input": given, "normalize": False}
    engine.ask(2, given[0], 10)  # beside somebody who wants text
    engine.host.admit(engine.ctx, Guest(1, "embed", args, (0, 0, 1)))
    engine.until_idle()
    for index, record in enumerate(engine.ctx.of_kind("embedding", 1)):
        with torch.inference_mode():
            states = engine.reference(torch.tensor([given[index]]), output_hidden_states=True)
        expected = states.hidden_states[-1][0].mean(0)
        found = torch.tensor(np.frombuffer(record["vector"], "<f4"))
        assert torch.allclose(found, expected, atol=1e-4)
    assert engine.ctx.guests_done[1].result["prompt_tokens"] == sum(map(len, given))


@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 1.0), (4, 0.0), (3, 2.0)])
def test_beam_search_finds_what_generate_finds(
    beams: int, length_penalty: float, tmp_path: Path
) -> None:
    engine = Engine(make_llama(tmp_path / "model"), tmp_path)
    given = prompts(2, engine.vocabulary, 6, longest=30)
    for pid, ids in enumerate(given, 1):  # at once, and beside somebody else
        engine.ask(pid, ids, 12, beams=beams, n=2, length_penalty=length_penalty, ignore_eos=False)
    engine.ask(9, given[0], 20)
    engine.until_idle()
    for pid, ids in enumerate(given, 1):
        with torch.inference_mode():
            expected = engine.reference.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                num_beams=beams, num_return_sequences=2, do_sample=False, max_new_tokens=12,
                length_penalty=length_penalty, early_stopping=False,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        result = engine.ctx.guests_done[pid].result
        for index in range(2):
            made = engine.tokens(pid, index)
            assert made == expected.sequences[index, len(ids) : len(ids) + len(made)].tolist()
            score = float(expected.sequences_scores[index])
            assert result["choices"][index]["score"] == pytest.approx(score, abs=1e-3)
    assert engine.host._loaded.model.blocks.in_use == 0
