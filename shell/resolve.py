"""From what a person names to what the kernel can use: paths made absolute, pids found by name.

Knows the schema of a program's arguments as data, not the program.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, NoSuchProcess, NoSuchThing

Schema = dict[str, Any]
Record = dict[str, Any]

# What a worker takes over from the environment of whoever submits: where libraries look
# for models and how they talk, and nothing that could be a secret of something else.
_ENV_PREFIXES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "CUDA_", "LC_")
_ENV_NAMES = frozenset({"LANG", "TZ", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"})


def environment(schema: Schema) -> dict[str, str]:
    """The variables that are sent with a request to run a program; all of them for a command.

    Raises BadArgument for one that is not UTF-8, as the protocol has it.
    """
    prefixes = (*_ENV_PREFIXES, *schema.get("environment", ()))
    found = {
        name: value
        for name, value in os.environ.items()
        if schema.get("foreign") or name.startswith(prefixes) or name.upper() in _ENV_NAMES
    }
    for name, value in found.items():
        _check_utf8(f"the environment variable {name!r}", name + value, "unset it (`env -u`)")
    return found


def _check_utf8(what: str, text: str, hint: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadArgument(f"{what} is not UTF-8 text", hint) from None


def schema_of(manifest: dict[str, Any], program: str) -> Schema:
    """The schema of a program. NoSuchThing, with the nearest name, when there is none."""
    programs: dict[str, Schema] = manifest["programs"]
    if program in programs:
        return programs[program]
    raise NoSuchThing(f"there is no program {program!r}", nearest_hint(program, programs))


def nearest_hint(word: str, known: Any) -> str:
    """ "did you mean X?", or the list of what there is."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(names) or 'none'}"


def program_args(schema: Schema, args: dict[str, Any], cwd: str) -> dict[str, Any]:
    """The arguments with local paths made absolute. BadArgument for a name that is not known."""
    fields = {f["name"]: f for f in schema["args"]}
    for name in args:
        if name not in fields:
            raise BadArgument(
                f"{schema['name']} has no argument {name!r}", nearest_hint(name, fields)
            )
    for name, value in args.items():
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str):
                _check_utf8(f"{name} {text!r}", text, "rename the file, or link to it")
    return {name: _absolute(fields[name], value, cwd) for name, value in args.items()}


def _absolute(field: dict[str, Any], value: Any, cwd: str) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if field.get("local") and isinstance(value, str):
        return os.path.abspath(Path(cwd, os.path.expanduser(value))) if is_path(value) else value
    if not (field.get("path") or field.get("model")):
        return value
    if isinstance(value, list | tuple):
        return [_absolute(field, v, cwd) for v in value]
    return local_path(value, cwd) if isinstance(value, str) else value


def local_path(name: str, cwd: str) -> str:
    """`name` as an absolute path when it looks like a path or is one, else unchanged.

    A model is named by registry name, local path or hub name: only what exists here, or is
    written as a path ("./x", "~/x"), is taken for a path.
    """
    looks = is_path(name)
    here = Path(cwd, os.path.expanduser(name))
    return os.path.abspath(here) if looks or (name and os.path.exists(here)) else name


def is_path(name: str) -> bool:
    """Is it written as one? A bare name may be that of something else."""
    begins = name in (".", "..", "~") or name.startswith(("./", "../", "~/", "/"))
    return begins or name.lower().endswith((".gguf", ".whl"))


def pid_of(processes: list[Record], word: str) -> int:
    """The pid that a person means by a number or by the name of a live process."""
    if word.isdigit():
        return int(word)
    found = [p for p in processes if p["name"] == word]
    # An engine is called as its guests are, and is seldom what a person means.
    named = [p["pid"] for p in found if p.get("role") != "engine"] or [p["pid"] for p in found]
    if len(named) == 1:
        return int(named[0])
    if named:
        pids = ", ".join(str(pid) for pid in named)
        raise BadArgument(f"{len(named)} processes are named {word!r}: {pids}", "give the pid")
    raise NoSuchProcess(f"there is no process {word!r}")
