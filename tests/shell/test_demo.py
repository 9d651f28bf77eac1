"""The demo's material and pictures. The demo itself runs for two minutes: `pytest -m soak`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.shell.demo import material, picture


def test_questions_are_real_docstrings_and_some_are_held_out() -> None:
    asked = material.questions()
    found = {q.prompt: q for q in asked}
    assert found["What does math.gcd do?"].answer == "Greatest Common Divisor."
    assert len(asked) > 400
    unseen = [q for q in asked if not q.seen]
    assert len(unseen) / len(asked) == pytest.approx(material.HELD_OUT, abs=0.01)
    answers = [q.answer for q in asked]
    assert len(set(answers)) == len(answers), "a held-out answer is never that of a seen question"


def test_held_out_questions_are_not_in_the_training_file(tmp_path: Path) -> None:
    asked = material.questions()
    written = material.write_pairs(tmp_path / "pairs.jsonl", asked)
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    assert len(prompts) == written
    assert prompts == {q.prompt for q in asked if q.seen}


def test_the_first_sentence_of_a_docstring() -> None:
    assert material.first_sentence("f(x) -> y\n\nDo a thing. And more.") == "Do a thing."
    assert material.first_sentence("Do a\n  thing") == "Do a thing."
    assert material.first_sentence("") == ""


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("a b c", "a b c", 1.0), ("a b", "c d", 0.0), ("a b", "a c", 0.5), ("", "a", 0.0)],
)
def test_token_f1(answer: str, truth: str, score: float) -> None:
    assert material.token_f1(answer, truth) == pytest.approx(score)


def test_digits_are_written_as_images(tmp_path: Path) -> None:
    import numpy as np

    assert material.write_digits(tmp_path / "d.npz") == 1797
    with np.load(tmp_path / "d.npz") as archive:
        assert archive["images"].shape == (1797, 8, 8)
        assert archive["images"].max() == 255


@pytest.mark.parametrize("colour", [True, False])
def test_a_picture_is_drawn_in_half_as_many_lines_as_it_has_rows(
    tmp_path: Path, colour: bool
) -> None:
    from PIL import Image

    path = tmp_path / "p.png"
    Image.linear_gradient("L").resize((10, 8)).save(path)
    lines = picture.draw(path, 10, 8, colour)
    assert len(lines) == 4
    assert lines[0] != lines[-1]


def test_clean_removes_nothing_that_the_demo_did_not_make(tmp_path: Path) -> None:
    home = tmp_path / "h"
    other = Path(f"{home}-demo")
    other.mkdir()
    (other / "precious").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "llmos.shell", "demo", "--clean"], text=True,
        capture_output=True, env={**os.environ, "LLMOS_HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "not a home that the demo made" in done.stderr
    assert (other / "precious").exists()
