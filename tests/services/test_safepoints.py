"""Boundaries in models and optimizers: they are where they should be, and change no bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmos.drivers.worker.gate import Gate
from llmos.services.model import safepoints
from llmos.services.model.families import Shape, build
from llmos.services.optim import optimizers, pieces
from support.streams import FakeStreams


class Noting(Gate):
    """Notes the boundaries that it sees."""

    def __init__(self) -> None:
        super().__init__(pytest.fail, FakeStreams())
        self.seen: list[str] = []

    def boundary(self, name: str) -> None:
        self.seen.append(name)
        super().boundary(name)


def llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2))


def lstm() -> nn.Module:
    return build("lstm", Shape(64, 16, 16, 2, 2, 0.0, {}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "lstm": lstm,
}


def train(model: nn.Module, gate: Gate, steps: int = 3, checkpointing: bool = False) -> list[float]:
    safepoints.install(model, gate)
    if checkpointing:
        # Its name from transformers 5.20 on; the older one warns there.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    optimizer = optimizers.build("adamw", model.named_parameters(), 1e-2, 0.1)
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 8))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pieces.step(optimizer, gate, piece_bytes=4096)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_a_training_with_boundaries_gives_the_same_bits(name: str) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]()
    watched = copy.deepcopy(plain)
    gate = Noting()
    assert train(watched, gate) == train(plain, Gate(pytest.fail))
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert any(seen.endswith("forward") for seen in gate.seen)
    assert any(seen.endswith("backward") for seen in gate.seen)
    assert "optimizer 1" in gate.seen


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_boundaries_lie_before_each_layer_in_both_directions(name: str) -> None:
    gate = Noting()
    train(MODELS[name](), gate, steps=1)
    layers = {"llama": "model.layers", "gpt2": "transformer.h"}[name]
    seen = [s for s in gate.seen if s.startswith(layers)]
    assert seen == [f"{layers}.{n} forward" for n in (0, 1, 2)] + [
        f"{layers}.{n} backward" for n in (2, 1, 0)
    ]
    # The head is the largest launch of a small model: it has boundaries of its own.
    assert {"lm_head forward", "lm_head backward"} <= set(gate.seen)


def test_layers_that_are_computed_again_in_backward_have_boundaries_and_the_same_bits() -> None:
    gate = Noting()
    torch.manual_seed(0)
    plain = llama()
    ours = train(copy.deepcopy(plain), gate, checkpointing=True)
    assert ours == train(plain, Gate(pytest.fail), checkpointing=True)
    # A layer is computed again as part of its backward; some versions of transformers run its
    # hooks again there, and that is one boundary more.
    backward = [s for s in gate.seen if s.startswith("model.layers") and s.endswith("backward")]
    assert backward == [f"model.layers.{n} backward" for n in (2, 1, 0)] * 3


def test_an_adapter_and_a_frozen_model_have_the_same_blocks() -> None:
    from llmos.services.programs.lm_weights import add_adapter

    model: Any = llama()
    names = [name.rpartition("model.")[2] for name, _ in safepoints.blocks(model)]
    adapted = add_adapter(model, 2, 4, 0.0, [])
    assert [name.rpartition("model.")[2] for name, _ in safepoints.blocks(adapted)] == names
    gate = Noting()
    train(adapted, gate, steps=2)
    assert "layers.1 backward" in {s.rpartition("model.")[2] for s in gate.seen}


def test_where_no_gate_is_needed_nothing_is_installed() -> None:
    model = llama()
    safepoints.install(model, Gate(pytest.fail))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_compiled_model_is_left_alone() -> None:
    class Compiled(nn.Module):  # what torch.compile gives has the model as `_orig_mod`
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = llama()

    model = Compiled()
    safepoints.install(model, Noting())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_an_optimizer_in_pieces_steps_to_the_same_bits(name: str) -> None:
    def run(gate: Gate) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = llama()
        optimizer = optimizers.build(name, model.named_parameters(), 0.01, 0.1)
        before = optimizer.param_groups
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            pieces.step(optimizer, gate, piece_bytes=2000)
        assert optimizer.param_groups is before
        assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
        return [*model.parameters(), *pieces.tensors_of(optimizer)]

    gate = Noting()
    for ours, whole in zip(run(gate), run(Gate(pytest.fail)), strict=True):
        assert torch.equal(ours, whole)
    assert len(gate.seen) > 3 * 5


def test_an_optimizer_that_may_not_be_cut_takes_its_step_whole() -> None:
    class Counting(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    model = llama()
    optimizer = Counting(model.parameters(), 0.1)
    pieces.step(optimizer, Noting(), piece_bytes=1)
    assert optimizer.steps == 1


def test_a_step_that_raises_leaves_the_optimizer_whole() -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    groups = optimizer.param_groups
    gate = Noting()
    gate.hears({"k": "lease"})

    def fail(name: str) -> None:
        if name.endswith("1"):
            raise RuntimeError("out of memory")

    gate.boundary = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        pieces.step(optimizer, gate, piece_bytes=1)
    assert optimizer.param_groups is groups
