# ruff: noqa: TID253  (imported lazily, by workers only)
"""Predict the device memory of a language model's training, by kind, without allocating any.

A step runs on tensors without memory (`dryrun`), so that what is predicted is what torch would
hold: logits, casts, gradients and the optimizer's states included. What no tensor shows (the
library itself, its threads and caches) is one measured constant a kind of worker. It does not know
programs or the books.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import PreTrainedConfig

from llmos.services.model.dryrun import Books, give_memory
from llmos.services.model.load import weight_files
from llmos.services.optim import optimizers
from llmos.services.programs.base import COPY, Footprint, Segment

# Private memory of a worker on a CPU that trains, beside its tensors: the pages of the zygote that
# it writes to, thread pools, oneDNN's code, the tokenizer. Measured by
# tests/bench/bench_footprint.py.
CONTEXT_BYTES = 80 << 20
RECURRENT_CONTEXT_BYTES = 60 << 20

# Beside the activations of a CPU: scratch memory of kernels, and small pieces in large holes.
UNSEEN_SHARE = 0.05

# A model with more layers than this is not run as it is: its layers are alike, so that each phase
# grows on a line with their number, which is drawn through these two.
MOST_LAYERS = 6
SOME_LAYERS = (2, 4)

# These run token after token in Python's eyes: one operation a token. Memory goes with the tokens
# of all rows together, so few tokens in more rows stand for many in few.
UNROLLED = ("llmos_rnn", "llmos_gru")
RECURRENT = (*UNROLLED, "llmos_lstm")
UNROLLED_TOKENS = 8
# What autograd's graph takes for one token in one layer of theirs, beside the tensors.
UNROLLED_STEP_BYTES = {"llmos_rnn": 4 << 10, "llmos_gru": 12 << 10}

Peaks = dict[str, dict[str, int]]  # {phase: {kind: bytes}}


@dataclass(frozen=True)
class TrainingShape:
    """A step of training. `dtype` is that of the products, `context` the tokens of an example,
    `device` the kind that it runs on: what the host's libraries take counts on a CPU only. With
    `copy` what is trained has a copy beside it on the device, for checkpoints."""

    batch: int
    context: int
    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    accumulate: int = 1
    grad_clip: float = 1.0
    device: str = "cpu"
    copy: bool = False


# Makes the model to be trained from a configuration; parameters that are not trained are frozen.
Make = Callable[[PreTrainedConfig], torch.nn.Module]


def training_footprint(
    make: Make, config: PreTrainedConfig, shape: TrainingShape, mapped: str = ""
) -> Footprint:
    """The peak of a training in float32 weights.

    `mapped` names the weight file that frozen weights stay mapped from. Gradients are all of them;
    activations are what else is held in the worst moment, and what the heap holds unused.
    """
    text = config.get_text_config()
    layers = text.num_hidden_layers
    if layers <= MOST_LAYERS:
        peaks = _trace(make, config, shape)
    else:
        few, more = (_trace(make, with_layers(config, n), shape) for n in SOME_LAYERS)
        peaks = _line(few, more, (layers - SOME_LAYERS[0]) / (SOME_LAYERS[1] - SOME_LAYERS[0]))
    held = max(peaks.values(), key=lambda kinds: sum(kinds.values()))
    # The last phase holds every gradient.
    gradients = min(
        peaks["step"].get("gradients", 0), held.get("gradients", 0) + held["activations"]
    )
    rest = sum(held.values()) - sum(held.get(k, 0) for k in ("weights", "frozen", "optimizer"))
    context = RECURRENT_CONTEXT_BYTES if text.model_type in RECURRENT else CONTEXT_BYTES
    graph = UNROLLED_STEP_BYTES.get(text.model_type, 0) * layers * shape.context
    merged = held.get("frozen", 0) if shape.device == "cpu" else 0
    segments = [
        Segment("weights", held.get("weights", 0)),
        Segment("weights", held.get("frozen", 0), shared=mapped),
        Segment("gradients", gradients),
        Segment("optimizer", held.get("optimizer", 0)),
        Segment("activations", rest - gradients),
        # At the end of LoRA, on the host, the merged weights take the place of the activations.
        Segment("export", max(0, merged - (rest - gradients))),
        Segment("context", (context if shape.device == "cpu" else 0) + graph),
        Segment(COPY, held.get("weights", 0) + held.get("optimizer", 0) if shape.copy else 0),
    ]
    return Footprint(tuple(s for s in segments if s.bytes))


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration with fewer layers."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return smaller


def _line(few: Peaks, more: Peaks, times: float) -> Peaks:
    """Each kind of each phase on the line through both, at few + times x (more - few)."""
    return {
        phase: {
            kind: max(0, round(few[phase].get(kind, 0) + times * (n - few[phase].get(kind, 0))))
            for kind, n in more[phase].items()
        }
        for phase in more
    }


def _trace(make: Make, config: PreTrainedConfig, shape: TrainingShape) -> Peaks:
    """Run a later step of the training on fake tensors -> the peaks of its phases.

    In "first" the forward pass is done, and the backward pass until half of the gradients are
    there; in "second" the rest of it; in "step" they are clipped and the optimizer moves.
    """
    if config.get_text_config().model_type in UNROLLED:
        rows = -(-shape.batch * shape.context // UNROLLED_TOKENS)
        shape = replace(shape, batch=rows, context=UNROLLED_TOKENS)
    books = Books(heap=shape.device == "cpu")
    with torch.device("meta"):
        model = make(config)
    with books, torch.device("cpu"):
        with books.making("weights"):
            give_memory(model)
        model.train()
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        parameters = [p for _, p in trained]
        books.assign((p for p in model.parameters() if not p.requires_grad), "frozen")
        optimizer = optimizers.build(shape.optimizer, trained, 1e-3, 0.1)
        with books.making("gradients"):
            for p in parameters:
                p.grad = torch.zeros_like(p)
        with books.making("optimizer"):
            optimizer.step()  # its states are there from the second step on
        if shape.accumulate == 1:
            optimizer.zero_grad(set_to_none=True)
        books.phase("first")
        books.begin_step()
        _watch_gradients(books, parameters)
        _forward_and_backward(model, shape)
        books.phase("step")
        if shape.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, shape.grad_clip)
        optimizer.step()
    unused = books.unused_bytes()
    for kinds in books.peaks.values():
        unseen = UNSEEN_SHARE * kinds.get("activations", 0) if shape.device == "cpu" else 0
        kinds["unused"] = unused + int(unseen)
    return books.peaks


def _watch_gradients(books: Books, parameters: list[torch.nn.Parameter]) -> None:
    """Book gradients as such when they come; with half of them the second phase begins."""
    missing = sum(p.numel() for p in parameters) // 2
    books.peaks["second"] = {}

    def came(parameter: torch.Tensor) -> None:
        nonlocal missing
        assert parameter.grad is not None
        books.assign([parameter.grad], "gradients")
        before, missing = missing, missing - parameter.numel()
        if before > 0 >= missing:
            books.phase("second")

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(came)  # type: ignore[no-untyped-call]


def _forward_and_backward(model: torch.nn.Module, shape: TrainingShape) -> None:
    """One micro-batch, as lm_loop does it."""
    ids = torch.zeros(shape.batch, shape.context, dtype=torch.int64)
    with torch.autocast("cpu", shape.dtype, enabled=shape.dtype is not torch.float32):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="sum")
    del logits
    loss.backward()  # type: ignore[no-untyped-call]


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
