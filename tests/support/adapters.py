"""LoRA adapters of random numbers in folders, and peft's own models with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def make_adapter(
    base: Path, folder: Path, rank: int = 4, seed: int = 0, scale: float = 1.0, **config: Any
) -> Path:
    """An adapter on every linear layer but the output of the model in `base`, without peft: it is
    quick, and shows what is in such a folder. `config` are fields of its adapter_config.json."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    head = model.get_output_embeddings()
    made = torch.Generator().manual_seed(seed)
    tensors, turned = {}, False
    for name, module in model.named_modules():
        if module is head or not isinstance(module, nn.Linear | Conv1D):
            continue
        size = tuple(module.weight.shape)
        turned = turned or isinstance(module, Conv1D)
        outputs, inputs = size[::-1] if isinstance(module, Conv1D) else size
        prefix = f"base_model.model.{name}"
        a = torch.randn(rank, inputs, generator=made) / inputs**0.5
        b = torch.randn(outputs, rank, generator=made) * scale
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    written = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": rank, "target_modules": names, "fan_in_fan_out": turned,
        "bias": "none", "inference_mode": True, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_with_peft(base: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter that peft makes and saves; `config` is that of LoraConfig."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    turned = any(isinstance(module, Conv1D) for module in model.modules())
    torch.manual_seed(seed)
    wanted = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **config}
    with _quiet():
        lora = LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=turned, **wanted
        )
        get_peft_model(model, lora).save_pretrained(str(folder))
    return folder


def peft_model(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model with the adapter beside it, as peft computes it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with _quiet():
        return PeftModel.from_pretrained(model, str(folder)).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Of gradient checkpointing transformers 5.23 changes the names; peft 0.21 has the old ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        # One set of patterns for two kinds of model: each has what the other has not.
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        yield
