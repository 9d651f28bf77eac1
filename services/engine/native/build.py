"""Compile a C++ source of this folder, once for each machine, into the cache of whoever runs it.

The sources have a plain C interface and use no header of torch, so that it takes a few seconds.
OpenMP's runtime is not linked: its symbols are those of the process, which are torch's own, with
torch's threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# As fast as -ffast-math here, but infinities and NaNs stay what they are, and no start-up file is
# linked in that would flush denormal numbers in the whole process.
FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17",
    "-fPIC",
)  # fmt: skip

_BUILD_LIMIT_S = 120.0


class Unavailable(Exception):
    """There is no such library here; the text says why, in one line."""


def built(source: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The shared object for this source, compiler and processor, made when it is not there.

    Raises Unavailable.
    """
    if os.environ.get("LLMOS_NATIVE", "1") == "0":
        raise Unavailable("LLMOS_NATIVE is 0")
    compiler = _compiler()
    folder = _folder()
    path = folder / f"{source.stem}-{_key(source, compiler, flags)}.so"
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made, made_so = Path(work) / "made.o", Path(work) / "made.so"
        _run([compiler, *flags, "-c", str(source), "-o", str(made)])
        # Linked without -fopenmp: its functions are found in the process.
        _run([compiler, "-shared", str(made), "-o", str(made_so)])
        os.replace(made_so, path)
    return path


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("there is no C++ compiler (g++) here")


def _folder() -> Path:
    """Where it is kept: in the cache of this user, whose code it is."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "llmos" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = folder.stat().st_uid == os.geteuid()
    except OSError as exc:
        raise Unavailable(f"{folder} cannot be used: {exc.strerror}") from None
    if not mine:
        raise Unavailable(f"{folder} is another user's")
    return folder


def _key(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    key = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.h")):
        key.update(header.read_bytes())
    key.update(" ".join((*flags, _run([compiler, "--version"]), processor())).encode())
    return key.hexdigest()[:16]


def processor() -> str:
    """What -march=native looks at: the flags of the processor, in one line."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_LIMIT_S, check=True
        )
    except subprocess.CalledProcessError as exc:
        said = [line for line in (exc.stderr or "").splitlines() if "error" in line.lower()]
        raise Unavailable(f"{command[0]} failed: {said[0].strip() if said else exc}") from None
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(f"{command[0]}: {exc}") from None
    return done.stdout
