"""A grid of gray images in a terminal: two pixels a character, or one in plain ASCII.

Knows nothing of where the picture comes from.
"""

from __future__ import annotations

from pathlib import Path

_RAMP = " .:-=+*#%@"  # dark to light


def draw(path: Path, columns: int, rows: int, colour: bool) -> list[str]:
    """The top left part of a picture, one pixel a column, at most `columns` x `rows` pixels."""
    from PIL import Image

    with Image.open(path) as picture:
        gray = picture.convert("L")
        gray = gray.crop((0, 0, min(columns, gray.width), min(rows, gray.height)))
        pixels = gray.load()
        if pixels is None:
            return []
        value = [
            [int(pixels[x, y]) for x in range(gray.width)]  # type: ignore[arg-type]
            for y in range(gray.height)
        ]
    return _coloured(value) if colour else _plain(value)


def _plain(value: list[list[int]]) -> list[str]:
    # Every second line: a character is about twice as high as wide.
    return ["".join(_RAMP[v * (len(_RAMP) - 1) // 255] for v in line) for line in value[::2]]


def _coloured(value: list[list[int]]) -> list[str]:
    lines = []
    for top, bottom in zip(value[::2], value[1::2], strict=False):
        cells = (
            f"\x1b[38;5;{_gray(a)};48;5;{_gray(b)}m▀" for a, b in zip(top, bottom, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def _gray(value: int) -> int:
    """The nearest of the 24 grays of a 256-colour terminal."""
    return 232 + value * 23 // 255
