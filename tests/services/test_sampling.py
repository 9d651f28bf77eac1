"""The choice of tokens: from the distributions of transformers' own processors, and replayed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmos.kernel.errors import BadArgument
from llmos.services.engine import cuts, draw
from llmos.services.engine.arguments import Generation
from llmos.services.engine.sampling import Sampler, choose, score

# All that changes nothing.
PLAIN = Generation(model="", temperature=1.0, top_k=0, top_p=1.0)
SMALL, LARGE = 50, 10_000  # vocabularies: the second is looked at by the narrow way


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of torch wait for each other at every operation: on a busy machine, long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scores(rows: int, vocabulary: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def sampler(vocabulary: int, seed: int = 0, prompt: Sequence[int] = (), **asked: Any) -> Sampler:
    return Sampler(replace(PLAIN, **asked), seed, vocabulary, prompt)


def tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    return [choice.token for choice in choose(logits, samplers)]


def of_transformers(
    logits: Tensor, args: Generation, prompt: list[int], answer: list[int]
) -> Tensor:
    """The probabilities (vocabulary,) that generate() draws from, in float64."""
    row = logits.float().clone()
    for token, bias in (args.logit_bias or {}).items():
        row[int(token)] += bias
    ids, processed = torch.tensor([prompt + answer]), row.unsqueeze(0)
    if args.repetition_penalty != 1:
        processed = RepetitionPenaltyLogitsProcessor(args.repetition_penalty)(ids, processed)
    # transformers has these two in no class; the definition is that of OpenAI's API.
    counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=len(row))
    processed = processed - args.frequency_penalty * counts
    processed = processed - args.presence_penalty * (counts > 0)
    processed = TemperatureLogitsWarper(args.temperature)(ids, processed)
    if args.top_k:
        processed = TopKLogitsWarper(args.top_k)(ids, processed)
    if args.top_p < 1:
        processed = TopPLogitsWarper(args.top_p)(ids, processed)
    if args.min_p > 0:
        processed = MinPLogitsWarper(args.min_p)(ids, processed)
    return processed[0].double().softmax(0)


def assert_draws_from(logits: Tensor, samplers_of: Any, probabilities: Tensor) -> None:
    """The whole distribution: in the order of ids, each token has the numbers that are its own."""
    ends = probabilities.cumsum(0)
    likely = (probabilities > 1e-5).nonzero().flatten().tolist()
    some = {*likely[:5], *likely[-5:], *likely[:: len(likely) // 20 + 1]}
    points = [(token, at) for token in some for at in (0.1, 0.9)]
    rows = [samplers_of() for _ in points]
    for one, (token, at) in zip(rows, points, strict=True):
        one._uniform = float(ends[token] - (1 - at) * probabilities[token])
    drawn = tokens(logits.expand(len(points), -1), rows)
    assert drawn == [token for token, _ in points]


SETTINGS = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.05, 0.7, 1.0, 1.9, 50.0]),
    "top_k": st.sampled_from([0, 2, 5, 40, 100_000]),
    "top_p": st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    "min_p": st.sampled_from([0.0, 0.01, 0.3]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
    "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.4, -0.2]),
    "logit_bias": st.sampled_from([None, {"3": 4.5, "7": -100}]),
})  # fmt: skip


@given(
    asked=SETTINGS,
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([SMALL, LARGE, LARGE + 7]),
    half=st.booleans(),
    spread=st.sampled_from([1.0, 4.0]),
)
def test_tokens_are_drawn_from_what_transformers_draws_from(
    asked: dict[str, Any], seed: int, vocabulary: int, half: bool, spread: float
) -> None:
    logits = scores(1, vocabulary, seed, spread)[0]
    logits = logits.bfloat16() if half else logits
    prompt, answer = [1, 3, 3, 11, 49], [3, 5, 5, 5, 20]
    args = replace(PLAIN, **asked)
    expected = of_transformers(logits, args, prompt, answer)
    assume(is_sharp(logits, args, expected, prompt, answer))

    def make() -> Sampler:
        made = Sampler(args, seed, vocabulary, prompt)
        for token in answer:
            made.accept(token)
        return made

    assert_draws_from(logits, make, expected)


def is_sharp(
    logits: Tensor, args: Generation, got: Tensor, prompt: list[int], answer: list[int]
) -> bool:
    """Do both mean the same tokens? Not where a cut falls between equals (transformers then keeps
    any of them), or so near to a token that the last bits decide."""
    if not 0 < args.top_p < 1:
        return True
    uncut = of_transformers(logits, replace(args, top_p=1.0, min_p=0.0), prompt, answer)
    ordered = uncut.sort(descending=True).values
    before = ordered.cumsum(0) - ordered
    staying = int((before < args.top_p).sum())
    nearest = float((before - args.top_p).abs().min())
    is_between_equals = staying < len(ordered) and ordered[staying - 1] == ordered[staying] > 0
    return nearest > 1e-5 and not is_between_equals


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("asked", [{}, {"top_k": 12}, {"top_p": 0.6}, {"temperature": 0.6}])
def test_what_is_drawn_is_spread_as_the_probabilities_are(
    vocabulary: int, asked: dict[str, Any]
) -> None:
    logits = scores(1, vocabulary, 5, spread=1.5)[0]
    drawn = torch.zeros(vocabulary)
    rows = [sampler(vocabulary, seed, **asked) for seed in range(40)]
    for _ in range(50):
        for one, token in zip(rows, tokens(logits.expand(40, -1), rows), strict=True):
            drawn[token] += 1
            one.accept(token)
    expected = of_transformers(logits, replace(PLAIN, **asked), [], []) * drawn.sum()
    many = expected >= 8
    got = [*drawn[many].tolist(), float(drawn[~many].sum())]
    wanted = [*expected[many].tolist(), float(expected[~many].sum())]
    if wanted[-1] < 1e-6:
        assert got.pop() == 0
        wanted.pop()
    assert chisquare(got, wanted).pvalue > 1e-3


@pytest.mark.parametrize(
    "asked", [{"top_k": 40}, {"top_k": 40, "top_p": 0.9}, {"top_k": 9, "min_p": 0.1}]
)
@pytest.mark.parametrize("half", [False, True])
def test_both_ways_draw_the_same_token(asked: dict[str, Any], half: bool) -> None:
    logits = scores(64, LARGE, 1)
    logits = logits.bfloat16() if half else logits
    rows = [sampler(LARGE, seed, **asked) for seed in range(64)]
    settings = draw.Settings.of([one.settings() for one in rows])
    assert tokens(logits, rows) == draw.draw_wide(logits, settings, cut=True)


@pytest.mark.parametrize("asked", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.3}, {}])
def test_a_device_cuts_where_a_cpu_does(asked: dict[str, Any]) -> None:
    z = scores(5, LARGE, 3)
    z -= z.amax(1, keepdim=True)
    rows = [sampler(LARGE, seed, min_p=1e-6, **asked).settings() for seed in range(5)]
    wanted, weights = draw.Settings.of(rows).cuts, z.exp()
    cuts.drop(z, weights, wanted)
    assert torch.equal(weights > 0, z >= cuts.on_device(z, wanted))


def test_a_text_is_the_same_whoever_else_is_in_the_batch_and_in_which_row() -> None:
    mine = scores(1, LARGE, 2)[0]
    for asked in ({}, {"top_k": 40}, {"top_p": 0.9}, {"presence_penalty": 1.0}, {"temperature": 0}):
        alone = tokens(mine.expand(1, -1), [sampler(LARGE, 7, **asked)])[0]
        others = [
            sampler(LARGE, 100), sampler(LARGE, 101, top_k=90), sampler(LARGE, 102, top_p=0.5),
            sampler(LARGE, 103, temperature=0, logprobs=3), sampler(LARGE, 104, logit_bias={1: 5}),
        ]  # fmt: skip
        for row in range(6):
            batch = [*others[:row], sampler(LARGE, 7, **asked), *others[row:]]
            logits = scores(6, LARGE, 3)
            logits[row] = mine
            assert tokens(logits, batch)[row] == alone, (asked, row)


def test_an_accepted_text_is_gone_on_with_as_if_it_had_been_chosen() -> None:
    asked = {"top_k": 30, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    first = sampler(LARGE, 3, [1, 2], **asked)
    made = []
    for step in range(12):
        made += tokens(scores(1, LARGE, step), [first])
        first.accept(made[-1])
    second = sampler(LARGE, 3, [1, 2], **asked)
    for token in made[:5]:
        second.accept(token)
    for step in range(5, 12):
        assert tokens(scores(1, LARGE, step), [second]) == [made[step]]
        second.accept(made[step])


def test_a_greedy_token_takes_a_number_too_so_that_settings_may_change() -> None:
    logits = scores(1, SMALL, 0)
    one, other = sampler(SMALL, temperature=0), sampler(SMALL)
    for each in (one, other):
        each.accept(4)
    one.change(PLAIN)
    assert tokens(logits, [one]) == tokens(logits, [other])


def test_to_choose_takes_nothing() -> None:
    logits, one = scores(1, LARGE, 0), sampler(LARGE)
    assert tokens(logits, [one]) == tokens(logits, [one])


def test_seeds_below_0_and_large_ones_are_their_own() -> None:
    logits = scores(1, LARGE, 0, spread=0.1)
    seeds = [0, 1, -1, 2**31, 2**63, -(2**62)]
    assert len({tokens(logits, [sampler(LARGE, seed)])[0] for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 0, "logit_bias": {9: 0}}],
)
def test_greedy_takes_the_lowest_id_among_equals(dtype: torch.dtype, asked: dict[str, Any]) -> None:
    logits = torch.stack([
        torch.tensor([1.0, 5, 5, 2]), torch.tensor([-4.0, -3, -3, -9]),
        torch.tensor([-1.0, -0.0, 0.0, -2]), torch.tensor([-1.0, 0.0, -0.0, -math.inf]),
    ]).to(dtype).repeat_interleave(3, 1)  # fmt: skip
    drawn = tokens(logits, [sampler(12, **asked) for _ in range(4)])
    assert drawn == [3, 3, 3, 3] == logits.argmax(1).tolist()


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "asked", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 9_000, "min_p": 0.1}]
)
@pytest.mark.parametrize("part", [slice(None), slice(7, 8)])
def test_scores_that_are_no_numbers_give_no_token_and_harm_nobody_else(
    vocabulary: int, dtype: torch.dtype, fill: float, asked: dict[str, Any], part: slice
) -> None:
    if part.start and fill != math.inf:
        return  # a single token without a chance is an ordinary thing
    logits = scores(3, vocabulary, 0).to(dtype)
    rows = [sampler(vocabulary, seed, logprobs=2, **asked) for seed in range(3)]
    whole = choose(logits, rows)
    logits[1, part] = fill
    drawn = choose(logits, rows)
    assert drawn[1].token == draw.NOTHING
    assert "no numbers" in drawn[1].error
    assert [drawn[0], drawn[2]] == [whole[0], whole[2]]


def test_temperatures_beyond_all_bounds_are_the_likeliest_and_any_token() -> None:
    logits = scores(8, LARGE, 0)
    cold = [sampler(LARGE, seed, temperature=1e-45) for seed in range(8)]
    assert tokens(logits, cold) == logits.argmax(1).tolist()
    logits[:, ::2] = -math.inf
    hot = [sampler(LARGE, seed, temperature=1e300) for seed in range(8)]
    drawn = tokens(logits, hot)
    assert len(set(drawn)) == 8
    assert all(token % 2 for token in drawn)


def test_tokens_with_the_score_of_the_last_that_stays_all_stay() -> None:
    logits = torch.zeros(1, LARGE)
    logits[0, 5_000:5_400] = 8.0  # more equals than the narrow way looks at
    rows = [sampler(LARGE, seed, top_k=3) for seed in range(300)]
    drawn = set(tokens(logits.expand(300, -1), rows))
    assert drawn <= set(range(5_000, 5_400))
    assert len(drawn) > 150


def test_penalties_follow_the_answer_and_a_change() -> None:
    logits = torch.zeros(1, SMALL)
    logits[0, :3] = torch.tensor([5.0, 4.9, 4.8])
    one = sampler(SMALL, temperature=0, presence_penalty=1.0)
    drawn = []
    for _ in range(4):
        drawn += tokens(logits, [one])
        one.accept(drawn[-1])
    assert drawn == [0, 1, 2, 0]
    one.change(replace(PLAIN, temperature=0, frequency_penalty=1.0))  # 0 was there twice
    assert tokens(logits, [one]) == [1]
    one.change(replace(PLAIN, temperature=0))
    assert tokens(logits, [one]) == [0]


def test_the_next_answer_of_a_chat_goes_on_in_the_generator_and_knows_no_penalties() -> None:
    logits = scores(1, LARGE, 0)
    args = replace(PLAIN, presence_penalty=1.0)
    first, other = Sampler(args, 5, LARGE, [1]), sampler(LARGE, 5)
    for each in (first, other):
        each.accept(4)
    second = Sampler(args, 99, LARGE, [1, 4, 2])
    second.go_on_from(first)
    assert tokens(logits, [second]) == tokens(logits, [other])
    second.reseed(5)
    assert tokens(logits, [second]) == tokens(logits, [sampler(LARGE, 5)])


def test_ids_of_a_prompt_that_have_no_score_are_passed_over() -> None:
    one = sampler(SMALL, 0, [3, SMALL, SMALL + 900], repetition_penalty=1.5, temperature=0)
    logits = scores(1, SMALL, 0)
    logits[0, 3] = 20.0
    assert tokens(logits, [one]) == [3]


def test_a_bias_of_100_decides() -> None:
    logits = scores(2, LARGE, 0)
    rows = [sampler(LARGE, 1, logit_bias={"42": 100}), sampler(LARGE, 1, temperature=0)]
    assert tokens(logits, rows) == [42, int(logits[1].argmax())]


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ([5], "must be a map"),
        ({"x": 1}, "'x' where a token id belongs"),
        ({"50": 1}, "the token id 50"),
        ({"-1": 1}, "the token id -1"),
        ({"1": 101}, "adds 101 to token 1"),
        ({"1": math.nan}, "adds nan to token 1"),
        ({"1": "much"}, "adds 'much' to token 1"),
        ({"1": True}, "adds True to token 1"),
    ],
)
def test_a_bias_that_makes_no_sense_is_refused(bias: Any, said: str) -> None:
    with pytest.raises(BadArgument, match=said):
        sampler(SMALL, logit_bias=bias)


def test_a_refused_change_changes_nothing() -> None:
    logits, one = scores(1, LARGE, 0), sampler(LARGE, top_k=40)
    before = tokens(logits, [one])
    with pytest.raises(BadArgument):
        one.change(replace(PLAIN, temperature=0, logit_bias={"a": 1}))
    assert tokens(logits, [one]) == before


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_of_the_raw_scores_and_only_where_asked(
    vocabulary: int, dtype: torch.dtype
) -> None:
    logits = scores(4, vocabulary, 8).to(dtype)
    asked = {"temperature": 0.3, "top_k": 5, "logit_bias": {2: 50}, "presence_penalty": 1.0}
    rows = [
        sampler(vocabulary, 0, logprobs=3, **asked),
        sampler(vocabulary, 1, **asked),
        sampler(vocabulary, 2, logprobs=0),
        sampler(vocabulary, 3, logprobs=20, temperature=0),
    ]
    choices = choose(logits, rows)
    truth = logits.double().log_softmax(1)
    assert (choices[1].logprob, choices[1].top) == (None, [])
    assert [len(choice.top) for choice in choices] == [3, 0, 0, 20]
    for row in (0, 2, 3):
        choice = choices[row]
        assert choice.logprob == pytest.approx(float(truth[row, choice.token]), abs=1e-5)
        expected = by_rank(truth[row])[: len(choice.top)]
        assert [token for token, _ in choice.top] == expected
        wanted = [float(truth[row, token]) for token in expected]
        assert [value for _, value in choice.top] == pytest.approx(wanted, abs=1e-5)
    assert choices[3].top[0] == (choices[3].token, choices[3].logprob)


def by_rank(row: Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-float(row[token]), token))


def test_among_equals_the_lowest_ids_are_told_however_many_there_are() -> None:
    logits = torch.zeros(2, LARGE)
    logits[0, 9_000] = 1.0
    logits[1, 4_000:9_000] = 2.0
    first, second = score(logits, [9_000, 0], 5)
    assert [token for token, _ in first.top] == [9_000, 0, 1, 2, 3]
    assert [token for token, _ in second.top] == [4_000, 4_001, 4_002, 4_003, 4_004]


@pytest.mark.parametrize("top", [0, 4])
def test_given_tokens_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch, top: int) -> None:
    logits, given = scores(9, LARGE, 4).bfloat16(), [5, 0, LARGE - 1, 17, 17, 2, 3, 4, 8]
    whole = score(logits, given, top)
    monkeypatch.setattr(draw, "PIECE", 2 * LARGE)
    assert score(logits, given, top) == whole
    truth = logits.double().log_softmax(1)
    for row, (token, choice) in enumerate(zip(given, whole, strict=True)):
        assert choice.token == token
        assert choice.logprob == pytest.approx(float(truth[row, token]), abs=1e-5)
        assert [one for one, _ in choice.top] == by_rank(truth[row])[:top]


def test_more_alternatives_than_there_are_tokens_are_all_tokens() -> None:
    choice = score(scores(1, 4, 0), [1], 20)[0]
    assert sorted(token for token, _ in choice.top) == [0, 1, 2, 3]
    assert sum(math.exp(value) for _, value in choice.top) == pytest.approx(1)


def test_nothing_is_chosen_for_nobody() -> None:
    assert choose(torch.empty(0, SMALL), []) == []
    assert score(torch.empty(0, SMALL), [], 3) == []


@pytest.mark.parametrize("asked", [{"temperature": 0}, {}, {"top_k": 5}, {"presence_penalty": 1.0}])
def test_the_models_scores_are_left_as_they_are(asked: dict[str, Any]) -> None:
    logits = scores(2, LARGE, 0)
    kept = logits.clone()
    rows = [sampler(LARGE, 0, logprobs=2, **asked), sampler(LARGE, 1, **asked)]
    rows[0].accept(3)
    choose(logits, rows)
    assert torch.equal(logits, kept)
