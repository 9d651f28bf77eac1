"""Tokens as examples: fixed blocks of running text, and prompts with their answers.

It does not know where the text came from, nor the model that learns it. Arrays lie in `.npy`
files and are mapped, so that the books see them as a file and not as private memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# The label that the loss leaves out: the default of torch.nn.functional.cross_entropy.
IGNORE = -100

# Lengths of rows are rounded up to this. Each shape has a library build kernels of its own and
# keep them: with every length there is, oneDNN took 300 MB in bfloat16 for a model of 7.
MULTIPLE = 16

Tokens = npt.NDArray[Any]


class Examples(Protocol):
    """A set of examples of one kind."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[Tokens, Tokens]:
        """Inputs and labels, both int64 (len(indices), length); label IGNORE is left out."""
        ...

    def targets(self, index: int) -> int:
        """How many labels of an example are not IGNORE."""
        ...


class Blocks:
    """Running text cut into blocks of `context` tokens; the label of a token is the next one."""

    def __init__(self, tokens: Tokens, context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[Tokens, Tokens]:
        at = indices[:, None] * self.context + np.arange(self.context + 1)
        rows = self.tokens[at].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]

    def targets(self, index: int) -> int:
        return self.context


class Dialogues:
    """Examples of different lengths, each with a mask of the tokens to be learnt.

    Example i is tokens[starts[i]:starts[i + 1]]. Rows of a batch are filled up on the right:
    in a causal model what comes later changes nothing before it, so no attention mask is needed.
    """

    def __init__(self, tokens: Tokens, learn: Tokens, starts: Tokens, pad_id: int) -> None:
        self.tokens = tokens
        self.learn = learn
        self.starts = starts
        self.pad_id = pad_id
        self.longest = int(np.diff(starts).max(initial=1)) - 1  # no row is longer than a model sees

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[Tokens, Tokens]:
        spans = [(int(self.starts[i]), int(self.starts[i + 1])) for i in indices]
        needed = max(end - start for start, end in spans) - 1
        width = min(self.longest, -(-needed // MULTIPLE) * MULTIPLE)
        inputs = np.full((len(spans), width), self.pad_id, np.int64)
        labels = np.full((len(spans), width), IGNORE, np.int64)
        for row, (start, end) in enumerate(spans):
            ids = self.tokens[start:end].astype(np.int64)
            inputs[row, : len(ids) - 1] = ids[:-1]
            labels[row, : len(ids) - 1] = np.where(self.learn[start + 1 : end], ids[1:], IGNORE)
        return inputs, labels

    def targets(self, index: int) -> int:
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        return int(self.learn[start + 1 : end].sum())


class Subset:
    """Some examples of a set: a part for training, a part for validation."""

    def __init__(self, whole: Examples, indices: npt.NDArray[np.int64]) -> None:
        self.whole = whole
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[Tokens, Tokens]:
        return self.whole.batch(self.indices[indices])

    def targets(self, index: int) -> int:
        return self.whole.targets(int(self.indices[index]))


def split(whole: Examples, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Training and validation part; with a fraction above 0 each has at least one example.

    Of running text the end is held out (neighbouring blocks are alike), of dialogues a draw.
    """
    count = len(whole)
    held = min(max(1, round(count * fraction)), count - 1) if fraction > 0 else 0
    order = np.arange(count)
    if not isinstance(whole, Blocks):
        order = np.random.Generator(np.random.PCG64([seed, 0x5EED])).permutation(count)
    return Subset(whole, order[: count - held]), Subset(whole, order[count - held :])


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def save_arrays(folder: Path, **arrays: Tokens) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def map_array(path: Path) -> Tokens:
    mapped: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def digest(*arrays: Tokens) -> str:
    """A checksum of the data, to notice when it changed under a checkpoint."""
    state = hashlib.blake2b(digest_size=16)
    for array in arrays:
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()
