"""Wheels that carry a file, as `pip` fetches them from a folder."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path


def write_wheel(
    folder: Path, distribution: str, carried: Path, version: str = "1.0", damaged: bool = False
) -> Path:
    """A wheel of `distribution` with the file in its package. `damaged`: its RECORD is of another
    content."""
    package = distribution.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    content = carried.read_bytes()
    files = {
        f"{package}/__init__.py": b"raise SystemExit('nobody runs this')\n",
        f"{package}/{carried.name}": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        "License: Apache-2.0\nRequires-Dist: no-such-thing-at-all\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, data in files.items():
        told = b"other" if damaged and name.endswith(carried.name) else data
        digest = base64.urlsafe_b64encode(hashlib.sha256(told).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
