"""What the demo learns from, made of what every machine has: Python's own documentation.

Text for pretraining is `pydoc_data.topics`, questions come from the standard library's
docstrings, images are scikit-learn's digits. Nothing is downloaded, nothing is stored in llmos.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules whose docstrings are worth asking about: pure, quick to import, known to everybody.
MODULES = (
    "math", "statistics", "random", "string", "textwrap", "re", "json", "os.path", "shutil",
    "glob", "fnmatch", "tempfile", "itertools", "functools", "operator", "collections", "heapq",
    "bisect", "copy", "pprint", "datetime", "calendar", "time", "base64", "binascii", "hmac",
    "secrets", "struct", "zlib", "gzip", "csv", "html", "urllib.parse", "inspect", "ast", "dis",
    "keyword", "contextlib", "traceback", "platform", "unicodedata", "difflib", "cmath",
    "colorsys", "linecache", "tokenize", "threading", "signal", "stat", "filecmp", "uuid",
)  # fmt: skip

HELD_OUT = 0.15  # of the questions are never trained on
_ANSWER_CHARS = (20, 110)


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str
    seen: bool  # is it in the training set?


def write_text(path: Path) -> int:
    """The language reference that `help()` shows, as one text -> its bytes."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return path.write_bytes(text.encode())


def questions(seed: int = 0) -> list[Question]:
    """ "What does math.gcd do?" and the first sentence of its docstring; 15 % are held out."""
    pairs = dict(_pairs())
    names = sorted(pairs)
    random.Random(seed).shuffle(names)
    held_out = set(names[: round(HELD_OUT * len(names))])
    return [
        Question(f"What does {name} do?", pairs[name], name not in held_out)
        for name in sorted(names)
    ]


def write_pairs(path: Path, asked: list[Question]) -> int:
    """The questions that are trained on, as prompt and answer -> how many."""
    seen = [q for q in asked if q.seen]
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps({"prompt": q.prompt, "answer": q.answer}) + "\n" for q in seen)
    return len(seen)


def write_digits(path: Path) -> int:
    """scikit-learn's 8 x 8 digits as an npz of 0-255 -> how many."""
    import numpy as np
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    np.savez_compressed(path, images=images)
    return len(images)


def _pairs() -> Iterator[tuple[str, str]]:
    known: set[str] = set()  # two names for one function make one question
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, member in sorted(vars(module).items()):
            if name.startswith("_") or not inspect.isroutine(member):
                continue
            answer = first_sentence(inspect.getdoc(member) or "")
            if answer not in known and _ANSWER_CHARS[0] <= len(answer) <= _ANSWER_CHARS[1]:
                known.add(answer)
                yield f"{module_name}.{name}", answer


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring, on one line, without a signature in front."""
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in doc.split("\n\n")]
    for text in paragraphs:
        if text and not re.match(r"[\w.]+\(.*\)", text):
            sentence = re.split(r"(?<=[.!?])\s", text)[0]
            return sentence.rstrip(".") + "."
    return ""


def token_f1(answer: str, truth: str) -> float:
    """The F1 of the words that two texts share (Rajpurkar et al. 2016, SQuAD)."""
    got, want = _words(answer), _words(truth)
    shared = sum(min(got.count(w), want.count(w)) for w in set(got))
    return 2 * shared / (len(got) + len(want)) if shared else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
