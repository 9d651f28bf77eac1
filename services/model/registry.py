"""The model registry: the service that knows which models lie in the home.

A model is a folder `models/NAME`. All that is listed is read from the folders, so nothing can
disagree with them: a folder copied there by hand is a model too. Torch is never loaded here,
and hub names are not known here.

A new model is written aside (`models/.partial-*`) by who makes it; `register` gives it a sidecar
`llmos.json`, makes it durable and renames it into place, so that a model is there whole or not
at all.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import stat
import time
from math import prod
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, BadInput, Busy, NoSuchThing, NotAllowed
from llmos.services.base import Service, call
from llmos.services.engine import weight_files

SIDECAR = "llmos.json"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
PARTIAL, REPLACED = ".partial-", ".replaced-"
PULLED = ".pull-"  # what a pull has fetched so far (services/pull/staging.py)

# Workers outlive the kernel and this service: one may be writing its model while the service
# starts again. Only what nobody has touched for this long is the rest of a crash.
ABANDONED_AFTER_S = 600.0

# A pull that was interrupted may be taken up again for so long.
PULLS_KEPT_S = 14 * 86_400.0

# A safetensors header is refused above this size by the format's own library.
MAX_HEADER_BYTES = 100_000_000

# What a folder of each kind must hold: every group needs one match.
NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (
        ("config.json",),
        ("*.safetensors",),
        ("tokenizer.json", "tokenizer_config.json"),
    ),
    "adapter": (("adapter_config.json",), ("adapter_model.safetensors",)),
    "gan": (("config.json",), ("generator.safetensors",), ("discriminator.safetensors",)),
}


class ModelRegistry(Service):
    name = "models"
    summary = "The models of this home: names, kinds, sizes, where they come from"
    as_caller = True
    essential = True  # trainings that end call it: without it their results would be lost
    limit_s = 600.0  # a large model is synced to a slow disk

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.folder = home / "models"
        self.folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._clean_up(now - ABANDONED_AFTER_S, now - PULLS_KEPT_S)

    @call
    def ls(self) -> list[dict[str, Any]]:
        """Every model in the home, by name."""
        found = sorted(p for p in self.folder.iterdir() if _is_model(p))
        return [_entry(p) for p in found]

    @call
    def show(self, name: str) -> dict[str, Any]:
        """One model: what `ls` has, how it was made, its files and its configuration."""
        folder = self._find(name)
        files = [
            {"name": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size}
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        ]
        config = _read_json(folder / "config.json") or _read_json(folder / "adapter_config.json")
        made_by = _read_json(folder / SIDECAR).get("made_by", {})
        return {**_entry(folder), "made_by": made_by, "files": files, "config": config}

    @call
    def register(
        self,
        name: str,
        folder: str,
        kind: str,
        made_by: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Take a finished folder of this home into the registry under a name: a rename, no copy."""
        source, target = Path(folder), self.folder / _valid_name(name)
        pid = (made_by or {}).get("pid")
        made_by_it = (_read_json(target / SIDECAR).get("made_by") or {}).get("pid")
        is_own = pid is not None and pid == made_by_it  # asked again, after a crash in between
        if is_own and not source.exists():
            return _entry(target)
        self._check_source(source, kind)
        if target.exists() and not (overwrite or is_own):
            raise BadArgument(
                f"there is a model {name!r} already", "choose another name, or pass --overwrite"
            )
        sidecar = {
            "name": name,
            "kind": kind,
            "made_by": made_by or {},
            "created_at": time.time(),
            "parameters": _count_parameters(source),
        }
        (source / SIDECAR).write_text(json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
        _sync_tree(source)
        self._put_in_place(source, target)
        return _entry(target)

    @call
    def share(self, name: str, private: bool = False) -> dict[str, Any]:
        """Let all members of the group read a model, or (`private`) only its user again."""
        folder, home = self._find(name), self.folder.stat()
        if not home.st_mode & stat.S_ISVTX:
            raise BadInput("this kernel serves one user: there is nobody to share with",
                           "`llmos boot --group NAME` serves several")  # fmt: skip
        for path in (folder, *folder.rglob("*")):
            if path.is_symlink():
                continue
            os.chown(path, -1, home.st_gid)
            mode = stat.S_IMODE(path.stat().st_mode) & 0o700
            path.chmod(mode if private else mode | (mode & 0o500) >> 3)
        return {"name": name, "shared": not private}

    @call
    def rm(self, name: str) -> dict[str, Any]:
        """Delete a model and its files. Raises Busy while a process, or an adapter, needs it."""
        folder = self._find(name)
        self._check_own(name, folder)
        self._check_unused(name, folder)
        self._check_no_base(name)
        freed_bytes = sum(s.st_size for s in _stats(folder) if s.st_nlink == 1)
        # Out of the listing at once; what is left of a crash here is cleaned at the next start.
        aside = self.folder / f"{PARTIAL}removed-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside)
        freed_bytes += weight_files.forget(self.home, folder)
        return {"name": name, "freed_bytes": freed_bytes}

    def _check_own(self, name: str, folder: Path) -> None:
        """As the sticky bit of a shared home has it; said before anything else is."""
        owner = folder.stat().st_uid
        if os.geteuid() not in (0, owner, self.folder.stat().st_uid):
            raise NotAllowed(f"model {name!r} is {_user(owner)}'s", "only its owner removes it")

    def _check_unused(self, name: str, folder: Path) -> None:
        users = self.call("kernel.users_of", path=str(folder))
        # An engine that nobody uses any more is loaded still; else its guests are who to name. One
        # of another user's keeps what it has, and its owner could not end it.
        guests = [u for u in users if u["role"] != "engine"]
        mine = _user(os.geteuid())
        users = [u for u in users if u["role"] != "engine" or u["user"] == mine]
        if not users:
            return
        first = (guests or users)[0]
        more = f" and {len(guests) - 1} more" if len(guests) > 1 else ""
        end = f"kill {first['pid']}" if guests else f"unload {name}"
        what = first["program"] if guests else "engine, loaded"
        raise Busy(f"model {name!r} is in use by process {first['pid']} ({what}){more}",
                   f"`llmos {end}` ends it")  # fmt: skip

    def _check_no_base(self, name: str) -> None:
        """An adapter is of no use without its model."""
        on_it = [entry["name"] for entry in self.ls() if entry["base"] == name]
        if on_it:
            more = f" and {len(on_it) - 1} more" if len(on_it) > 1 else ""
            raise Busy(f"the adapter {on_it[0]!r}{more} cannot run without model {name!r}",
                       f"`llmos models rm {on_it[0]}` removes it")  # fmt: skip

    def _find(self, name: str) -> Path:
        folder = self.folder / _valid_name(name)
        if not _is_model(folder):
            raise NoSuchThing(f"no model {name!r} in {self.folder}", "`llmos models` lists them")
        return folder

    def _check_source(self, source: Path, kind: str) -> None:
        if kind not in NEEDS:
            raise BadArgument(f"no kind of model {kind!r}", f"kinds: {', '.join(NEEDS)}")
        inside = self.home.resolve() in source.resolve().parents
        if not source.is_dir() or not inside:
            raise BadInput(
                f"{source} is not a folder in {self.home}",
                f"write the model into {self.folder}/{PARTIAL}PID first, or copy it there",
            )
        for group in NEEDS[kind]:
            if not any(p.is_file() for pattern in group for p in source.glob(pattern)):
                raise BadInput(
                    f"{source} has no {' or '.join(group)}: not a whole {kind} model",
                    "write all files before the model is registered",
                )

    def _put_in_place(self, source: Path, target: Path) -> None:
        replaced = self.folder / f"{REPLACED}{target.name}"
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        source.rename(target)
        _sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _clean_up(self, before: float, kept_since: float) -> None:
        """Undo or finish what a crash left: a replaced model comes back if its heir is missing."""
        for path in self.folder.glob(f"{REPLACED}*"):
            target = self.folder / path.name.removeprefix(REPLACED)
            if target.exists():
                shutil.rmtree(path)
            else:
                path.rename(target)
        for path in self.folder.glob(f"{PULLED}*"):
            if path.is_dir() and not path.is_symlink() and _last_change(path) < kept_since:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"{PARTIAL}*"):
            if path.is_symlink():
                path.unlink()  # nobody who makes a model leaves one: rmtree must not be sent away
            elif path.is_dir() and _last_change(path) < before:
                shutil.rmtree(path)


