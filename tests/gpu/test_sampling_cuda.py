"""On a machine with a CUDA device: pytest -m gpu. Its scores give the tokens that a CPU gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmos.services.engine.arguments import Generation
from llmos.services.engine.beams import Beams
from llmos.services.engine.constrain import Constraint
from llmos.services.engine.sampling import Sampler, choose, score
from support.small_models import make_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VOCABULARY = 32_007
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 5},
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 0, "top_p": 0.9, "logprobs": 0},
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 5_000, "min_p": 0.01},
    {"top_k": 20, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {"7": 2}},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_a_cpu(dtype: torch.dtype) -> None:
    logits = (torch.randn(48, VOCABULARY) * 2.5).to(dtype)
    samplers = [
        Sampler(replace(Generation(model=""), **ASKED[row % 6]), row, VOCABULARY, [1, 2, row])
        for row in range(48)
    ]
    here, there = choose(logits, samplers), choose(logits.cuda(), samplers)
    assert [one.token for one in there] == [one.token for one in here]
    assert [one.logprob for one in there] == pytest.approx([one.logprob for one in here], abs=1e-4)
    assert [[t for t, _ in one.top] for one in there] == [[t for t, _ in one.top] for one in here]


def test_log_probabilities_of_a_prompt_are_those_of_a_cpu() -> None:
    logits, tokens = torch.randn(64, VOCABULARY) * 2.5, list(range(64))
    here, there = score(logits, tokens, 3), score(logits.cuda(), tokens, 3)
    assert [one.logprob for one in there] == pytest.approx([one.logprob for one in here], abs=1e-4)


def test_a_form_is_kept_to() -> None:
    pytest.importorskip("llguidance")
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    args = replace(Generation(model=""), temperature=1.0)
    drawn = []
    for device in ("cpu", "cuda"):
        form = Constraint.of(tokenizer, _Form(), frozenset({tokenizer.eos_token_id}), size)
        sampler = Sampler(args, 3, size, constraint=form)
        made: list[int] = []
        while not sampler.finished:
            logits = torch.randn(1, size, generator=torch.Generator().manual_seed(len(made)))
            made.append(choose(logits.to(device), [sampler])[0].token)
            sampler.accept(made[-1])
        drawn.append(made)
    assert drawn[0] == drawn[1]


class _Form:
    schema = None
    regex = "[a-f]{3}-[0-9]{2}"
    choice: tuple[str, ...] = ()


def test_beams_are_those_of_a_cpu() -> None:
    here, there = Beams(4, 1.0, [0], 8), Beams(4, 1.0, [0], 8)
    rows = 1
    while not here.finished:
        logprobs = torch.randn(rows, 500).log_softmax(1)
        parents, tokens = here.step(logprobs)
        assert there.step(logprobs.cuda()) == (parents, tokens)
        rows = len(tokens)
    assert [ids for ids, _ in there.result()] == [ids for ids, _ in here.result()]
