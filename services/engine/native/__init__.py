"""Kernels in C++ for what torch has no fast operator for, built where a compiler is.

`paged.cpp` is compiled once for each machine (some seconds), into the cache of whoever runs it.
Where there is no compiler, or what it made does not compute what it should, everything runs in
torch alone; `why_not` then says so in one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("paged.cpp")

# As fast as -ffast-math here, but infinities and NaNs stay what they are, and no start-up file is
# linked in that would flush denormal numbers in the whole process.
_FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
    "-freciprocal-math", "-fno-signed-zeros", "-fopenmp", "-std=c++17", "-fPIC",
)  # fmt: skip

_BUILD_LIMIT_S = 120.0

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class Unavailable(Exception):
    """There is no native library here; the text says why."""


class Library:
    """The functions of `paged.cpp`; what they take is written there."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self.store = loaded.llmos_store
        self.store.argtypes = [_P, _P, _P, _I, _I, _I, _I, _L, _L, _L, _I]
        self.store.restype = None
        self.decode = loaded.llmos_decode
        self.decode.argtypes = [
            _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _L, _L, _L, _L, _F, _F, _I, _I, _I,
        ]  # fmt: skip
        self.decode.restype = None


_state: dict[str, Library | str] = {}


def library() -> Library | None:
    """The library, built at the first call; None where it cannot be (see `why_not`)."""
    if "found" not in _state:
        try:
            _state["found"] = Library(_built())
        except (Unavailable, OSError, AttributeError) as exc:
            _state["found"] = str(exc) or type(exc).__name__
    found = _state["found"]
    return found if isinstance(found, Library) else None


def why_not() -> str:
    """Why there is no library; empty when there is one."""
    library()
    found = _state["found"]
    return found if isinstance(found, str) else ""


def _built() -> Path:
    """The shared object for this source, compiler and processor, made when it is not there."""
    if os.environ.get("LLMOS_NATIVE", "1") == "0":
        raise Unavailable("LLMOS_NATIVE is 0")
    compiler = _compiler()
    folder = _folder()
    path = folder / f"paged-{_key(compiler)}.so"
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made, made_so = Path(work) / "paged.o", Path(work) / "paged.so"
        _run([compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(made)])
        # Linked without -fopenmp: its functions are found in the process, which has torch's own.
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
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise Unavailable(f"{folder} is another user's")
    return folder


def _key(compiler: str) -> str:
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(" ".join((*_FLAGS, _run([compiler, "--version"]), _processor())).encode())
    return key.hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at."""
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
        said = (exc.stderr or "").strip().splitlines()
        raise Unavailable(f"{command[0]} failed: {said[0] if said else exc}") from None
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(f"{command[0]}: {exc}") from None
    return done.stdout
