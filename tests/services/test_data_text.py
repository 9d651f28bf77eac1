"""Text sources read what they promise, and name the file, the line or the byte that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.errors import BadInput
from llmos.services.data import text as text_module
from llmos.services.data.base import Dialogue, Document, read_text
from llmos.services.data.text import JsonlSource, TextSource
from support.shared import shared


def whole(path: Path) -> str:
    return "".join(r.text for r in read_text(path) if isinstance(r, Document))


def rows(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


@pytest.mark.parametrize("content", ["one line", "two\nlines\n", "\n\nblank\n\n", "ünï\r\ncödé"])
def test_a_text_file_is_one_document_unchanged(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    records = list(TextSource.read(path))
    assert whole(path) == content
    assert [r.ends for r in records if isinstance(r, Document)][-1]
    assert sum(r.ends for r in records if isinstance(r, Document)) == 1


@settings(max_examples=30, deadline=None)
@given(content=st.text(min_size=1).filter(lambda s: not s.startswith("\ufeff")))
def test_pieces_of_any_size_give_the_same_text(
    content: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE_BYTES", 3)
        assert whole(path) == content


def test_compressed_files_read_the_same(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text("some text\n" * 100)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert whole(packed) == whole(plain)


def test_a_folder_is_read_in_the_order_of_names_and_skips_the_rest(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second ")
    (tmp_path / "a.txt").write_text("first ")
    (tmp_path / "c").mkdir()
    rows(tmp_path / "c" / "c.jsonl", {"text": "third"})
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    assert whole(tmp_path) == "first second third"


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert whole(tmp_path) == "hello"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt.gz", gzip.compress(b""), "is empty"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8: byte 3 is 0xe9"),
        ("a.txt", b"x" * (1 << 20) + b"\xff", "byte 1048576 is 0xff"),
        ("a.txt", b"cut \xc3", "byte 4 is 0xc3"),
        ("a.txt.gz", b"plain text", "is not a complete gzip file"),
        ("a.txt.gz", gzip.compress(b"text " * 99)[:-9], "is not a complete gzip file"),
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "good"}\n[1]', "line 2: a row is an object, not list"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', r"line 1 has 2 string fields \(a, b\)"),
        ("a.jsonl", b'{"n": 1}', "line 1 has no string fields"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: messages is a list of objects"),
        ("a.jsonl", b'{"messages": []}', "line 1: messages has no turn of the assistant"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.csv", b"a,b", "is not text that can be read"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        list(read_text(path))
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_path_that_is_not_there_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file or folder"):
        list(read_text(tmp_path / "gone.txt"))
    with pytest.raises(BadInput, match="no text files in"):
        list(read_text(tmp_path))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "answer": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a", "id": "7"},
        {"instruction": "q", "output": "a", "input": ""},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_every_form_of_a_pair_is_the_same_dialogue(row: object, tmp_path: Path) -> None:
    (record,) = JsonlSource.read(rows(tmp_path / "a.jsonl", row))
    assert record == Dialogue((("user", "q"), ("assistant", "a")))


def test_the_input_of_an_instruction_belongs_to_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    (record,) = JsonlSource.read(rows(tmp_path / "a.jsonl", row))
    assert record == Dialogue((("user", "add\n1 2"), ("assistant", "3")))


def test_the_only_string_of_a_row_is_its_text(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"id": 1, "body": "hello"}, {"text": "x", "title": "y"}, "z")
    assert list(JsonlSource.read(path)) == [Document("hello"), Document("x"), Document("z")]


@pytest.mark.slow
def test_real_corpora_are_read_whole() -> None:
    assert len(whole(shared("data/tinyshakespeare/input.txt.gz"))) == 1_115_394
    pairs = list(read_text(shared("data/reddit_qa/pairs.jsonl.gz")))
    assert len(pairs) == 4_755
    assert all(isinstance(p, Dialogue) for p in pairs)
