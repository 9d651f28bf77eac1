"""Text while it is made: the pieces, joined, are what the whole decodes to."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from llmos.services.engine.text import StopStrings, TextStream
from support.shared import shared
from support.small_models import make_tokenizer

TEXTS = [
    "Once upon a time, there was a cat.",
    "你好 世界。🙂🎉 naïve café",
    "   spaces   first,\n\n\tlines\n and a last one \n",
    "👩‍👩‍👧‍👦 families of many code points 🏳️‍🌈",
    "a" * 300 + " 你" * 60,
]


def byte_level() -> Any:
    return make_tokenizer()


def sentencepiece_like() -> Any:
    """Byte fallback, and a first space that the decoder drops."""
    return AutoTokenizer.from_pretrained(shared("models/stories15M"))


def pieces(tokenizer: Any, prompt_ids: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt_ids)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_decoded_whole_wherever_the_prompt_ends(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text).input_ids
    for cut in {0, 1, 2, len(ids) // 2, max(0, len(ids) - 2)}:
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        if before.endswith("�"):
            continue  # a prompt is text: it does not end inside a character
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces(tokenizer, ids[:cut], ids[cut:])) == whole[len(before) :]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_no_piece_holds_part_of_a_character(make: Any) -> None:
    tokenizer = make()
    prompt, ids = tokenizer("hello").input_ids, tokenizer(" 世界🙂🎉", add_special_tokens=False)
    got = pieces(tokenizer, prompt, ids.input_ids)
    assert "�" not in "".join(got)
    assert "" in got, "the first bytes of a character show nothing"


def test_bytes_that_are_no_character_come_out_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer("龘").input_ids[:1]
    assert pieces(tokenizer, tokenizer("a").input_ids, ids) == ["", "�"]


def test_a_long_stream_decodes_a_short_window() -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer, tokenizer("the cat").input_ids)
    for token in tokenizer("the dog sat 你好 " * 100).input_ids:
        stream.push(token)
    assert len(stream._ids) < 30


@pytest.mark.parametrize(
    ("stops", "given", "shown"),
    [
        (["END"], ["one ", "E", "ND two"], "one "),
        (["END"], ["one ", "EN", "OUGH"], "one ENOUGH"),
        (["\n\n", "."], ["a\n", "\nb."], "a"),
        (["aab"], ["aa", "ab"], "a"),
        ([], ["as it ", "comes"], "as it comes"),
        (["END"], ["ends in EN"], "ends in EN"),
    ],
)
def test_text_is_cut_before_a_stop_string_however_it_arrives(
    stops: list[str], given: list[str], shown: str
) -> None:
    filter_ = StopStrings(stops)
    out = ""
    for piece in given:
        out += filter_.push(piece)
        assert shown.startswith(out), "what a stop string may begin with was shown"
        if filter_.hit:
            break
    assert out + filter_.flush() == shown
