# ruff: noqa: TID253  (imported lazily, by workers only)
"""Load models and tokenizers from a folder or by hub name, with errors a person can act on.

It does not know the registry: names of the registry are folders before they come here. Code
from a model repository is run only where `allow_code` was called.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import llmos.services.model.recurrent  # noqa: F401  (registers the recurrent models)
from llmos.kernel.errors import BadArgument, BadInput

# Bars belong to the shell; a worker's output is its log.
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

# Whether code from a model's folder may run in this process.
_CODE = {"allowed": False}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """The torch type of a `--dtype`. auto: bfloat16 where the device computes in it."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise BadArgument(f"there is no dtype {name!r}", "one of float32, bfloat16, auto")
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def load_causal_lm(ref: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """The model in evaluation mode on the CPU. Raises BadInput.

    Weights stay mapped from their file where the stored type is the one asked for.
    """
    check_weights(ref)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(ref), dtype=resolve_dtype(dtype), use_safetensors=True, **_where(ref)
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        raise _cannot_load("model", ref, exc) from None
    model.eval()  # type: ignore[no-untyped-call]
    return model


def give_back() -> None:
    """What is free of this process's heap goes back to the system; only glibc has this call."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def load_config(ref: str | Path) -> PreTrainedConfig:
    """The configuration of a model. Raises BadInput."""
    check_folder(ref)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(ref), **_where(ref))
    except (OSError, ValueError, KeyError) as exc:
        raise _cannot_load("model", ref, exc) from None
    return config


def load_tokenizer(ref: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises BadInput."""
    check_folder(ref, weights=False)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(ref), **_where(ref))
    except Exception as exc:  # noqa: BLE001  (the Rust side raises a bare Exception)
        raise _cannot_load("tokenizer", ref, exc) from None
    return tokenizer


def check_folder(ref: str | Path, weights: bool = True) -> None:
    """Raise BadInput when `ref` is meant as a folder and is not a model folder."""
    folder = Path(ref)
    if not folder.exists():
        if folder.is_absolute() or str(ref).startswith("."):
            raise BadInput(f"no such model folder: {ref}", "`llmos models` lists those of the home")
        return
    if not folder.is_dir():
        raise BadInput(f"{ref} is a file, not a model folder", "give the folder it lies in")
    if weights and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise BadInput(
                f"{ref} is a LoRA adapter, not a whole model",
                "merge it into its model with peft (merge_and_unload), and name that",
            )
        raise BadInput(
            f"{str(ref) or 'an empty name'} is not a model folder: it has no config.json",
            "give a name of `llmos models`, a folder, or a hub name",
        )


def check_weights(ref: str | Path) -> None:
    """Raise BadInput naming the first safetensors file of a folder that is broken.

    Reads the headers only; the format's library compares the length they promise with the file.
    """
    check_folder(ref)
    folder = Path(ref)
    if not folder.is_dir():
        return
    files = weight_files(folder)
    if not files:
        raise BadInput(
            f"{ref} has no .safetensors file", "convert the model with `save_pretrained` first"
        )
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as exc:
            raise BadInput(
                f"{file} is not a whole safetensors file: {exc}", "copy or download it again"
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """The weight files that `from_pretrained` reads, in a fixed order."""
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))


def _where(ref: str | Path) -> dict[str, Any]:
    return {"local_files_only": Path(ref).is_dir(), "trust_remote_code": code_is_allowed()}


def allow_code(allowed: bool) -> None:
    """Let code that lies in a model's folder run in this process, or not: for the one run whose
    user said `--trust-remote-code`. A process runs one program."""
    _CODE["allowed"] = allowed
    if allowed:
        # Where the code is copied to was chosen when transformers was imported, by another user
        # maybe: it goes into the home of who runs this.
        from transformers import dynamic_module_utils

        cache = Path.home() / ".cache" / "huggingface" / "modules"
        vars(dynamic_module_utils)["HF_MODULES_CACHE"] = str(cache)


def code_is_allowed() -> bool:
    return _CODE["allowed"]


def _cannot_load(what: str, ref: str | Path, exc: Exception) -> BadInput:
    if "trust_remote_code" in str(exc) and not code_is_allowed():
        return BadInput(
            f"{ref} brings code of its own, which is not run: its {what} needs it",
            "read its .py files; if you trust them, say --trust-remote-code for this run",
        )
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    hint = "" if Path(ref).is_dir() else "give a name of `llmos models`, a folder, or a hub name"
    return BadInput(f"cannot load the {what} of {ref}: {lines[0][:300]}", hint)


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16 (x86: AVX-512 or AMX; Arm: BF16)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
