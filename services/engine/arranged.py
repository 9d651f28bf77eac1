"""A model with its weights in panels: which of its modules change, and where their numbers go.

The model is made without memory (`arranged`), so that what it will take is known from its
configuration (`places`); then it is bound to memory of that size, and filled from the model as
transformers loads it, unless the memory is a file that was filled before.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from llmos.services.engine.fused import fuse
from llmos.services.engine.native.build import processor
from llmos.services.engine.native.weights import kernels
from llmos.services.engine.panels import PanelEmbedding, PanelLinear, PanelNorm, Panels
from llmos.services.model.load import code_is_allowed

# The models whose forward calls its linear layers and never looks at their weights (read in
# transformers 5.23). All others keep their weights as they come, mapped from the file.
PANEL_TYPES = frozenset(
    {
        "cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama",
        "mistral", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
        "starcoder2",
    }
)  # fmt: skip

# RMSNorm of these is that of Llama.
_NORMS = frozenset(
    {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm",
     "Phi3RMSNorm", "GraniteRMSNorm"}
)  # fmt: skip

# Memory of tensors begins at multiples of this.
ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its name in the model, its type and shape, bytes from the beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def takes_panels(model_type: str, kind: str, device: str) -> bool:
    """Whether the weights of such a model are put into panels of this kind here."""
    if device != "cpu" or model_type not in PANEL_TYPES:
        return False
    found = kernels()
    if found is None or kind not in found.kinds:
        return False
    # Where these kernels cannot have the matrix unit (an old compiler, a sandbox), oneDNN may.
    return kind != "bfloat16" or found.has_unit or "amx_bf16" not in processor().split()


def arranged(config: PreTrainedConfig, kind: str, dtype: torch.dtype) -> Any:
    """The model of a configuration, without memory, with panels of a kind where weights were.

    `dtype` is that of everything else, and of the tokens.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=code_is_allowed()
        )  # type: ignore[no-untyped-call]
    model.eval().requires_grad_(False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = type(head) is nn.Linear and type(embedding) is nn.Embedding
    tied = tied and head.weight is embedding.weight
    _replace(model, kind, head)
    if tied:
        shared = model.get_output_embeddings().panels
        model.set_input_embeddings(PanelEmbedding(shared, dtype))
    return model


def places(model: Any) -> list[Place]:
    """Every tensor of a model, each once, and where it lies when they lie behind each other."""
    found, offset = [], 0
    for name, tensor in _tensors(model):
        found.append(Place(name, tensor.dtype, tuple(tensor.shape), offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return found


def size_of(model: Any) -> int:
    """Bytes from the beginning of the first tensor to the end of the last."""
    last = places(model)[-1]
    return last.offset + torch.Size(last.shape).numel() * last.dtype.itemsize


def bind(model: Any, memory: Tensor) -> None:
    """Give a model its tensors: parts of `memory` (bytes), which must be aligned.

    Behind this it can be filled; `settle` makes it ready.
    """
    owners = dict(model.named_modules())
    for place in places(model):
        size = torch.Size(place.shape).numel() * place.dtype.itemsize
        part = memory[place.offset : place.offset + size].view(place.dtype).view(place.shape)
        path, _, name = place.name.rpartition(".")
        owner = owners[path]
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(part, requires_grad=False)
        else:
            owner._buffers[name] = part


def fill(model: Any, source: Any) -> None:
    """Take every number from the same model as transformers has loaded it."""
    tensors = {**dict(source.named_parameters(remove_duplicate=False)),
               **dict(source.named_buffers(remove_duplicate=False))}  # fmt: skip
    filled: set[int] = set()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, PanelLinear) and id(module.panels) not in filled:
                weight = tensors[f"{path}.weight"]
                is_turned = isinstance(source.get_submodule(path), Conv1D)
                module.panels.fill(weight.t() if is_turned else weight)
                filled.add(id(module.panels))
        for name, tensor in _tensors(model):
            if ".panels." not in name:
                tensor.copy_(tensors[name])


def settle(model: Any) -> None:
    """The tensors are where they stay: addresses are taken, layers are fused."""
    for module in model.modules():
        if isinstance(module, PanelLinear | PanelEmbedding | PanelNorm):
            module.settle()
    fuse(model)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _replace(module: nn.Module, kind: str, head: Any) -> None:
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            weight = Panels(child.out_features, child.in_features, kind)
            setattr(module, name, PanelLinear(weight, child.bias, wide=child is head))
        elif type(child) is Conv1D:
            weight = Panels(child.nf, child.nx, kind)
            setattr(module, name, PanelLinear(weight, child.bias))
        elif type(child).__name__ in _NORMS:
            setattr(module, name, PanelNorm(child))
        else:
            _replace(child, kind, head)
