"""Image sources give one kind of array, and name the file that is wrong."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmos.kernel.errors import BadInput
from llmos.services.data.images import read_images
from support.shared import shared

PIXELS = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
IDX = b"\0\0\x08\x03" + struct.pack(">3I", 3, 4, 5) + PIXELS.tobytes()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "a.idx", "a-ubyte.gz"])
def test_idx_files_are_read_plain_and_compressed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(IDX) if name.endswith(".gz") else IDX)
    images = read_images(path)
    assert images.shape == (3, 1, 4, 5)
    assert images.dtype == np.uint8
    assert np.array_equal(images[:, 0], PIXELS)


def test_a_folder_of_pictures_is_sorted_and_gray_stays_gray(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        Image.fromarray(PIXELS[i]).save(tmp_path / f"{i}.png")
    assert np.array_equal(read_images(tmp_path)[:, 0], PIXELS)


def test_one_coloured_picture_makes_all_rgb(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 5, 3), (255, 0, 0), np.uint8)).save(tmp_path / "b.png")
    images = read_images(tmp_path)
    assert images.shape == (2, 3, 4, 5)
    assert images[1, :, 0, 0].tolist() == [255, 0, 0]


def test_npz_archives_give_their_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=np.arange(3), images=PIXELS)
    np.savez_compressed(tmp_path / "b.npz", x=np.ones((2, 8, 9, 3)))
    assert np.array_equal(read_images(tmp_path / "a.npz")[:, 0], PIXELS)
    colour = read_images(tmp_path / "b.npz")
    assert colour.shape == (2, 3, 8, 9)
    assert colour.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.idx", b"", "is empty"),
        ("a.idx", b"PNG!", "is not an idx file"),
        ("a.idx", IDX[:8], "ends inside its header"),
        ("a.idx", IDX[:-1], "is shorter than its header says"),
        ("a.idx", IDX + b"x", "is longer than its header says"),
        ("a.idx.gz", gzip.compress(IDX)[:-9], "is not a complete gzip file"),
        ("a.idx", b"\0\0\x08\x01" + struct.pack(">I", 2) + b"ab", r"shape \(2,\), not images"),
        ("a.npz", b"no zip", "is not an npz archive"),
        ("a.png", b"no picture", "is not a whole picture"),
        ("a.txt", b"text", "is not a set of images"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_images(path)


def test_pictures_of_two_sizes_and_pickles_are_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[0][:3]).save(tmp_path / "b.png")
    with pytest.raises(BadInput, match=r"b\.png is 5 x 3, a\.png is 5 x 4"):
        read_images(tmp_path)
    np.savez(tmp_path / "c.npz", x=np.array([{}], dtype=object))
    with pytest.raises(BadInput, match="is not an npz archive"):
        read_images(tmp_path / "c.npz")


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no PNG or JPEG files"):
        read_images(tmp_path)


@pytest.mark.slow
def test_mnist_is_read() -> None:
    images = read_images(shared("data/mnist/train20k-images-idx3-ubyte.gz"))
    assert images.shape == (20_000, 1, 28, 28)
    assert 20 < images.mean() < 50
