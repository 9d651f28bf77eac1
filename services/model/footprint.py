# ruff: noqa: TID253  (imported lazily, by workers only)
"""Predict the device memory of a language model, by kind, without allocating any.

It does not know programs or the books. Shapes come from the meta device; what cannot be read
from shapes (the library itself, its caches) is one fitted constant a kind of use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmos.services.model.load import weight_files
from llmos.services.programs.base import Footprint, Segment

# Private memory of a process forked from the zygote that computes: thread pools, the scratch
# of oneDNN, code that ran for the first time. Fitted on 2 cores of x86-64 (torch 2.13, CPU).
BASE_BYTES = {"train": 150 << 20, "infer": 60 << 20}

# Bytes kept for the backward pass, per token, layer and unit of width (and of the MLP's width), by
# the bytes of a value in the products: counted with saved-tensor hooks for the transformer, fitted
# to measured peaks for the recurrent models, whose kernels keep workspaces of their own.
TRANSFORMER = {4: (40.0, 16.0), 2: (34.0, 8.0)}
RECURRENT = {
    "llmos_rnn": {4: 21.0, 2: 13.0},
    "llmos_lstm": {4: 36.0, 2: 32.0},
    "llmos_gru": {4: 36.0, 2: 27.0},
}

# Bytes per token and unit of the vocabulary: logits in the type of the products and in float32,
# their softmax and its gradient; and per unit of width: embedding and last norm.
PER_LOGIT, PER_WIDTH = 16.0, 14.0

# State tensors that an optimizer keeps a weight.
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 1}


@dataclass(frozen=True)
class TrainingShape:
    """A step of training: micro-batch, tokens of an example, bytes of a value in the products."""

    batch: int
    context: int
    value_bytes: int = 4
    optimizer: str = "adamw"


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory: every weight has its shape only."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def parameter_bytes(model: torch.nn.Module, *, trainable: bool = False) -> int:
    """Bytes of all parameters, tied ones once; with `trainable`, of those that are trained."""
    return sum(
        p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trainable
    )


def training_footprint(
    model: torch.nn.Module, config: PreTrainedConfig, shape: TrainingShape, mapped: str = ""
) -> Footprint:
    """The peak of a training of `model` (on the meta device, float32).

    `mapped` names the weight file that the frozen weights stay mapped from.
    """
    trained = parameter_bytes(model, trainable=True)
    frozen = parameter_bytes(model) - trained
    states = OPTIMIZER_STATES.get(shape.optimizer, 2)
    segments = [
        Segment("weights", trained),
        Segment("weights", frozen, shared=mapped),
        Segment("gradients", trained),
        Segment("optimizer", states * trained),
        Segment("activations", activation_bytes(config, shape)),
        Segment("context", BASE_BYTES["train"]),
    ]
    return Footprint(tuple(s for s in segments if s.bytes))


def activation_bytes(config: PreTrainedConfig, shape: TrainingShape) -> int:
    """What a forward pass keeps for its backward pass, with one layer's gradients on top."""
    text = config.get_text_config()
    width, layers, value = text.hidden_size, text.num_hidden_layers, shape.value_bytes
    if text.model_type in RECURRENT:
        layer = RECURRENT[text.model_type][value] * width
        passing = 0.0
    else:
        mlp = getattr(text, "intermediate_size", None) or 4 * width
        per_width, per_mlp = TRANSFORMER[value]
        layer = per_width * width + per_mlp * mlp
        passing = value * (6.0 * width + 4.0 * mlp)
    token = layers * layer + passing + PER_LOGIT * text.vocab_size + PER_WIDTH * width
    return int(shape.batch * shape.context * token)


def inference_footprint(
    config: PreTrainedConfig,
    tokens: int,
    dtype: torch.dtype,
    folder: Path | None = None,
    stored: torch.dtype | None = None,
) -> Footprint:
    """The peak of serving: `tokens` is what all sequences hold together.

    Weights whose `stored` type is `dtype` stay mapped from the files in `folder`.
    """
    model = on_meta(config)
    count = sum(p.numel() for p in model.parameters())
    weights = [Segment("weights", count * dtype.itemsize)]
    files = weight_files(folder) if folder is not None else []
    if files and stored is dtype:
        weights = [Segment("weights", f.stat().st_size, shared=str(f)) for f in files]
    text = config.get_text_config()
    width = text.hidden_size
    activations = tokens * width * 12 * dtype.itemsize + text.vocab_size * 4 * 8
    kv = kv_bytes_per_token(config, dtype) * tokens
    return Footprint(
        (
            *weights,
            Segment("kv", kv),
            Segment("activations", activations),
            Segment("context", BASE_BYTES["infer"]),
        )
    )


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values a token; 0 for a recurrent model, whose state does not grow."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads or text.model_type in RECURRENT:
        return 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * head_width * dtype.itemsize)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The type of the largest weight in a model folder, read from the header of its file."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    largest, found = 0, None
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                part = opened.get_slice(key)
                size = torch.Size(part.get_shape()).numel()
                if size > largest:
                    largest, found = size, names.get(part.get_dtype())
    return found
