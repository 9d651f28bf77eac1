"""What a worker writes: checkpoints that are whole or passed over, and its stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmos.drivers.worker import checkpoint
from llmos.drivers.worker.stream import Stream, whole_records


def write(root: Path, step: int, text: str = "", keep: int = 2) -> Path:
    def fill(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"step": step, "text": text}))
        (folder / "inner").mkdir()
        (folder / "inner" / "more").write_bytes(bytes(1000))

    return checkpoint.write(root, step, fill, keep)


def newest(root: Path) -> tuple[str | None, list[str]]:
    said: list[str] = []
    found = checkpoint.newest(root, said.append)
    return (found.name if found else None), said


def test_the_newest_checkpoint_is_read_and_the_two_newest_stay(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])
    for step in (5, 50, 500):
        folder = write(tmp_path, step)
        assert checkpoint.damage(folder) is None
    assert newest(tmp_path) == ("step-000000500", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000050", "step-000000500"]


def test_a_checkpoint_of_the_same_step_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 5, "old")
    folder = write(tmp_path, 5, "new")
    assert json.loads((folder / "state.json").read_text())["text"] == "new"
    assert len(list(tmp_path.iterdir())) == 1


DAMAGE = {
    "a byte is other": lambda f: (f / "inner" / "more").write_bytes(bytes(999) + b"x"),
    "a file is short": lambda f: (f / "state.json").write_text(""),
    "a file is gone": lambda f: (f / "inner" / "more").unlink(),
    "the sums are gone": lambda f: (f / checkpoint.CHECKSUMS).unlink(),
    "the sums are torn": lambda f: (f / checkpoint.CHECKSUMS).write_text('{"state.json": "12'),
    "the sums are no map": lambda f: (f / checkpoint.CHECKSUMS).write_text("[1, 2]"),
    "a file has become a folder": lambda f: (
        (f / "state.json").unlink(),
        (f / "state.json").mkdir(),
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    tmp_path: Path, what: str
) -> None:
    write(tmp_path, 1)
    DAMAGE[what](write(tmp_path, 2))  # type: ignore[no-untyped-call]
    found, said = newest(tmp_path)
    assert found == "step-000000001"
    (line,) = said
    assert line.startswith("checkpoint step-000000002 is damaged")
    assert "\n" not in line


def test_when_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / checkpoint.CHECKSUMS).unlink()
    found, said = newest(tmp_path)
    assert found is None
    assert len(said) == 2


def test_a_kill_in_the_middle_of_writing_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def die(folder: Path) -> None:
        (folder / "state.json").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path, 2, die)
    assert newest(tmp_path) == ("step-000000001", [])
    write(tmp_path, 2)
    assert newest(tmp_path)[0] == "step-000000002"
    assert not (tmp_path / ".writing").exists()


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "work" / "stream"
    for text in ("a", "b"):
        stream = Stream(path)
        stream.append("text", {"text": text})
        stream.close()
    end, records = whole_records(path)
    assert end == path.stat().st_size
    assert [(r["kind"], r["text"]) for r in records] == [("text", "a"), ("text", "b")]
    assert all(r["at"] > 1e9 for r in records)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_stream_with_garbage_at_its_end_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    stream = Stream(path)
    stream.append("text", {"text": "a"})
    stream.close()
    good = path.stat().st_size
    for tail in (b"\x00", b"\x00\x00\x00\x05ab", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02\xc1\xc1"):
        with path.open("ab") as f:
            f.write(tail)
        again = Stream(path)
        again.close()
        assert path.stat().st_size == good, tail


def test_records_wait_in_their_order_for_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    in_the_way = tmp_path / "work"
    in_the_way.write_text("no folder can be made here")
    stream = Stream(in_the_way / "stream")
    for n in range(5):
        stream.append("text", {"n": n})
    assert stream.behind
    assert not stream.flush()
    assert stream.trouble
    in_the_way.unlink()
    stream.append("text", {"n": 5})
    assert not stream.behind
    _, records = whole_records(tmp_path / "work" / "stream")
    assert [r["n"] for r in records] == list(range(6))
    stream.close()


def test_when_too_much_waits_progress_is_dropped_and_said_and_text_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.drivers.worker.stream.WAITING_BYTES", 10_000)
    in_the_way = tmp_path / "work"
    in_the_way.write_text("")
    stream = Stream(in_the_way / "stream")
    for n in range(300):
        stream.append("progress", {"n": n, "x": "x" * 50})
        stream.append("text", {"n": n})
    in_the_way.unlink()
    assert stream.flush()
    _, records = whole_records(tmp_path / "work" / "stream")
    kept = [r["n"] for r in records if r["kind"] == "progress"]
    assert [r["n"] for r in records if r["kind"] == "text"] == list(range(300))
    assert kept == list(range(300 - len(kept), 300)), "the oldest go first"
    (note,) = [r["text"] for r in records if r["kind"] == "note"]
    assert note.startswith(f"{300 - len(kept)} reports")
    stream.close()
