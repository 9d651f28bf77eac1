"""Weights in panels: the layout that the kernels of `native.weights` multiply with.

A panel is 32 outputs of a weight (out, in), so that one token costs one pass over memory in its
order. The numbers stay what they are (float32, bfloat16), or become int8 with one scale for each
output: half of the memory of bfloat16. A prompt of thousands of tokens is no slower for it.

The modules here take the place of those of a model, by name. They are made without memory; `bind`
gives them tensors (of a mapped file, usually), and `fill` the numbers.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from llmos.services.engine.native.weights import (
    GROUP_BITS,
    KINDS,
    LINE_BYTES,
    PANEL,
    Kernels,
    Matrix,
    kernels,
)

# So many numbers of a weight are converted at once: the rest of it may be larger than memory.
CHUNK = 1 << 20

_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_FLOATS = (torch.float32, torch.bfloat16)
_LARGEST = 127  # of int8


class Panels(nn.Module):
    """A weight of `outputs` x `inputs` numbers, stored as `kind`; it is multiplied by `linear`."""

    def __init__(self, outputs: int, inputs: int, kind: str) -> None:
        super().__init__()
        self.outputs, self.inputs, self.kind = outputs, inputs, kind
        lanes = -(-outputs // PANEL) * PANEL
        lines = -(-inputs // group_of(kind))
        self.data = nn.Buffer(
            torch.empty(lanes // PANEL, lines, LINE_BYTES, dtype=torch.uint8, device="meta")
        )
        if kind == "int8":
            self.scales = nn.Buffer(torch.empty(lanes, device="meta"))
            self.sums = nn.Buffer(torch.empty(lanes, dtype=torch.int32, device="meta"))

    def fill(self, weight: Tensor) -> None:
        """Take the numbers of a weight (out, in), a part after the other."""
        step = max(1, CHUNK // self.inputs // PANEL) * PANEL
        for first in range(0, self.outputs, step):
            part = weight[first : first + step].detach().cpu()
            if self.kind == "int8":
                part = self._quantized(part, first)
            stored = part.to(_STORED[self.kind])
            at = first // PANEL
            lines = _lines(stored, group_of(self.kind))
            self.data[at : at + len(lines)] = lines

    def _quantized(self, part: Tensor, first: int) -> Tensor:
        """Symmetric, one scale for each output; scales and sums are kept."""
        part = part.float()
        scales = part.abs().amax(1).div_(_LARGEST)
        whole = part.div(scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
        self.scales[first : first + len(part)] = scales
        self.sums[first : first + len(part)] = whole.sum(1, dtype=torch.float64).to(torch.int32)
        return whole

    def matrix(self, bias: Tensor | None = None) -> Matrix:
        """For the kernels; holds while the tensors stay where they are."""
        is_int8 = self.kind == "int8"
        return Matrix(
            data=self.data.data_ptr(),
            scales=self.scales.data_ptr() if is_int8 else None,
            sums=self.sums.data_ptr() if is_int8 else None,
            bias=None if bias is None else bias.data_ptr(),
            n=self.outputs,
            k=self.inputs,
            kind=KINDS[self.kind],
        )


class PanelLinear(nn.Module):
    """nn.Linear with its weight in panels: (..., in) -> (..., out), of the tokens' type.

    With `wide` the result is float32: the scores of a vocabulary, which bfloat16 would make equal
    to each other.
    """

    def __init__(self, weight: Panels, bias: nn.Parameter | None, wide: bool = False) -> None:
        super().__init__()
        self.panels, self.bias, self.wide = weight, bias, wide
        self.in_features, self.out_features = weight.inputs, weight.outputs

    def settle(self) -> None:
        """The tensors are where they stay."""
        self.matrix = self.panels.matrix(self.bias)
        self._at = ctypes.addressof(self.matrix)
        self._kernels = ready()
        self._takes = _taken(self.panels.kind, self.bias)

    def forward(self, values: Tensor) -> Tensor:
        rows, half = _checked(values, self.in_features, self._takes)
        out = torch.empty(
            (*values.shape[:-1], self.out_features),
            dtype=torch.float32 if self.wide else values.dtype,
        )
        self._kernels.linear(
            self._at, rows.data_ptr(), out.data_ptr(), rows.numel() // self.in_features,
            half, self.wide, torch.get_num_threads(),
        )  # fmt: skip
        return out


class PanelEmbedding(nn.Module):
    """An embedding whose numbers are those of the last layer: ids (...) -> (..., in)."""

    def __init__(self, weight: Panels, dtype: torch.dtype) -> None:
        super().__init__()
        self.panels, self._dtype = weight, dtype
        # Only its shape and type are there.
        self.weight = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device="meta")

    def settle(self) -> None:
        self.matrix = self.panels.matrix()
        self._at = ctypes.addressof(self.matrix)
        self._kernels = ready()

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty((*ids.shape, self.panels.inputs), dtype=self._dtype)
        count, half = ids.numel(), self._dtype == torch.bfloat16
        if self._kernels.rows(self._at, ids.data_ptr(), out.data_ptr(), count, half) != count:
            raise IndexError(f"a token is not among the {self.panels.outputs} of the vocabulary")
        return out


class PanelNorm(nn.Module):
    """RMSNorm as transformers' Llama has it, in one pass."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def settle(self) -> None:
        self._kernels = ready()

    def forward(self, values: Tensor) -> Tensor:
        size = self.weight.shape[0]
        rows, half = _checked(values, size, (self.weight.dtype,))
        out = torch.empty_like(rows)
        self._kernels.norm(
            rows.data_ptr(), self.weight.data_ptr(), self.variance_epsilon, out.data_ptr(),
            rows.numel() // size, size, half,
        )  # fmt: skip
        return out


