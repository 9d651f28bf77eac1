"""A LoRA adapter (Hu et al. 2022) as peft writes it: read, and checked against the model it is for.

What the engine cannot compute exactly as peft would is refused in one line, never left out: a
field of `adapter_config.json` that is set and not known here is a reason to refuse.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmos.kernel.errors import BadInput
from llmos.services.model.load import weight_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What says which layers an adapter changes, and how much.
_SHAPE = (
    "r", "target_modules", "exclude_modules", "lora_alpha", "use_rslora", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern",
)  # fmt: skip

# Fields that may say anything: they are of the training, or of the file itself.
_HARMLESS = frozenset({
    *_SHAPE, "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "bias",
    "megatron_core", "loftq_config", "eva_config", "runtime_config", "qalora_group_size",
})  # fmt: skip

# These begin with changed weights of the base, and an adapter of theirs fits no other.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", None)

_PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")

_SAMPLE_BYTES = 1 << 20  # of each end of a weight file: two trainings never have the same


@dataclass(frozen=True)
class Layer:
    """What is added to a linear layer's y: scale * B (A x), with A (rank, in) and B (out, rank)."""

    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that fits. `tensors` are A and B of each layer, mapped from the file."""

    folder: Path
    key: str  # the same for the same numbers, wherever they lie
    chat_template: str  # what conversations were written in when it was trained; "": nobody said
    layers: Mapping[str, Layer]
    tensors: Mapping[str, tuple[Tensor, Tensor]]


class Skeleton:
    """The linear layers of a model by name, with their sizes, as its class makes them.

    Of the class and not of the model in memory: an engine lays its layers out anew, and what they
    are then shows neither their type nor their shape.
    """

    def __init__(self, model: Any) -> None:
        with torch.device("meta"):
            made = type(model)(copy.deepcopy(model.config))
        self.model_type = str(model.config.model_type)
        self.folder = str(getattr(model, "name_or_path", ""))
        self.sizes: dict[str, tuple[int, int]] = {}  # (in, out)
        for name, module in made.named_modules():
            if isinstance(module, nn.Linear):
                self.sizes[name] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                self.sizes[name] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
        head, table = made.get_output_embeddings(), made.get_input_embeddings()
        modules = list(made.named_modules())
        self.head = {name for name, module in modules if head is not None and module is head}
        self.tables = {name for name, module in modules if module is table}


def find(ref: str) -> tuple[Path, str]:
    """(the folder of an adapter, what a person should know of that choice). Raises BadInput.

    It is `ref` itself; `adapter/` in a model that was made from one; where `ref` is a checkpoint
    that its training has replaced since, the newest of its checkpoints.
    """
    folder = Path(ref)
    for place in (folder, folder / "adapter"):
        if (place / CONFIG).is_file():
            return place, ""
    if not folder.exists():
        newest = _newest_beside(folder)
        if newest is None:
            raise BadInput(f"there is no adapter {ref}", "`llmos models` lists those of the home")
        return newest, f"the adapter was trained on since: {newest.name} takes over"
    if (folder / "config.json").is_file():
        raise BadInput(
            f"{ref} is a whole model, not a LoRA adapter", "run it by itself, without --adapter"
        )
    raise BadInput(f"{ref} is no LoRA adapter: it has no {CONFIG}")


def _newest_beside(checkpoint: Path) -> Path | None:
    """Of a training that is gone on from a checkpoint, the last one."""
    if checkpoint.parent.name != "checkpoints":
        return None
    found = [p.parent for p in checkpoint.parent.glob(f"step-*/{CONFIG}")]
    return max(found, key=lambda p: p.name, default=None)


def stamp(folder: Path) -> tuple[int, ...]:
    """Changes when the adapter in a folder does. Raises BadInput."""
    found = []
    for name in (CONFIG, WEIGHTS):
        try:
            status = os.stat(folder / name)
        except OSError:
            raise _without_weights(folder) from None
        found += [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    return tuple(found)


def read(folder: Path, skeleton: Skeleton) -> AdapterFile:
    """The adapter in a folder. Raises BadInput when the model cannot take it."""
    before = stamp(folder)
    config = _read_config(folder)
    _check_kind(folder, config)
    _check_base(folder, config, skeleton)
    layers = _layers(folder, config, skeleton)
    tensors, digest = _read_weights(folder)
    pairs = _pair(folder, tensors, layers, skeleton)
    if stamp(folder) != before:
        raise BadInput(f"the adapter {folder} changed while it was read", "name it once more")
    form = json.dumps({name: [layer.rank, layer.scale] for name, layer in sorted(layers.items())})
    template = _chat_template(folder)
    key = hashlib.sha256(digest + form.encode() + template.encode()).hexdigest()
    return AdapterFile(folder, key, template, layers, pairs)


# ---- the configuration ----


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise BadInput(f"{folder / CONFIG} cannot be read: {exc}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{folder / CONFIG} holds no object")
    return found


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Refuse all that is more than y += scale * B (A x) in linear layers."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"{folder} is an adapter of type {kind}", "an engine takes LoRA adapters")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise BadInput(f"{folder} was trained for {config['task_type']}, not to continue text")
    if config.get("bias", "none") != "none":
        raise BadInput(f"{folder} trained biases too (bias={config['bias']!r})", _MERGE)
    if config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        raise BadInput(
            f"{folder} began as {config['init_lora_weights']!r}, which changes the base model",
            "save it with peft's path_initial_model_for_weight_conversion, or merge it",
        )
    if unknown := sorted(name for name in set(config) - _HARMLESS if config[name]):
        raise BadInput(
            f"{folder} uses {', '.join(unknown)}, which an engine cannot compute", _MERGE
        )


_MERGE = "merge it into its model with peft (merge_and_unload), and run that"


def _layers(folder: Path, config: dict[str, Any], skeleton: Skeleton) -> dict[str, Layer]:
    """The layers that the configuration means, by peft's own rules."""
    wanted = config.get("target_modules")
    if not wanted:
        raise BadInput(f"{folder / CONFIG} names no target_modules")
    try:
        rules = LoraConfig(**{name: config[name] for name in _SHAPE if config.get(name)})
        names = [name for name in _candidates(skeleton) if _is_meant(rules, wanted, name, skeleton)]
        ranks = {name: _of(rules.rank_pattern, name, rules.r) for name in names}
        alphas = {name: _of(rules.alpha_pattern, name, rules.lora_alpha) for name in names}
        root = math.sqrt if config.get("use_rslora") else float
        layers = {n: Layer(int(ranks[n]), float(alphas[n]) / root(ranks[n])) for n in names}
    except (TypeError, ValueError, ArithmeticError, re.error) as exc:
        raise BadInput(f"{folder / CONFIG} makes no sense: {_line(exc)}") from None
    for name in names:
        _check_place(folder, name, skeleton)
    if not layers:
        raise BadInput(
            f"{folder} does not fit: a model of type {skeleton.model_type} has none of its layers "
            f"({_listed(wanted)})",
            "it was trained on another kind of model",
        )
    return layers


