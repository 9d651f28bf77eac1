"""Lay out the weights of a model on a CPU where the kernels of `native` are not to be had.

A product with one token takes as long as reading the weights in the order in which it wants them:

- bfloat16: oneDNN wants blocks, and makes them anew in every product unless they are made
  before: 1.3 times (small layers) to 3 times (output layer) faster, the same bits. The packed
  weights are private, for torch lets nobody at their memory; the file's mapping is let go, so that
  nothing is held twice.
- float32: layers that widen, the output layer above all, gain when they are stored as (in, out):
  1.6 to 3 times. Those that narrow would lose a quarter, square ones gain nothing.
- int8: rows with a scale each. torch has a kernel for few tokens; for more, a part of the weight
  after the other is made bfloat16 again. Private.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmos.services.engine.panels import Panels
from llmos.services.model.load import give_back

# The models whose forward calls its linear layers and never looks at their weights (read in
# transformers 5.23). All others keep their weights as they come, mapped from the file.
PACKED_TYPES = frozenset(
    {
        "cohere", "gemma", "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral",
        "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
        "starcoder2",
    }
)  # fmt: skip

# So much of the old layout may lie about while the new one is made.
BETWEEN_BYTES = 32 << 20

_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class PackedLinear(nn.Module):
    """nn.Linear in oneDNN's own layout, for inputs (..., in) of bfloat16 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, 1)
        self._bias = None if linear.bias is None else linear.bias.data.clone()

    def forward(self, values: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            values, self._weight, self._bias, "none", [], ""
        )
        return product


def packs(model_type: str, dtype: torch.dtype, device: str) -> bool:
    """Whether `lay_out` packs the weights of such a model (its weights are private then)."""
    if device != "cpu" or dtype != torch.bfloat16 or model_type not in PACKED_TYPES:
        return False
    # Private operators of torch: a build without them keeps the weights as they are.
    there = all(hasattr(torch.ops.mkldnn, n) for n in _OPERATORS)
    return bool(torch._C._has_mkldnn and there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widens(out_features: int, in_features: int) -> bool:
    """Whether `lay_out` stores such a float32 layer as (in, out)."""
    return out_features >= 2 * in_features


def lay_out(model: Any, kind: str = "") -> None:
    """Change the layout in place, where it helps. `kind` "int8" also makes the weights that."""
    dtype, device = model.dtype, model.device.type
    if any(isinstance(module, Panels) for module in model.modules()):
        return  # engine.weights has done it
    if kind == "int8":
        _shrink(model)
        give_back()
        return
    if packs(model.config.model_type, dtype, device):
        _pack(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        give_back()
    elif dtype == torch.float32 and device == "cpu":
        for layer in model.modules():
            if type(layer) is nn.Linear and widens(*layer.weight.shape):
                _turn(layer)


def _pack(module: nn.Module, freed: int = 0) -> int:
    """Pack the linear layers inside -> bytes that were let go and not given back yet."""
    for name in [name for name, _ in module.named_children()]:
        child = getattr(module, name)
        if type(child) is nn.Linear:
            freed += child.weight.nbytes
            setattr(module, name, PackedLinear(child))
        else:
            freed = _pack(child, freed)
        del child
        if freed >= BETWEEN_BYTES:
            give_back()
            freed = 0
    return freed


class Int8Linear(nn.Module):
    """nn.Linear with a weight of int8, one scale for each output, for inputs (..., in)."""

    # More tokens than this are multiplied faster by a weight that is made whole again.
    FEW = 8
    CHUNK = 1 << 20  # numbers of the weight at a time

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        scales = weight.abs().amax(1, keepdim=True).float().div_(127)
        least = torch.finfo(torch.float32).tiny
        step = max(1, self.CHUNK // weight.shape[1])
        self.whole = nn.Buffer(torch.empty(weight.shape, dtype=torch.int8))
        for at in range(0, len(weight), step):
            part = weight[at : at + step].float() / scales[at : at + step].clamp(min=least)
            self.whole[at : at + step] = part.round_().to(torch.int8)
        self.scales = nn.Buffer(scales[:, 0].to(weight.dtype))
        self.bias = linear.bias
        self._step = step

    def forward(self, values: Tensor) -> Tensor:
        rows = values.reshape(-1, values.shape[-1])
        if 0 < len(rows) <= self.FEW and values.dtype == torch.bfloat16:
            product: Tensor = torch._weight_int8pack_mm(rows, self.whole, self.scales)
        else:
            product = values.new_empty(len(rows), len(self.whole))
            for at in range(0, len(self.whole), self._step):
                part = self.whole[at : at + self._step].to(values.dtype)
                torch.mm(rows, part.t(), out=product[:, at : at + self._step])
            product *= self.scales
        if self.bias is not None:
            product += self.bias
        return product.view(*values.shape[:-1], len(self.whole))


def _shrink(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, Int8Linear(child))
            give_back()
        else:
            _shrink(child)


def _turn(layer: nn.Linear) -> None:
    """The weight keeps its shape (out, in), as a transposed view: nothing else changes."""
    layer.weight = nn.Parameter(layer.weight.t().contiguous().t(), requires_grad=False)
