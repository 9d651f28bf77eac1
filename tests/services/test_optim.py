"""Optimizers by name, and schedules over the progress of a run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.errors import BadArgument
from llmos.services.optim import optimizers
from llmos.services.optim.schedules import SCHEDULES, factor


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(4, 3)
        self.linear = torch.nn.Linear(3, 1)
        self.norm = torch.nn.LayerNorm(3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(self.norm(self.embed_tokens(ids)))
        return out


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_every_optimizer_makes_the_loss_fall(name: str) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizers.build(name, net.named_parameters(), lr=0.02, weight_decay=0.0)
    ids, wanted = torch.arange(4), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    losses = []
    for _ in range(60):
        loss = (net(ids) - wanted).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    assert all(group["fused"] for group in optimizer.param_groups)


def test_only_matrices_decay() -> None:
    net = Net()
    groups = optimizers.decay_groups(net.named_parameters(), 0.1)
    by_decay = {g["weight_decay"]: g["params"] for g in groups}
    assert [id(p) for p in by_decay[0.1]] == [id(net.linear.weight)]
    assert len(by_decay[0.0]) == 4


def test_an_unknown_optimizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadArgument, match="no optimizer 'lion'") as caught:
        optimizers.build("lion", Net().named_parameters(), lr=1.0, weight_decay=0.0)
    assert "adamw" in caught.value.hint


@given(progress=st.floats(0, 1), warmup=st.floats(0, 1), name=st.sampled_from(sorted(SCHEDULES)))
def test_a_factor_lies_between_nothing_and_the_peak(
    progress: float, warmup: float, name: str
) -> None:
    assert 0.0 <= factor(name, progress, warmup) <= 1.0


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_rate_rises_to_the_peak_and_does_not_rise_again(name: str) -> None:
    values = [factor(name, i / 100, 0.1) for i in range(101)]
    assert values[:11] == sorted(values[:11])
    assert values[10] == pytest.approx(1.0)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_cosine_and_linear_end_at_a_tenth_and_constant_stays() -> None:
    assert factor("cosine", 1.0, 0.1) == pytest.approx(0.1)
    assert factor("linear", 1.0, 0.1) == pytest.approx(0.1)
    assert factor("constant", 1.0, 0.1) == 1.0
    assert factor("cosine", 0.5, 0.0) == pytest.approx(0.55)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(BadArgument, match="no schedule 'step'"):
        factor("step", 0.5, 0.0)
