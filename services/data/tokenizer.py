# ruff: noqa: TID253  (imported lazily, by workers only)
"""Train a byte-level BPE tokenizer and turn text and dialogues into tokens.

It does not know files: it takes what the sources give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmos.kernel.errors import BadInput
from llmos.services.data.base import Dialogue, Document
from llmos.services.data.packing import Tokens, token_type

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

# 256 bytes and the special tokens are always there.
SMALLEST_VOCABULARY = 256 + len(SPECIAL)

# A tokenizer learns nothing more from more text than this.
TRAINING_CHARACTERS = 20_000_000

# How a dialogue is written where a tokenizer has no template of its own. The answer begins
# on a new line, so that no token spans the end of the prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ 'Question: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Answer:\\n' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\\n' }}{% endif %}"
)


def plain_text(record: Document | Dialogue) -> str:
    """A record as running text."""
    if isinstance(record, Document):
        return record.text
    return "\n".join(content for _, content in record.turns)


def train_tokenizer(
    records: Iterable[Document | Dialogue], vocab_size: int, context: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has tokens, `<unk>` never comes up.

    The vocabulary is smaller than `vocab_size` when the text has fewer pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(records, TRAINING_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def tokenize_text(
    records: Iterable[Document | Dialogue], tokenizer: PreTrainedTokenizerBase
) -> Tokens:
    """All records as one row of tokens (tokens,), each document between bos and eos."""
    kind = token_type(len(tokenizer))
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[Tokens] = []
    fresh = True
    for batch in _batches(records, 256):
        encoded = tokenizer([plain_text(r) for r in batch], add_special_tokens=False, verbose=False)
        for record, ids in zip(batch, encoded["input_ids"], strict=True):
            ends = isinstance(record, Dialogue) or record.ends
            parts.append(np.array([*(begin if fresh else []), *ids, *(end if ends else [])], kind))
            fresh = ends
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def tokenize_dialogues(
    records: Iterable[Document | Dialogue], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[Tokens, Tokens, Tokens, int]:
    """(tokens, learn, starts, dropped): as `packing.Dialogues` wants them.

    `learn` is true for the tokens of the assistant's turns and the eos after them. Dialogues
    of more than `context` + 1 tokens are dropped: cut ones would teach to stop in mid-sentence.
    Raises BadInput where a record has no answer, or the template cannot be followed.
    """
    tokens: list[int] = []
    learn: list[bool] = []
    starts, dropped = [0], 0
    for record in records:
        if isinstance(record, Document):
            raise BadInput("some rows have an answer and some have none", "give one kind of rows")
        ids, mask = _encode_dialogue(record, tokenizer)
        if len(ids) > context + 1:
            dropped += 1
            continue
        tokens += ids
        learn += mask
        starts.append(len(tokens))
    kind = token_type(len(tokenizer))
    return np.array(tokens, kind), np.array(learn, np.bool_), np.array(starts, np.int64), dropped


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template the simple one. Raises BadInput without eos."""
    if tokenizer.eos_token_id is None:
        raise BadInput(
            "the tokenizer has no end-of-sequence token, so an answer could never end",
            "choose a model whose tokenizer has an eos_token",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE


def _encode_dialogue(
    record: Dialogue, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    messages = [{"role": role, "content": content} for role, content in record.turns]
    text = _render(tokenizer, messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, messages[:i], True)
            after = _render(tokenizer, messages[: i + 1], False)
            if not (text.startswith(after) and after.startswith(before)):
                raise BadInput(
                    "the chat template of this model rewrites earlier turns",
                    "give each turn as a prompt/answer pair of its own",
                )
            spans.append((len(before), len(after)))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(coded["input_ids"])
    mask = [
        any(start < last and end > first for first, last in spans)
        for start, end in coded["offset_mapping"]
    ]
    if tokenizer.eos_token_id not in ids[-3:]:
        ids.append(tokenizer.eos_token_id)
        mask.append(True)
    return ids, mask


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool
) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return str(text)


def _first(records: Iterable[Document | Dialogue], characters: int) -> Iterator[str]:
    for record in records:
        if characters <= 0:
            return
        text = plain_text(record)
        characters -= len(text)
        yield text


def _batches(
    records: Iterable[Document | Dialogue], size: int
) -> Iterator[list[Document | Dialogue]]:
    stream = iter(records)
    while batch := list(islice(stream, size)):
        yield batch