def _valid_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadArgument(
            f"{name!r} cannot be the name of a model",
            "letters, digits, `.`, `_` and `-`, at most 128, not beginning with a dot",
        )
    return name


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_model(folder: Path) -> bool:
    try:
        if folder.name.startswith(".") or not folder.is_dir():
            return False
        return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    except PermissionError:
        return False  # another user's own: to this one it is not there


def _entry(folder: Path) -> dict[str, Any]:
    """The line of one model in the list, from its files alone."""
    sidecar, config = _read_json(folder / SIDECAR), _read_json(folder / "config.json")
    made_by = sidecar.get("made_by") or {}
    architectures = config.get("architectures") or []
    adapter = {} if config else _read_json(folder / "adapter_config.json")
    base = str(adapter.get("base_model_name_or_path") or "")
    parameters = sidecar.get("parameters")
    return {
        "name": folder.name,
        "kind": sidecar.get("kind") or _guess_kind(folder, architectures),
        "bytes": sum(s.st_size for s in _stats(folder)),
        "source": _source(made_by),
        "license": str(made_by.get("license", "")),
        "created_at": sidecar.get("created_at") or folder.stat().st_mtime,
        "shared": bool(folder.stat().st_mode & stat.S_IRGRP),
        "folder": str(folder),
        "parameters": _count_parameters(folder) if parameters is None else parameters,
        "architecture": architectures[0] if architectures else config.get("model_type", ""),
        "base": _called(folder, base),
    }


def _called(folder: Path, base: str) -> str:
    """The model of an adapter: the name of one in this home, else as its folder or hub calls it."""
    return Path(base).name if Path(base).parent == folder.parent else base


def _stats(folder: Path) -> list[os.stat_result]:
    return [p.stat() for p in folder.rglob("*") if p.is_file()]


def _source(made_by: dict[str, Any]) -> str:
    if not made_by:
        return "local folder"
    if made_by.get("source"):  # pulled
        return str(made_by["source"])
    pid = made_by.get("pid")
    program = str(made_by.get("program", "unknown program"))
    return program if pid is None else f"{program} (pid {pid})"


def _guess_kind(folder: Path, architectures: list[str]) -> str:
    """The kind of a folder that was copied here by hand."""
    if (folder / "generator.safetensors").is_file():
        return "gan"
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    names = " ".join(architectures)
    return "causal-lm" if "CausalLM" in names or "LMHead" in names else "other"


def _count_parameters(folder: Path) -> int | None:
    """Numbers stored in the folder's safetensors files; None when one cannot be read.

    From the files' headers (8 bytes of little-endian length, then JSON), without the weights.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                return None
            try:
                header = json.loads(file.read(length))
            except ValueError:
                return None
        total += sum(prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is none, so that one broken folder hides no other."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_change(folder: Path) -> float:
    return max(p.stat().st_mtime for p in (folder, *folder.rglob("*")))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)
