"""Tokens, blocks, dialogues and their order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.errors import BadInput
from llmos.services.data import packing
from llmos.services.data.base import Dialogue, Document
from llmos.services.data.order import Order
from llmos.services.data.tokenizer import (
    ensure_chat_template,
    tokenize_dialogues,
    tokenize_text,
    train_tokenizer,
)
from llmos.services.model.load import load_tokenizer
from support.shared import shared
from support.texts import story_lines

STORIES = Document("\n".join(story_lines(50)))


def test_a_trained_tokenizer_gives_back_any_text(tmp_path: Path) -> None:
    train_tokenizer([STORIES], 300, 64).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("One day Ann", "  spaces ", "日本語 \U0001f600 ünï\n\ttab"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert len({*special, None}) == 5
    assert len(tokenizer) == 300


def test_training_a_tokenizer_twice_gives_the_same_one() -> None:
    one, two = (train_tokenizer([STORIES], 400, 64) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_documents_lie_between_bos_and_eos_and_pieces_do_not() -> None:
    tokenizer = train_tokenizer([STORIES], 300, 64)
    records = [Document("One ", ends=False), Document("day"), Document("Ann")]
    ids = tokenize_text(records, tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert tokenizer.decode(ids) == f"{bos}One day{eos}{bos}Ann{eos}"
    assert ids.dtype == np.uint16


def test_only_answers_and_their_end_are_learnt() -> None:
    tokenizer = train_tokenizer([STORIES], 300, 64)
    ensure_chat_template(tokenizer)
    turns = (("user", "who?"), ("assistant", "Ann"), ("user", "and?"), ("assistant", "Ben"))
    ids, learn, starts, dropped = tokenize_dialogues([Dialogue(turns)], tokenizer, 64)
    assert tokenizer.decode(ids[learn]) == "Ann</s>Ben</s>"
    assert tokenizer.decode(ids) == (
        "<s>Question: who?\nAnswer:\nAnn</s>\nQuestion: and?\nAnswer:\nBen</s>"
    )
    assert (starts.tolist(), dropped) == ([0, len(ids)], 0)


def test_a_prompt_is_tokenized_as_it_will_be_when_the_model_is_asked() -> None:
    tokenizer = train_tokenizer([STORIES], 300, 64)
    ensure_chat_template(tokenizer)
    ids, learn, _, _ = tokenize_dialogues(
        [Dialogue((("user", "who?"), ("assistant", "Ann")))], tokenizer, 64
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "who?"}], add_generation_prompt=True, return_dict=False
    )
    assert ids[~learn].tolist() == asked


def test_a_chat_template_that_is_there_is_kept() -> None:
    tokenizer = train_tokenizer([STORIES], 300, 64)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    ensure_chat_template(tokenizer)
    ids, learn, _, _ = tokenize_dialogues(
        [Dialogue((("user", "Tom"), ("assistant", "Ann")))], tokenizer, 64
    )
    assert tokenizer.decode(ids) == "[Tom][Ann]</s>"
    assert tokenizer.decode(ids[learn]) == "[Ann]</s>"


def test_dialogues_that_do_not_fit_are_counted() -> None:
    tokenizer = train_tokenizer([STORIES], 300, 64)
    ensure_chat_template(tokenizer)
    short = Dialogue((("user", "a"), ("assistant", "b")))
    long = Dialogue((("user", "a"), ("assistant", "b" * 500)))
    _, _, starts, dropped = tokenize_dialogues([short, long, short], tokenizer, 64)
    assert (len(starts) - 1, dropped) == (2, 1)


def test_rows_with_and_without_answers_are_not_mixed() -> None:
    tokenizer = train_tokenizer([STORIES], 300, 64)
    ensure_chat_template(tokenizer)
    with pytest.raises(BadInput, match="some have none"):
        tokenize_dialogues([Document("x")], tokenizer, 64)


def test_blocks_cover_the_text_and_labels_are_the_next_tokens() -> None:
    row = np.arange(31, dtype=np.uint16)
    blocks = packing.Blocks(row, 10)
    inputs, labels = blocks.batch(np.arange(len(blocks)))
    assert inputs.ravel().tolist() == list(range(30))
    assert labels.ravel().tolist() == list(range(1, 31))


def test_dialogues_are_filled_up_with_ignored_labels() -> None:
    tokens = np.array([1, 5, 6, 2, 1, 7, 2], np.uint16)
    learn = np.array([0, 0, 1, 1, 0, 1, 1], np.bool_)
    examples = packing.Dialogues(tokens, learn, np.array([0, 4, 7]), pad_id=9)
    inputs, labels = examples.batch(np.array([0, 1]))
    assert inputs.tolist() == [[1, 5, 6], [1, 7, 9]]
    assert labels.tolist() == [[-100, 6, 2], [7, 2, -100]]
    assert [examples.targets(i) for i in (0, 1)] == [2, 2]


@given(st.lists(st.integers(2, 90), min_size=1, max_size=60), st.integers(1, 8))
def test_batches_have_few_different_lengths_and_lose_nothing(lengths: list[int], size: int) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(starts[-1], dtype=np.uint16)
    examples = packing.Dialogues(tokens, np.ones(len(tokens), np.bool_), starts, pad_id=0)
    for first in range(0, len(lengths), size):
        rows = np.arange(first, min(first + size, len(lengths)))
        inputs, labels = examples.batch(rows)
        assert inputs.shape[1] % packing.MULTIPLE == 0 or inputs.shape[1] == max(lengths) - 1
        for i, row in enumerate(rows):
            assert (labels[i] != packing.IGNORE).sum() == lengths[row] - 1 == examples.targets(row)
            assert (
                inputs[i, : lengths[row] - 1].tolist() == list(range(*starts[row : row + 2]))[:-1]
            )


@given(count=st.integers(1, 50), seed=st.integers(0, 9), takes=st.lists(st.integers(1, 20)))
@settings(max_examples=50)
def test_every_epoch_is_a_permutation_and_any_place_can_be_entered(
    count: int, seed: int, takes: list[int]
) -> None:
    order, seen = Order(count, seed), []
    for n in takes:
        resumed = Order(count, seed)
        resumed.restore(order.state())
        part = order.take(n).tolist()
        assert resumed.take(n).tolist() == part
        seen += part
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count]) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 100])
def test_a_split_is_a_partition_with_at_least_one_on_each_side(count: int) -> None:
    blocks = packing.Blocks(np.arange(count * 4 + 1, dtype=np.uint16), 4)
    training, validation = packing.split(blocks, 0.1, seed=0)
    both = [*training.indices.tolist(), *validation.indices.tolist()]
    assert sorted(both) == list(range(count))
    assert len(training) >= 1
    assert len(validation) >= 1


@pytest.mark.slow
def test_real_text_survives_tokens_and_back() -> None:
    from llmos.services.data.base import read_text

    path = shared("data/tinystories/sample.txt.gz")
    tokenizer = train_tokenizer(read_text(path), 1000, 128)
    ids = tokenize_text(read_text(path), tokenizer)
    text = "".join(r.text for r in read_text(path) if isinstance(r, Document))
    assert tokenizer.decode(ids[1:-1]) == text
    assert len(ids) < len(text) / 2.5
