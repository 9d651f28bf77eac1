# ruff: noqa: TID253  (imported lazily, by workers only)
"""Build a new causal language model of a family from a few numbers.

It does not know data or training. The transformer is transformers' own Llama.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from llmos.kernel.errors import BadArgument
from llmos.services.model.recurrent import GruConfig, LstmConfig, RecurrentConfig, RnnConfig

RECURRENT: dict[str, type[RecurrentConfig]] = {
    "rnn": RnnConfig,
    "lstm": LstmConfig,
    "gru": GruConfig,
}
ARCHITECTURES = (*RECURRENT, "transformer")


@dataclass(frozen=True)
class Shape:
    """What a new model is built from. `special` has the ids of bos, eos and pad."""

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    dropout: float = 0.0
    special: dict[str, Any] = field(default_factory=dict)


def build_config(architecture: str, shape: Shape) -> PreTrainedConfig:
    """The configuration of a new model. Raises BadArgument."""
    if architecture in RECURRENT:
        return RECURRENT[architecture](
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            dropout=shape.dropout,
            **shape.special,
        )
    if architecture != "transformer":
        names = ", ".join(ARCHITECTURES)
        raise BadArgument(f"there is no architecture {architecture!r}", f"one of {names}")
    if shape.width % (2 * shape.heads):
        raise BadArgument(
            f"width {shape.width} cannot be divided among {shape.heads} heads of an even width",
            f"choose a multiple of {2 * shape.heads}, for example {_near(shape)}",
        )
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        # Three matrices of 8/3 the width weigh what two of 4 times the width do (Shazeer 2020).
        intermediate_size=-(-shape.width * 8 // 3 // 32) * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        attention_dropout=shape.dropout,
        tie_word_embeddings=True,
        **shape.special,
    )


def build(architecture: str, shape: Shape) -> PreTrainedModel:
    """A new model in float32 with random weights from torch's generator. Raises BadArgument."""
    config = build_config(architecture, shape)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def _near(shape: Shape) -> int:
    unit = 2 * shape.heads
    return max(unit, round(shape.width / unit) * unit)