def _candidates(skeleton: Skeleton) -> list[str]:
    return [*skeleton.sizes, *sorted(skeleton.tables)]


def _is_meant(rules: Any, wanted: Any, name: str, skeleton: Skeleton) -> bool:
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return name in skeleton.sizes and name not in skeleton.head
    return bool(check_target_module_exists(rules, name))


def _of(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    known = pattern or {}
    return known.get(get_pattern_key(list(known), name), default)


def _check_place(folder: Path, name: str, skeleton: Skeleton) -> None:
    if name in skeleton.head or name in skeleton.tables:
        raise BadInput(f"{folder} trained {name}, the model's table of tokens", _MERGE)
    if ".experts." in name:  # they are given some of the tokens only, in an order of their own
        raise BadInput(f"{folder} trained the experts of a mixture ({name})", _MERGE)


def _listed(wanted: Any) -> str:
    return wanted if isinstance(wanted, str) else ", ".join(sorted(map(str, wanted)))


# ---- the base ----


def _check_base(folder: Path, config: dict[str, Any], skeleton: Skeleton) -> None:
    """Refuse an adapter of another model. A name that is no folder here says nothing for sure."""
    base, ours = str(config.get("base_model_name_or_path") or ""), skeleton.folder
    if not (base and ours and Path(base).is_dir() and Path(ours).is_dir()):
        return
    if os.path.realpath(base) != os.path.realpath(ours) and _are_other_weights(
        Path(base), Path(ours)
    ):
        raise BadInput(
            f"{folder} was trained on {base}, not on this model",
            f"run it on that; if you mean it, change base_model_name_or_path in its {CONFIG}",
        )


def _are_other_weights(one: Path, other: Path) -> bool:
    """Are these two models of one shape and type with other numbers? (A copy may be converted.)"""
    theirs, ours = weight_files(one), weight_files(other)
    if [f.stat().st_size for f in theirs] != [f.stat().st_size for f in ours]:
        return False
    return any(_sample(a) != _sample(b) for a, b in zip(theirs, ours, strict=True))


def _sample(file: Path) -> bytes:
    with file.open("rb") as opened:
        first = opened.read(_SAMPLE_BYTES)
        opened.seek(max(0, file.stat().st_size - _SAMPLE_BYTES))
        return first + opened.read(_SAMPLE_BYTES)


def _chat_template(folder: Path) -> str:
    """The template beside the adapter, or beside the model that it was merged into."""
    for place in (folder, folder.parent) if folder.name == "adapter" else (folder,):
        with contextlib.suppress(OSError, ValueError):
            return (place / "chat_template.jinja").read_text(encoding="utf-8")
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
            if isinstance(config, dict) and isinstance(config.get("chat_template"), str):
                return str(config["chat_template"])
    return ""


# ---- the weights ----


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], bytes]:
    try:
        with (folder / WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        with safe_open(folder / WEIGHTS, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, digest  # noqa: SIM118
    except FileNotFoundError:
        raise _without_weights(folder) from None
    except (OSError, SafetensorError) as exc:
        raise BadInput(f"{folder / WEIGHTS} cannot be read: {exc}") from None


def _without_weights(folder: Path) -> BadInput:
    hint = ""
    if (folder / "adapter_model.bin").exists():
        hint = "adapter_model.bin is a pickle, which is not read: save it with safetensors"
    return BadInput(f"{folder} has no {WEIGHTS}", hint)


def _pair(
    folder: Path, tensors: dict[str, Tensor], layers: Mapping[str, Layer], skeleton: Skeleton
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer: all that are meant, no others, each of the right size."""
    expected = {f"{_PREFIX}{name}{side}" for name in layers for side in _SIDES}
    if strange := sorted(set(tensors) - expected):
        raise BadInput(
            f"{folder} does not fit: a model of type {skeleton.model_type} has no place for "
            f"{strange[0].removeprefix(_PREFIX)}",
            "it was trained on another model, or with another kind of adapter",
        )
    if missing := sorted(expected - set(tensors)):
        raise BadInput(
            f"{folder / WEIGHTS} lacks {missing[0].removeprefix(_PREFIX)}, which its {CONFIG} names"
        )
    pairs = {}
    for name, layer in layers.items():
        a, b = (tensors[f"{_PREFIX}{name}{side}"] for side in _SIDES)
        inputs, outputs = skeleton.sizes[name]
        if a.shape != (layer.rank, inputs) or b.shape != (outputs, layer.rank):
            raise BadInput(
                f"{folder} does not fit: {name} of this model is {inputs} to {outputs}; the "
                f"adapter's matrices for it are {tuple(a.shape)} and {tuple(b.shape)}, "
                f"its rank {layer.rank}",
                "it was trained on a model of another size",
            )
        if not (a.is_floating_point() and b.is_floating_point()):
            raise BadInput(f"{folder} holds whole numbers for {name}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise BadInput(
                f"{folder} holds what is no number for {name}", "its training has diverged"
            )
        pairs[name] = (a, b)
    return pairs


def _line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]
