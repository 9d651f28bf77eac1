"""Lines of a batch, and the file of their answers."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel.errors import BadInput
from llmos.services.gateway import lines
from llmos.services.gateway.errors import ApiError
from llmos.services.gateway.fine_tuning import convert
from llmos.services.gateway.lines import Damaged, Line


def line(**more: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}, **more}


@pytest.mark.parametrize(
    ("row", "made"),
    [
        (line(), Line(7, "a", "/v1/completions", {})),
        ({"prompt": "x", "n": 2}, Line(7, "line-7", "/v1/completions", {"prompt": "x", "n": 2})),
        ({"messages": [], "id": 3}, Line(7, "3", "/v1/chat/completions", {"messages": []})),
        ({"input": "x", "custom_id": "e"}, Line(7, "e", "/v1/embeddings", {"input": "x"})),
    ],
)
def test_a_line_is_one_of_openais_or_a_body(row: Any, made: Line) -> None:
    assert lines.understand(7, row) == made


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([], "object"),
        ({}, "one of prompt, messages and input"),
        ({"prompt": "x", "messages": []}, "one of prompt"),
        (line(custom_id=None), "custom_id"),
        (line(custom_id="\ud800"), "custom_id"),
        (line(method="GET"), "method"),
        (line(url="/v1/models"), "url"),
        (line(body=[]), "body"),
        (line(body={"stream": True}), "stream"),
        (line(extra=1), "'extra'"),
    ],
)
def test_what_is_no_request_says_why(row: Any, why: str) -> None:
    with pytest.raises(ApiError, match=why):
        lines.understand(1, row)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_a_file_is_read_to_its_end_whatever_is_in_it(tmp_path: Path, name: str) -> None:
    text = "\n".join([json.dumps(line()), "", "{", json.dumps(line()), '{"prompt": "x"}']).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    found = list(lines.read(tmp_path / name))
    assert [(type(x), x.number) for x in found] == [
        (Line, 1), (Damaged, 3), (Damaged, 4), (Line, 5)
    ]  # fmt: skip
    assert isinstance(found[2], Damaged)
    assert "also that of line 1" in found[2].why


def test_a_torn_last_answer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert lines.answered(path) == {}
    path.write_text('{"custom_id": "a"}\n{"custom_id": "b"}\n{"custom_id": "c"}')
    assert lines.answered(path) == {"a": True, "b": True}
    assert path.read_text() == '{"custom_id": "a"}\n{"custom_id": "b"}\n'
    path.write_text("a poem\n")
    with pytest.raises(BadInput, match="line 1"):
        lines.answered(path)
    assert path.read_text() == "a poem\n"


def test_so_many_are_asked_at_once_and_what_fails_ends_the_others() -> None:
    active = most = 0
    full = asyncio.Event()

    async def ask(one: Line) -> None:
        nonlocal active, most
        active += 1
        most = max(most, active)
        try:
            if active == 3:
                full.set()
            await full.wait()
            if one.number == 9:
                raise ApiError(500, "oops")
        finally:
            active -= 1

    def some(count: int) -> Any:
        return iter([Line(n, str(n), "", {}) for n in range(count)])

    asyncio.run(lines.run_all(some(9), ask, 3))
    assert (active, most) == (0, 3)
    with pytest.raises(ApiError, match="oops"):
        asyncio.run(lines.run_all(some(100), ask, 3))
    assert active == 0


def test_chats_become_what_finetune_reads(tmp_path: Path) -> None:
    from llmos.services.data.base import Dialogue
    from llmos.services.data.text import JsonlSource

    rows = [
        {"messages": [{"role": "developer", "content": "be kind"},
                      {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                      {"role": "assistant", "content": "ho", "weight": 1}], "tools": []},
        {"prompt": "a", "completion": "b"},
    ]  # fmt: skip
    source, target = tmp_path / "in", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    convert(source, target)
    assert list(JsonlSource.read(target)) == [
        Dialogue((("system", "be kind"), ("user", "hi"), ("assistant", "ho"))),
        Dialogue((("user", "a"), ("assistant", "b"))),
    ]
    source.write_text("\n")
    with pytest.raises(ApiError, match="no lines"):
        convert(source, tmp_path / "other")
