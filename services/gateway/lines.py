"""Requests as lines of a file: what `llmos batch` and /v1/batches share.

A line is one of OpenAI's batches, {custom_id, method, url, body}, or a body alone, {prompt} or
{messages} with whatever else is said of it; then its number in the file is its name.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadInput, NoKernel
from llmos.services.gateway import asked as requests
from llmos.services.gateway import chat, completions, embeddings
from llmos.services.gateway.errors import ApiError, api_error
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.run import Runner, Whose

Record = dict[str, Any]

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")

# A line that cannot be served now (the kernel is away, or full) is tried again after a while.
TRIES = 8
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


@dataclass(frozen=True)
class Line:
    number: int  # in the file, from 1
    id: str
    url: str
    body: Record


@dataclass(frozen=True)
class Damaged:
    """A line that is no request."""

    number: int
    why: str


def read(path: Path) -> Iterator[Line | Damaged]:
    """The lines of a file, also of a .gz; empty ones are left out. Raises OSError, EOFError."""
    seen: dict[str, int] = {}
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = understand(number, json.loads(raw))
            except (ValueError, RecursionError) as exc:
                yield Damaged(number, f"not JSON: {exc}")
                continue
            except ApiError as exc:
                yield Damaged(number, exc.message)
                continue
            if line.id in seen:
                yield Damaged(number, f"custom_id {line.id!r} is also that of line {seen[line.id]}")
                continue
            seen[line.id] = number
            yield line


def understand(number: int, row: Any) -> Line:
    """Raises ApiError for what is no request; what is wrong inside of one is told by its answer."""
    if not isinstance(row, dict):
        raise ApiError(400, "a line is a JSON object")
    if "body" not in row:
        return _alone(number, row)
    url, name, body = row.get("url"), row.get("custom_id"), row["body"]
    if not isinstance(name, str) or not name or not _is_text(name):
        raise ApiError(400, "custom_id is missing: a text that no other line has")
    if row.get("method", "POST") != "POST":
        raise ApiError(400, f"method is POST, not {row['method']!r}")
    if url not in URLS:
        raise ApiError(400, f"url is one of {', '.join(URLS)}, not {url!r}")
    if not isinstance(body, dict):
        raise ApiError(400, "body is a JSON object")
    if body.get("stream"):
        raise ApiError(400, "a batch does not stream")
    unknown = row.keys() - {"custom_id", "method", "url", "body"}
    if unknown:
        raise ApiError(400, f"{min(unknown)!r} is no field of a line with a body")
    return Line(number, name, url, body)


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _alone(number: int, row: Record) -> Line:
    """A line that is a body itself."""
    body = dict(row)
    name = body.pop("custom_id", body.pop("id", f"line-{number}"))
    kinds = {"messages": URLS[0], "prompt": URLS[1], "input": URLS[2]}
    found = [kind for kind in kinds if kind in body]
    if len(found) != 1:
        raise ApiError(400, "a line has a body, or one of prompt, messages and input")
    if not _is_text(str(name)):
        raise ApiError(400, "its id is no text")
    return Line(number, str(name), kinds[found[0]], body)


# ---- answers ----


async def ask(runner: Runner, line: Line, whose: Whose, nice: int = 0, cls: str = "") -> Record:
    """The answer to one line, in the form of OpenAI's batches. What fails for now is tried again
    for a while; raises ApiError when that is of no use."""
    wait_s, tries = FIRST_WAIT_S, 0
    while True:
        try:
            return _answer(line, 200, await _once(runner, line, whose, nice, cls))
        except Exception as exc:  # noqa: BLE001  it is the line's answer
            error = api_error(exc)
            if error.status < 500 and error.status != 429:
                return _answer(line, error.status, error.body())
            tries += not isinstance(exc, NoKernel)  # one that is away is waited for
            if tries == TRIES:
                raise error from None
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


async def _once(runner: Runner, line: Line, whose: Whose, nice: int, cls: str) -> Record:
    if line.url == URLS[2]:
        return await embeddings.whole(runner, requests.embedding(line.body), whose, nice, cls)
    is_chat = line.url == URLS[0]
    asked = requests.chat(line.body) if is_chat else requests.completion(line.body)
    asked.nice, asked.cls = asked.nice or nice, cls or asked.cls
    whole = chat.whole if is_chat else completions.whole
    return await whole(runner, asked, whose)


def _answer(line: Line, status: int, body: Record) -> Record:
    response = {"status_code": status, "request_id": new_id("req"), "body": body}
    return {"id": new_id("batch_req"), "custom_id": line.id, "response": response, "error": None}


def expired(line: Line, code: str, message: str) -> Record:
    """The answer to a line that was not asked."""
    error = {"code": code, "message": message}
    return {"id": new_id("batch_req"), "custom_id": line.id, "response": None, "error": error}


async def run_all(
    lines: Iterator[Line], ask_one: Callable[[Line], Awaitable[None]], at_once: int
) -> None:
    """Ask so many at a time, until all are asked. What `ask_one` raises ends it; when it is
    cancelled, so are those that are asked."""
    running: set[asyncio.Task[None]] = set()
    try:
        while (line := await asyncio.to_thread(next, lines, None)) is not None:
            running.add(asyncio.ensure_future(ask_one(line)))
            if len(running) >= at_once:
                running = await _some(running)
        while running:
            running = await _some(running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _some(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    done, left = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left


# ---- the file of the results ----


def answered(path: Path) -> dict[str, bool]:
    """Whose answers a file of results has, and whether each is one that went well. A torn last line
    is cut off: it is asked again.

    Raises BadInput for a file of something else.
    """
    found, whole = dict[str, bool](), 0
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return found
    with file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                break  # a line is written with its end
            try:
                said = json.loads(raw)
                status = (said.get("response") or {}).get("status_code", 200)
                found[str(said["custom_id"])] = status == 200
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(
                    f"{path}, line {number} is no answer of a batch",
                    "give another file for the results, or move that one away",
                ) from None
            whole += len(raw)
        file.truncate(whole)
    return found
