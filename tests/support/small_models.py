"""Small random language models in ordinary model folders, made in a second.

What they say means nothing; that it is always the same is what the tests need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXT = [
    "the cat sat on the mat and the dog ran",
    "你好 世界。今天天气很好",
    "🙂🎉 naïve café",
] * 20
VOCABULARY = 320
CONTEXT = 128

# A template in which each turn is a line, ended by the end-of-text token.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(template: str = "") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (as GPT-2's), trained on three lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    if template:
        made.chat_template = template
    return made


def make_llama(folder: Path, template: str = "", seed: int = 0, **other: Any) -> Path:
    """A Llama with grouped-query attention, as a model folder."""
    config = LlamaConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT, "bos_token_id": None, "eos_token_id": 0,
        "pad_token_id": 0, "initializer_range": 0.3, **other,
    })  # fmt: skip
    torch.manual_seed(seed)
    return _save(LlamaForCausalLM(config), folder, template)


def make_gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2, as a model folder."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _save(GPT2LMHeadModel(config), folder, "")


def _save(model: PreTrainedModel, folder: Path, template: str) -> Path:
    model.save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder
