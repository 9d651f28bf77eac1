"""Answers of a given form: whatever the model's scores are, the text has the form."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.engine import constrain, draw
from llmos.services.engine.constrain import Constraint
from llmos.services.engine.sampling import Sampler, choose
from llmos.services.programs.engine import Engine
from llmos.services.programs.infer import Infer
from support.run_program import Run, admit, make_context
from support.shared import shared
from support.small_models import make_llama, make_tokenizer

pytest.importorskip("llguidance", reason="pip install 'llmos[structured]'")

PLAIN = Infer.Args(model="", temperature=1.0, top_k=0, top_p=1.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    return AutoTokenizer.from_pretrained(shared("models/stories15M"))


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Bytes as characters (GPT-2), and byte fallback with a first space (Llama)."""
    return request.getfixturevalue(request.param)


def stops(tokenizer: Any) -> frozenset[int]:
    return frozenset({tokenizer.eos_token_id})


def constraint(tokenizer: Any, more_ids: int = 0, **asked: Any) -> Constraint:
    args = replace(PLAIN, **asked)
    made = Constraint.of(tokenizer, args, stops(tokenizer), len(tokenizer) + more_ids)
    assert made is not None
    return made


def allowed(one: Constraint, tokenizer: Any) -> list[int]:
    scores = torch.zeros(1, len(tokenizer))
    constrain.forbid(scores, [one])
    return scores[0].isfinite().nonzero().flatten().tolist()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in the middle of another: SentencePiece begins one with a space."""
    line = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    ids = tokenizer("\n" + text, add_special_tokens=False).input_ids
    return list(ids[ids.index(line) + 1 :])


def takes(tokenizer: Any, one: Constraint, text: str) -> bool:
    """May the whole text be made, token for token, and end there?"""
    for token in ids_of(tokenizer, text):
        if token not in allowed(one, tokenizer):
            return False
        one.accept(token)
    return tokenizer.eos_token_id in allowed(one, tokenizer)


def write(tokenizer: Any, seed: int, more_ids: int = 0, most: int = 300, **asked: Any) -> str:
    """What a model with random scores makes of it."""
    vocabulary = len(tokenizer) + more_ids
    one = constraint(tokenizer, more_ids, **asked)
    sampler = Sampler(replace(PLAIN, **asked), seed, vocabulary, constraint=one)
    scores, made = torch.Generator().manual_seed(seed), []
    while not sampler.finished:
        assert len(made) < most, tokenizer.decode(made)
        made += tokens(torch.randn(1, vocabulary, generator=scores) * 4, [sampler])
        sampler.accept(made[-1])
    if made[-1] == tokenizer.eos_token_id:
        made.pop()
    line = tokenizer("\n", add_special_tokens=False).input_ids[-1:]
    return str(tokenizer.decode(line + made)).removeprefix("\n")


def tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    return [choice.token for choice in choose(logits, samplers)]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", 3]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("more_ids", [0, 77])
def test_random_scores_make_json_of_the_schema(tokenizer: Any, seed: int, more_ids: int) -> None:
    found = json.loads(write(tokenizer, seed, more_ids, schema=PERSON))
    assert list(found) == ["name", "age", "tags"]
    assert 1 <= len(found["name"]) <= 8
    assert 0 <= found["age"] <= 120
    assert len(found["tags"]) <= 2
    assert {*found["tags"]} <= {"a", "bé", 3}


@pytest.mark.parametrize(
    "regex", [r"\d{3}-[a-f]+x", r"[\u4e00-\u9fff]{2,5}!", r"(?i)yes|no", r"(é|🙂)+\."]
)
@pytest.mark.parametrize("seed", range(3))
def test_random_scores_make_text_of_the_expression(tokenizer: Any, regex: str, seed: int) -> None:
    assert re.fullmatch(regex, write(tokenizer, seed, regex=regex))


ODD_TEXTS = [
    'say "no"',
    "back\\slash",
    "a/b",
    "line\nbreak",
    "ü 🙂",
    "a.*",
    " space ",
    "yes",
    "yes!",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_choice_can_be_made_and_nothing_else(tokenizer: Any, text: str) -> None:
    assert takes(tokenizer, constraint(tokenizer, choice=ODD_TEXTS), text)
    assert not takes(tokenizer, constraint(tokenizer, choice=ODD_TEXTS), text + "x")
    if text[:-1] not in ODD_TEXTS:
        assert not takes(tokenizer, constraint(tokenizer, choice=ODD_TEXTS), text[:-1])


def test_random_scores_make_one_of_the_texts(tokenizer: Any) -> None:
    made = {write(tokenizer, seed, choice=ODD_TEXTS) for seed in range(12)}
    assert made <= {*ODD_TEXTS}
    assert len(made) > 2


NODE = {
    "type": "object",
    "properties": {
        "v": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["v", "next"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (True, ["{}", '{"a": [1, null, {"b": "x"}]}'], ["[]", "1", '{"a": 1'],),
        ('{"type": "boolean"}', ["true"], ["1"]),
        ({"const": 'ü"\n'}, ['"ü\\"\\n"'], ['"u"']),
        ({"type": "array", "items": {"type": "number"}, "minItems": 2}, ["[1, 2.5]"], ["[1]"]),
        ({"type": "string", "pattern": "^[a-c]{2}$"}, ['"ab"'], ['"abc"', '"zz"']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"x"']),
        ({"$ref": "#/$defs/node", "$defs": {"node": NODE}},
         ['{"v":1,"next":{"v":2,"next":null}}'], ['{"v":1}']),
        ({"allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"type": "object"}]},
         ['{"a": 1}'], ["{}", '{"a": 2}']),
        ({"type": "integer", "multipleOf": 5}, ["10"], ["7"]),
        ({"type": "object", "patternProperties": {"^x": {"type": "null"}},
          "additionalProperties": False}, ['{"xa": null}'], ['{"y": null}']),
        (True, ['{\n  "a": 1\n}', '{"a":1}'], ['{      "a":1}', ' {"a":1}', '{"a":1}\n']),
    ],
)  # fmt: skip
def test_a_schema_takes_what_is_of_it_and_nothing_else(
    tokenizer: Any, schema: Any, good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert takes(tokenizer, constraint(tokenizer, schema=schema), text), text
    for text in bad:
        assert not takes(tokenizer, constraint(tokenizer, schema=schema), text), text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"schema": {"type": "array", "uniqueItems": True}}, 'schema cannot .*: .*"uniqueItems"'),
        ({"schema": {"not": {"type": "string"}}}, '"not"'),
        ({"schema": {"type": "strin"}}, "Invalid type: strin"),
        ({"schema": {"$ref": "#/$defs/none"}}, "does not exist"),
        ({"schema": {"$ref": "http://127.0.0.1/x"}}, "does not fetch"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum .5. is greater"),
        ({"schema": [1]}, "must be a JSON object"),
        ({"schema": False}, "must be a JSON object"),
        ({"schema": "{"}, "the schema is no JSON"),
        ({"regex": "a(?=b)"}, "expression cannot .* look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "["}, "unclosed character class"),
        ({"regex": "a", "schema": True}, "one of schema and regex is enough"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_in_one_line(
    byte_level: Any, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadArgument, match=said) as raised:
        constraint(byte_level, **asked)
    assert "\n" not in raised.value.message


def test_nothing_asked_is_no_constraint(byte_level: Any) -> None:
    assert Constraint.of(byte_level, PLAIN, stops(byte_level), len(byte_level)) is None
    assert Constraint.of(byte_level, SimpleNamespace(), stops(byte_level), len(byte_level)) is None


def test_after_the_last_token_only_the_end_may_follow(byte_level: Any) -> None:
    both = frozenset({byte_level.eos_token_id, ids_of(byte_level, "z")[0]})
    args = replace(PLAIN, regex="ab")
    one = Constraint.of(byte_level, args, both, len(byte_level))
    assert one is not None
    assert takes(byte_level, one, "ab")
    assert one.done
    assert frozenset(allowed(one, byte_level)) == both
    one.accept(byte_level.eos_token_id)
    one.accept(byte_level.eos_token_id)
    assert one.done
    assert not one.error


def test_where_it_may_end_or_go_on_both_are_allowed(byte_level: Any) -> None:
    one = constraint(byte_level, choice=["a", "ab"])
    one.accept(ids_of(byte_level, "a")[0])
    assert not one.done
    assert byte_level.eos_token_id in allowed(one, byte_level)
    assert len(allowed(one, byte_level)) > 1
    one.accept(byte_level.eos_token_id)
    assert one.done


def test_an_accepted_beginning_is_gone_on_with(byte_level: Any) -> None:
    first = constraint(byte_level, schema=PERSON)
    second = constraint(byte_level, schema=PERSON)
    for token in ids_of(byte_level, '{"name": "é'):
        first.accept(token)
    assert allowed(first, byte_level) != allowed(second, byte_level), "copies are independent"
    for token in ids_of(byte_level, '{"name": "é'):
        second.accept(token)
    assert allowed(first, byte_level) == allowed(second, byte_level)


def test_a_specification_is_compiled_once(byte_level: Any) -> None:
    constraint(byte_level, regex="once+")
    before = constrain._compiled.cache_info()
    constraint(byte_level, regex="once+")
    after = constrain._compiled.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_rows_with_and_without_a_form_share_a_batch(tokenizer: Any) -> None:
    vocabulary = len(tokenizer)
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    greedy = replace(PLAIN, temperature=0, logprobs=2)
    forms = [None, constraint(tokenizer, regex="[0-9]+"), None, constraint(tokenizer, choice=["x"])]
    samplers = [Sampler(greedy, 0, vocabulary, constraint=form) for form in forms]
    drawn = choose(logits, samplers)
    assert [drawn[0].token, drawn[2].token] == logits.argmax(1)[[0, 2]].tolist()
    assert tokenizer.decode(drawn[1].token).strip().isdigit()
    assert drawn[3].token == ids_of(tokenizer, "x")[0]
    raw = logits.double().log_softmax(1)
    for row, choice in enumerate(drawn):
        assert choice.logprob == pytest.approx(float(raw[row, choice.token]), abs=1e-5)
        assert choice.top[0][0] == int(logits[row].argmax()), "the model's own scores"


def test_a_device_unpacks_bits_as_a_cpu_does() -> None:
    octets = torch.randint(0, 256, (3, 40), dtype=torch.uint8)
    wanted = np.unpackbits(octets.numpy(), axis=1, bitorder="little")
    assert constrain.unpack_bits(octets).tolist() == wanted.tolist()


def test_a_model_with_fewer_ids_than_its_tokenizer_makes_only_those(byte_level: Any) -> None:
    few = len(byte_level) - 20
    made = Constraint.of(byte_level, replace(PLAIN, regex="[a-z]+"), stops(byte_level), few)
    scores = torch.zeros(1, few)
    constrain.forbid(scores, [made])
    assert scores.isfinite().any()


def test_a_token_that_is_not_allowed_ends_this_answer_and_no_other(byte_level: Any) -> None:
    vocabulary = len(byte_level)
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(1))
    forms = [constraint(byte_level, regex="ab"), constraint(byte_level, regex="ab")]
    samplers = [Sampler(PLAIN, 0, vocabulary, constraint=form) for form in forms]
    samplers[0].accept(ids_of(byte_level, "z")[0])
    bad, good = choose(logits, samplers)
    assert bad.token == draw.NOTHING
    assert re.match("the answer cannot go on in the form asked for: .*'z'", bad.error)
    assert "\n" not in bad.error
    assert not good.error
    assert byte_level.decode(good.token) in ("a", "ab")


def test_a_model_without_an_end_cannot_make_an_answer_of_a_form(byte_level: Any) -> None:
    args = replace(PLAIN, regex="a")
    for none in (frozenset[int](), frozenset({len(byte_level) + 5})):
        with pytest.raises(BadInput, match="no token that ends a text"):
            Constraint.of(byte_level, args, none, len(byte_level))


def test_without_the_package_one_line_says_what_to_install(
    byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(BadArgument, match="not installed") as raised:
        constraint(byte_level, regex="never seen before")
    assert raised.value.hint == "pip install 'llmos[structured]'"


def test_an_engine_makes_what_was_asked_for(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    ctx = make_context(tmp_path, threads=1)
    run = Run.start(Engine, ctx, model=str(model), dtype="float32")
    asked: list[dict[str, Any]] = [
        {"schema": PERSON}, {"regex": r"\d{4}"}, {"choice": ["yes", "no"]}, {},
    ]  # fmt: skip
    for pid, form in enumerate(asked, start=1):
        args = {"model": str(model), "prompt": "the cat", "temperature": 1.0, "max_tokens": 100}
        admit(run, pid, "infer", **args, **form)
    run.until_idle()
    assert set(json.loads(ctx.text(1))) == {"name", "age", "tags"}
    assert re.fullmatch(r"\d{4}", ctx.text(2))
    assert ctx.text(3) in ("yes", "no")
    assert all(ctx.guests_done[pid].result["finish_reason"] == "stop" for pid in (1, 2, 3))