def group_of(kind: str) -> int:
    """How many neighbouring inputs of an output lie together."""
    return GROUP_BITS // 8 // _STORED[kind].itemsize


def panel_bytes(outputs: int, inputs: int, kind: str) -> int:
    """What a weight takes in panels, with its scales and sums."""
    lanes = -(-outputs // PANEL) * PANEL
    lines = -(-inputs // group_of(kind))
    return lanes // PANEL * lines * LINE_BYTES + (8 * lanes if kind == "int8" else 0)


def ready() -> Kernels:
    found = kernels()
    assert found is not None  # nobody makes panels without
    return found


def _lines(weight: Tensor, group: int) -> Tensor:
    """(out, in) -> (panels, lines, bytes), padded with zeros."""
    outputs, inputs = weight.shape
    lanes, length = -(-outputs // PANEL) * PANEL, -(-inputs // group) * group
    if (lanes, length) != (outputs, inputs):
        weight = nn.functional.pad(weight, (0, length - inputs, 0, lanes - outputs))
    groups = weight.contiguous().view(torch.int32)  # of an output: what lies together
    panels = groups.view(lanes // PANEL, PANEL, length // group).transpose(1, 2).contiguous()
    return panels.view(torch.uint8).view(lanes // PANEL, length // group, LINE_BYTES)


def _taken(kind: str, bias: Tensor | None) -> tuple[torch.dtype, ...]:
    """The types of tokens that such a weight is multiplied with."""
    if bias is not None:
        return (bias.dtype,)
    return _FLOATS if kind == "int8" else (_STORED[kind],)


def _checked(values: Tensor, size: int, takes: tuple[torch.dtype, ...]) -> tuple[Tensor, bool]:
    """Tokens as the kernels take them, and whether they are bfloat16. Raises TypeError."""
    if values.dtype not in takes or values.shape[-1] != size:
        raise TypeError(f"{size} numbers of {takes[0]} are expected, not {values.dtype} of shape "
                        f"{tuple(values.shape)}")  # fmt: skip
    return values.contiguous(), values.dtype == torch.bfloat16
