# ruff: noqa: TID253  (imported lazily, by workers only)
"""The weights of a training: how they are checkpointed, restored and made into a model folder.

It does not know optimizers or data. `Whole` moves every weight; `Adapter` (LoRA, Hu et al. 2022)
keeps the model and learns low-rank additions to its linear layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmos.kernel.errors import BadArgument
from llmos.services.model.load import give_back, load_causal_lm
from llmos.services.programs.base import Keep


class Weights(Protocol):
    """What a session asks of the weights. `kind`: what the registry calls the finished folder."""

    @property
    def kind(self) -> str: ...

    def capture(self, keep: Keep) -> Callable[[Path], None]:
        """What is trained, in float32, for a checkpoint -> what writes it."""
        ...

    def restore(self, folder: Path) -> None:
        """Bring the very bits back, into the memory that the training uses."""
        ...

    def export(self, folder: Path) -> None:
        """Write the finished folder."""
        ...


class Whole:
    """Every weight is trained."""

    kind = "causal-lm"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def capture(self, keep: Keep) -> Callable[[Path], None]:
        kept = {name: keep(tensor) for name, tensor in self.model.state_dict().items()}
        return lambda folder: self.model.save_pretrained(folder, state_dict=kept)

    def restore(self, folder: Path) -> None:
        saved = load_causal_lm(folder, "float32").state_dict()
        # Copied in place: the parameters stay in the aligned memory they were made in.
        self.model.load_state_dict(saved)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class Adapter:
    """Only a LoRA adapter is trained; `base` names the model that it belongs to. `alone`: it is all
    that is made in the end."""

    def __init__(self, model: PeftModel, base: str, alone: bool) -> None:
        self.model = model
        self.base = base
        self.kind = "adapter" if alone else "causal-lm"

    def capture(self, keep: Keep) -> Callable[[Path], None]:
        learned = {name for name, p in self.model.named_parameters() if p.requires_grad}
        state = self.model.state_dict()
        kept = {name: keep(tensor) for name, tensor in state.items() if name in learned}
        return lambda folder: self.model.save_pretrained(str(folder), state_dict=kept)

    def restore(self, folder: Path) -> None:
        set_peft_model_state_dict(self.model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))

    def export(self, folder: Path) -> None:
        """The merged model, and the adapter alone in `adapter/`; or that only."""
        if self.kind == "adapter":
            self.model.save_pretrained(str(folder))
            return
        self.model.save_pretrained(str(folder / "adapter"))
        give_back()  # the merged weights take the place of the activations
        fresh = load_causal_lm(self.base, "float32")
        with _quiet():
            adapted = PeftModel.from_pretrained(fresh, str(folder / "adapter"))
        merged = adapted.merge_and_unload()
        merged.save_pretrained(folder)


def align(model: torch.nn.Module) -> None:
    """Copy weights that lie in a file mapping into memory of torch's own, aligned to 64 bytes.

    Other kernels run on unaligned memory, and other kernels round differently.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def checkpoint_gradients(model: PreTrainedModel, wanted: bool) -> None:
    """Keep only the input of each layer for the backward pass (Chen et al. 2016), if it is wanted.

    The layers run once more in the backward pass, with the same random numbers: the results are the
    same bits. Raises BadArgument.
    """
    if not wanted:
        return
    if not model.supports_gradient_checkpointing:
        raise BadArgument(
            f"a model of type {model.config.model_type} cannot do --gradient-checkpointing",
            "leave it out; a smaller --batch with more --accumulate saves memory too",
        )
    with _quiet():
        model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: int, dropout: float, targets: list[str]
) -> PeftModel:
    """The model with a new LoRA adapter; the rest of it is frozen. Raises BadArgument."""
    # GPT-2 has linear layers of its own class, with the weight the other way round.
    turned = any(isinstance(m, Conv1D) for m in model.modules())
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = [n for n, m in model.named_modules() if m is output]
    if not set(linear) - set(head):
        raise BadArgument(
            f"a model of type {model.config.model_type} has no linear layers for LoRA",
            "use --method full",
        )
    known = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(targets) - known):
        raise BadArgument(
            f"the model has no linear layer {', '.join(unknown)}",
            f"it has {', '.join(sorted(known))}",
        )
    chosen: Any = targets or "all-linear"
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=chosen,
        task_type="CAUSAL_LM",
        fan_in_fan_out=turned,
    )
    with _quiet():
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


@contextmanager
def _quiet() -> Iterator[None]:
    """Of gradient checkpointing transformers 5.23 changes the names; peft 0.21 has the old ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield
