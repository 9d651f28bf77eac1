# ruff: noqa: TID253  (imported lazily, by workers only)
"""AdamW whose moments take a byte each: block-wise quantized (Dettmers et al. 2022).

Each block of 256 numbers is scaled by its largest and rounded to a table of 256 values that lie
closer together near zero (dynamic quantization: a sign, a decimal exponent, a linear fraction).
Small tensors keep float32, as in the paper's own library. Plain torch operations, piece by piece:
it runs on every device, to the same bits each time, and holds one piece in float32 at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256

# Below this many numbers a parameter's moments stay float32: norms and biases save nothing.
SMALLEST = 4096

# So many numbers are updated together: what float32 copies of the moments may take.
PIECE = BLOCK * 4096


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay as in AdamW. State a parameter: m, v (uint8), and a scale a block."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(_new_state(parameter))
                    state["step"] += 1
                    _move(parameter, state, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; codes stay bytes, which torch would cast."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype == torch.uint8:
                    self.state[parameter][key] = value.to(parameter.device).clone()


def _new_state(parameter: Tensor) -> dict[str, Any]:
    size, device = parameter.numel(), parameter.device
    if size < SMALLEST:
        return {"step": 0, "m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
    blocks = -(-size // BLOCK)
    zero = _tables(device)[0].abs().argmin().to(torch.uint8)
    return {
        "step": 0,
        "m": zero.expand(blocks, BLOCK).contiguous(),
        "v": torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device),
        "m_scale": torch.zeros(blocks, device=device),
        "v_scale": torch.zeros(blocks, device=device),
    }


def _move(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    weights, gradient = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
    if "m_scale" not in state:
        _adamw(weights, gradient, state["m"].view(-1), state["v"].view(-1), state["step"], group)
        return
    signed, positive = _tables(parameter.device)
    for start in range(0, len(weights), PIECE):
        part = slice(start, min(start + PIECE, len(weights)))
        blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
        length = part.stop - start
        m = _read(state["m"][blocks], state["m_scale"][blocks], signed)
        v = _read(state["v"][blocks], state["v_scale"][blocks], positive)
        flat_m, flat_v = m.view(-1)[:length], v.view(-1)[:length]
        _adamw(weights[part], gradient[part], flat_m, flat_v, state["step"], group)
        _write(m, state["m"][blocks], state["m_scale"][blocks], signed)
        _write(v, state["v"][blocks], state["v_scale"][blocks], positive)


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]) -> None:
    """The usual update, in place on weights and moments (Loshchilov and Hutter 2019)."""
    beta1, beta2 = group["betas"]
    w.mul_(1 - group["lr"] * group["weight_decay"])
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    size = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    w.addcdiv_(m, size, value=-group["lr"] / (1 - beta1**step))


def _read(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Codes (blocks, BLOCK) -> numbers."""
    return table[codes.int()].mul_(scale[:, None])


def _write(numbers: Tensor, codes: Tensor, scale: Tensor, table: Tensor) -> None:
    """Numbers (blocks, BLOCK) -> the nearest codes and the scales, in place; destroys `numbers`."""
    largest = numbers.abs().amax(1)
    scale.copy_(largest)
    numbers.div_(largest.clamp_(min=torch.finfo(numbers.dtype).tiny)[:, None])
    middles = (table[1:] + table[:-1]) / 2
    codes.copy_(torch.bucketize(numbers, middles, out_int32=True))


@cache
def _values(signed: bool) -> tuple[float, ...]:
    """The 256 values of the dynamic data type, in order; from the paper's section 2.2.

    With seven decades below 1, the decade 10^-k has 2^(6 - k) values on each side (twice as many
    without signs): the larger a number, the finer it is kept.
    """
    bits = 6 if signed else 7
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (bits - decade)
        step = 0.9 / count
        # The middles of `count` equal parts of [0.1, 1), in this decade.
        found += [10.0**-decade * (0.1 + step * (i + 0.5)) for i in range(count)]
    if signed:
        found += [-x for x in found if 0 < x < 1]
    return tuple(sorted(found))


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(signed, positive): (256,) float32 each."""
    return (
        torch.tensor(_values(True), device=device),
        torch.tensor(_values(False), device=device),
    )
