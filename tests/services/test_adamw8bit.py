"""AdamW in 8 bits: as good as AdamW, a quarter of its state, restored to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmos.services.optim import optimizers
from llmos.services.optim.adamw8bit import BLOCK, _read, _tables, _write
from llmos.services.programs import lm_state


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(256, 64, generator=generator)
    wanted = torch.sin(given @ torch.randn(64, 64, generator=generator) / 4)
    losses = []
    for _ in range(steps):
        loss = (model(given) - wanted).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_come_back_within_their_step(signed: bool) -> None:
    table = _tables(torch.device("cpu"))[0 if signed else 1]
    torch.manual_seed(0)
    numbers = torch.randn(4, BLOCK) if signed else torch.rand(4, BLOCK)
    codes, scale = torch.empty(4, BLOCK, dtype=torch.uint8), torch.empty(4)
    _write(numbers.clone(), codes, scale, table)
    error = (_read(codes, scale, table) - numbers).abs() / numbers.abs().amax(1, keepdim=True)
    assert error.max() <= table.diff().max() / 2 + 1e-6
    assert error.mean() < 0.005


def test_zero_stays_zero() -> None:
    for table in _tables(torch.device("cpu")):
        codes, scale = torch.empty(1, BLOCK, dtype=torch.uint8), torch.empty(1)
        _write(torch.zeros(1, BLOCK), codes, scale, table)
        assert not _read(codes, scale, table).any()


@pytest.mark.slow
@pytest.mark.long
def test_it_trains_as_well_as_adamw() -> None:
    ends = []
    for name in ("adamw", "adamw8bit"):
        model = net()
        optimizer = optimizers.build(name, model.named_parameters(), 3e-3, 0.0)
        ends.append(train(model, optimizer, 150)[-1])
    assert ends[1] == pytest.approx(ends[0], rel=0.1)


def test_its_state_takes_a_quarter_of_adamws() -> None:
    model = net()
    optimizer = optimizers.build("adamw8bit", model.named_parameters(), 1e-3, 0.0)
    train(model, optimizer, 1)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    held = [t for p in matrices for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    numbers = sum(p.numel() for p in matrices)
    assert sum(t.nbytes for t in held) <= 0.27 * 8 * numbers


def test_a_restored_one_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = net()
    optimizer = optimizers.build("adamw8bit", model.named_parameters(), 1e-3, 0.1)
    train(model, optimizer, 3)
    tensors, rest = lm_state.capture_optimizer(optimizer, lambda tensor: tensor)
    lm_state.write(tensors, tmp_path / lm_state.OPTIMIZER)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    losses = train(model, optimizer, 3)

    other = net()
    other.load_state_dict(weights)
    resumed = optimizers.build("adamw8bit", other.named_parameters(), 1e-3, 0.1)
    lm_state.restore_optimizer(resumed, tmp_path, rest)
    assert all(t.dtype == torch.uint8 for s in resumed.state.values() for k, t in s.items()
               if k in "mv" and "m_scale" in s)  # fmt: skip
    assert train(other, resumed, 3) == losses
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
