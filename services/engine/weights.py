"""Load the weights of a model for an engine: as it multiplies with them, mapped where possible.

    kind       on a CPU with the kernels of `native`             else
    float32    panels, mapped                                    (in, out), private
    bfloat16   panels, mapped                                    oneDNN's blocks, private
    int8       panels, mapped                                    rows and scales, private

Only for models whose forward is known to call its linear layers and nothing else (`PANEL_TYPES`);
all others, and all on a GPU, keep their weights as they come.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.engine import weight_files
from llmos.services.engine.arranged import (
    ALIGNMENT,
    PANEL_TYPES,
    arranged,
    bind,
    fill,
    places,
    settle,
    size_of,
    takes_panels,
)
from llmos.services.engine.layout import lay_out
from llmos.services.model.load import (
    load_causal_lm,
    load_config,
    resolve_dtype,
)
from llmos.services.model.load import (
    weight_files as files_of,
)

# Another number when panels, or their places, are not what they were.
LAYOUT_VERSION = 1

INT8 = "int8"


def load(
    ref: str,
    dtype: str,
    device: str,
    home: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """The model on the device, laid out, in evaluation mode. Raises BadInput, BadArgument.

    Without a home nothing is kept: the weights are private. `note` is told in one line what a
    person may want to know.
    """
    config = load_config(ref)
    kind, computed = kind_and_dtype(config, dtype, device)
    model_type = config.get_text_config().model_type
    if not takes_panels(model_type, kind, torch.device(device).type):
        model: Any = load_causal_lm(ref, _name(computed)).to(device)  # type: ignore[arg-type]
        lay_out(model, kind)
        return model
    model = arranged(config, kind, computed)
    folder = folder_of(ref)
    try:
        if home is None:
            _fill_private(model, folder)
        else:
            _bind_file(model, folder, home, _how(kind, computed))
    except OSError as exc:
        note(f"the weights are this engine's alone: {exc.strerror or exc}")
        _fill_private(model, folder)
    settle(model)
    with contextlib.suppress(OSError):  # most models have one
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = config._name_or_path = str(ref)
    return model


def kind_and_dtype(config: PreTrainedConfig, dtype: str, device: str) -> tuple[str, torch.dtype]:
    """How weights are stored, and in what the rest is computed. Raises BadArgument."""
    if dtype != INT8:
        found = resolve_dtype(dtype, device)
        return _name(found), found
    if torch.device(device).type != "cpu":
        raise BadArgument("int8 weights are for a CPU", "use --dtype bfloat16 on a GPU")
    model_type = config.get_text_config().model_type
    if model_type not in PANEL_TYPES:
        raise BadArgument(
            f"int8 is not known for models of type {model_type!r}", "use --dtype auto"
        )
    return INT8, resolve_dtype("auto", device)


def folder_of(ref: str) -> Path:
    """Where the model's files lie: the folder itself, or the hub's cache. Raises BadInput."""
    if Path(ref).is_dir():
        return Path(ref)
    found = cached_file(ref, "config.json")
    if found is None:
        raise BadInput(f"no model {ref}", "give a name of `llmos models`, a folder, or a hub name")
    return Path(found).parent


def _bind_file(model: Any, folder: Path, home: Path, how: dict[str, str]) -> None:
    """Bind a model to the file with its weights, made now if it has to be. Raises OSError."""
    key = weight_files.key_of(folder, files_of(folder), how)
    path = weight_files.path_of(weight_files.folder_in(home), folder, key)
    table = [[p.name, str(p.dtype), list(p.shape), p.offset] for p in places(model)]
    found = weight_files.opened(path, key, table)
    if found is None:
        weight_files.make(
            path, key, folder.resolve(), table, size_of(model),
            lambda memory: _fill(model, torch.frombuffer(memory, dtype=torch.uint8), folder),
        )  # fmt: skip
        found = weight_files.opened(path, key, table)
    if found is None:
        raise OSError(f"{path} cannot be read back")
    whole = torch.frombuffer(found.memory, dtype=torch.uint8)
    bind(model, whole[found.start :])


def _fill_private(model: Any, folder: Path) -> None:
    memory = torch.empty(size_of(model) + ALIGNMENT, dtype=torch.uint8)
    _fill(model, memory[-memory.data_ptr() % ALIGNMENT :], folder)


def _fill(model: Any, memory: Tensor, folder: Path) -> None:
    bind(model, memory)
    fill(model, _as_stored(folder))


def _as_stored(folder: Path) -> Any:
    """The model as transformers loads it, of the type of its file, so that it stays mapped."""
    stored = getattr(load_config(folder).get_text_config(), "dtype", None)
    return load_causal_lm(folder, "bfloat16" if stored == torch.bfloat16 else "float32")


def _how(kind: str, computed: torch.dtype) -> dict[str, str]:
    """What a file depends on, beside the model's own files."""
    return {
        "layout": str(LAYOUT_VERSION),
        "kind": kind,
        "dtype": _name(computed),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
