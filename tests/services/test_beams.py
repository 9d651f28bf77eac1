"""Beam search finds what transformers' generate finds, token for token, with the same scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.engine.beams import Beams
from support.shared import shared
from support.small_models import make_gpt2, make_llama


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    made = {"llama": make_llama(folder / "llama"), "gpt2": make_gpt2(folder / "gpt2")}
    return {name: load(path) for name, path in made.items()}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


Texts = list[tuple[list[int], float]]


def search(model: Any, prompt: list[int], beams: Beams) -> Texts:
    """A search with a model of transformers and its own cache, a row for each beam."""
    cache: Any = DynamicCache(config=model.config)
    rows = torch.tensor([prompt])
    with torch.inference_mode():
        while not beams.finished:
            scores = model(input_ids=rows, past_key_values=cache, use_cache=True).logits[:, -1]
            parents, tokens = beams.step(scores.log_softmax(1))
            if parents:
                cache.reorder_cache(torch.tensor(parents))
                rows = torch.tensor(tokens).unsqueeze(1)
    return beams.result()


def generate(
    model: Any, prompt: list[int], k: int, penalty: float, ends: list[int], most: int
) -> Texts:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=k, do_sample=False,
        early_stopping=False, length_penalty=penalty, max_new_tokens=most, eos_token_id=ends,
        pad_token_id=0, num_return_sequences=k, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        made = row[len(prompt) :]
        end = next((at for at, token in enumerate(made) if token in ends), len(made) - 1)
        found.append((made[: end + 1], score))
    return found


def assert_same(mine: Texts, expected: Texts) -> None:
    assert [ids for ids, _ in mine] == [ids for ids, _ in expected]
    assert [score for _, score in mine] == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
def test_the_texts_are_those_of_generate(
    models: dict[str, Any], name: str, k: int, penalty: float
) -> None:
    # A random model ends with a given token once in 320: many make ends of all lengths.
    for ends, prompt in ([0], [5, 9, 77]), ([*range(0, 320, 16)], [40, 41]), ([3, 7], [12] * 9):
        beams = Beams(k, penalty, ends, 16)
        expected = generate(models[name], prompt, k, penalty, ends, 16)
        assert_same(search(models[name], prompt, beams), expected)


@pytest.mark.parametrize("k", [2, 5])
def test_the_texts_of_a_real_model_are_those_of_generate(k: int) -> None:
    folder = shared("models/stories260K")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in ("Once upon a time", "The little dog", "Lily was sad. "):
        ids = tokenizer(prompt).input_ids
        for ends in ([2], [2, tokenizer(".", add_special_tokens=False).input_ids[-1]]):
            expected = generate(model, ids, k, 1.0, ends, 40)
            assert_same(search(model, ids, Beams(k, 1.0, ends, 40)), expected)


@pytest.mark.long
@pytest.mark.parametrize("k", [2, 4])
def test_the_texts_of_a_larger_model_are_those_of_generate(k: int) -> None:
    folder = shared("models/stories15M")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once upon a time").input_ids
    assert_same(search(model, ids, Beams(k, 1.0, [2], 60)), generate(model, ids, k, 1.0, [2], 60))


def test_one_beam_is_the_greedy_text(models: dict[str, Any]) -> None:
    ids = torch.tensor([[5, 9, 77]])
    greedy = models["llama"].generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
    )
    ((made, _),) = search(models["llama"], [5, 9, 77], Beams(1, 1.0, [0], 12))
    assert made == greedy[0, 3:].tolist()


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_a_beam_that_was_behind_wins_with_its_second_token() -> None:
    beams = Beams(2, 0.0, [9], 2)
    assert beams.step(table([0.6, 0.4, 0.0])) == ([0, 0], [0, 1])
    assert beams.step(table([0.5, 0.3, 0.2], [0.05, 0.9, 0.05])) == ([], [])
    (first, score), (second, _) = beams.result()
    assert (first, second) == ([1, 1], [0, 0])
    assert score == pytest.approx(math.log(0.36))


def test_it_is_over_when_nothing_can_be_better() -> None:
    beams = Beams(2, 0.0, [2], 50)
    assert beams.step(table([0.1, 0.1, 0.8])) == ([0, 0], [0, 1])
    assert not beams.finished, "only one text is whole"
    beams.step(table([0.1, 0.1, 0.8], [0.2, 0.2, 0.6]))
    assert beams.finished
    assert [ids for ids, _ in beams.result()] == [[2], [0, 2]]


def test_fewer_tokens_than_beams_are_all_tokens() -> None:
    beams = Beams(5, 1.0, [], 3)
    assert beams.step(table([0.5, 0.3, 0.2])) == ([0, 0, 0], [0, 1, 2])
    parents, _ = beams.step(table(*[[0.5, 0.3, 0.2]] * 3))
    assert len(parents) == 5


def test_no_tokens_are_over_at_once() -> None:
    beams = Beams(3, 1.0, [0], 0)
    assert beams.finished
    assert beams.result() == []


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(BadInput, match="no numbers"):
        Beams(2, 1.0, [0], 5).step(torch.full((1, 8), math.nan))


def test_tokens_without_probability_are_not_gone_on_with() -> None:
    beams = Beams(2, 1.0, [3], 4)
    parents, tokens = beams.step(table([0.9, 0.1, 0.0, 0.0]))
    assert (parents, tokens) == ([0, 0], [0, 1])
    parents, tokens = beams.step(table([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]))
    assert (parents, tokens) == ([0], [0])


@pytest.mark.parametrize("penalty", [1e9, -11.0, math.nan])
def test_a_length_penalty_beyond_all_bounds_is_refused(penalty: float) -> None:
    with pytest.raises(BadArgument, match="length_penalty"):
        Beams(2, penalty, [0], 5)
