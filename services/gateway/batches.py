"""/v1/batches: the lines of a file as requests of the idle class; they go on after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from starlette.requests import Request
from starlette.responses import Response

from llmos.services.gateway import lines
from llmos.services.gateway.errors import ApiError, api_error, bad
from llmos.services.gateway.fields import Fields
from llmos.services.gateway.files import Files
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.lines import Damaged, Line
from llmos.services.gateway.run import Runner, Whose
from llmos.services.gateway.store import Record, Store, page, shown
from llmos.services.gateway.web import answer, read_json

CLASS = "idle"

# States of a batch that is not at its end.
OPEN = ("validating", "in_progress", "finalizing", "cancelling")

MOST_DAMAGED = 50  # that are named; of a file that is none at all, some are enough

# How often the counts of a batch that runs are written down.
SAVE_S = 1.0

_WINDOW = re.compile(r"(\d{1,3})(h|d)")


class Batches:
    def __init__(self, folder: Path, files: Files, runner: Runner, at_once: int) -> None:
        self.store = Store(folder, "batch")
        self.files, self.runner = files, runner
        self.room = asyncio.Semaphore(at_once)
        self.at_once = at_once
        self._running: dict[str, asyncio.Task[None]] = {}

    # ---- over HTTP ----

    async def create(self, request: Request, whose: Whose) -> Response:
        f = Fields(await read_json(request))
        file = f.text("input_file_id", required=True)
        endpoint = f.choice("endpoint", lines.URLS, "")
        window = f.text("completion_window", "24h")
        f.ignore("output_expires_after")
        metadata = f.map("metadata") or None
        f.done()
        found = _WINDOW.fullmatch(window)
        if found is None:
            raise bad("completion_window", f"Invalid value for 'completion_window': expected hours "
                      f"or days, such as '24h' or '7d', got {window!r}.")  # fmt: skip
        self.files.content(file, whose)
        now = int(time.time())
        made = self.store.make(
            {
                "id": new_id("batch"), "object": "batch", "endpoint": endpoint, "errors": None,
                "input_file_id": file, "completion_window": window, "status": "validating",
                "output_file_id": None, "error_file_id": None, "created_at": now,
                "expires_at": now + int(found[1]) * (3600 if found[2] == "h" else 86400),
                "in_progress_at": None, "finalizing_at": None, "completed_at": None,
                "failed_at": None, "expired_at": None, "cancelling_at": None, "cancelled_at": None,
                "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": metadata,
            },
            whose,
        )  # fmt: skip
        self._begin(made)
        return answer(shown(made))

    async def listed(self, request: Request, whose: Whose) -> Response:
        found = await asyncio.to_thread(self.store.of, whose)
        return answer(page(found, request.query_params))

    async def one(self, name: str, whose: Whose) -> Response:
        return answer(shown(self.store.load(name, whose)))

    async def cancel(self, name: str, whose: Whose) -> Response:
        found = self.store.load(name, whose)
        if found["status"] not in OPEN:
            raise bad(None, f"Batch {name} has ended already: it is {found['status']}.")
        if found["status"] != "cancelling":
            found |= {"status": "cancelling", "cancelling_at": int(time.time())}
            self.store.save(found)
        self._begin(found)
        return answer(shown(found))

    # ---- running them ----

    def resume(self) -> None:
        """At the start: those that an earlier server had begun go on."""
        for found in self.store.every():
            if found["status"] in OPEN:
                self._begin(found)

    async def close(self) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _begin(self, found: Record) -> None:
        """Run it, from wherever it is; one that runs is interrupted, and looks what is wanted."""
        name = found["id"]
        before = self._running.get(name)
        if before is not None:
            before.cancel()

        async def run() -> None:
            if before is not None:
                await asyncio.gather(before, return_exceptions=True)
            await _Run(self, found).run()

        task = asyncio.ensure_future(run())
        self._running[name] = task
        task.add_done_callback(lambda _: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._running.get(name) is task:
            del self._running[name]

    def whose(self, found: Record) -> Whose:
        return Whose(found["owner"], found["owner"], patient=True)


class _Run:
    """One batch, from where it is to its end."""

    def __init__(self, batches: Batches, found: Record) -> None:
        self._b, self._found = batches, found
        self._whose = batches.whose(found)
        self._outputs = batches.store.path(found["id"], "output.jsonl")
        self._errors = batches.store.path(found["id"], "errors.jsonl")
        self._saved_at = 0.0
        self._done: set[str] = set()

    async def run(self) -> None:
        try:
            if self._found["status"] == "validating":
                await asyncio.to_thread(self._validate)
            self._done = await asyncio.to_thread(self._count)
            if self._found["status"] == "in_progress":
                await self._ask_all()
            if self._found["status"] == "cancelling":
                self._finish("cancelled")
            elif self._found["status"] == "finalizing":
                self._finish("expired" if self._found["expired_at"] else "completed")
        except Exception as exc:  # noqa: BLE001  it is told by the batch
            self._fail([{"code": "failed", "message": api_error(exc).message, "line": None}])

    def _validate(self) -> None:
        """Every line is looked at before any is asked."""
        damaged, total = [], 0
        for line in self._lines():
            total += 1
            if isinstance(line, Line) and line.url != self._found["endpoint"]:
                why = f"url is {line.url}, and the batch's endpoint is {self._found['endpoint']}"
                damaged.append(Damaged(line.number, why))
            elif isinstance(line, Damaged):
                damaged.append(line)
            if len(damaged) >= MOST_DAMAGED:
                break
        if damaged or not total:
            told = damaged or [Damaged(1, "the file has no lines")]
            self._fail([{"code": "invalid_line", "message": d.why, "line": d.number, "param": None}
                        for d in told])  # fmt: skip
            return
        self._found["request_counts"]["total"] = total
        self._save(status="in_progress", in_progress_at=int(time.time()))

    def _count(self) -> set[str]:
        """What is answered already, by an earlier server too."""
        if self._found["output_file_id"] or self._found["error_file_id"]:
            return set()  # they are files by now, and the counts are right
        succeeded, failed = set(lines.answered(self._outputs)), set(lines.answered(self._errors))
        self._found["request_counts"] |= {"completed": len(succeeded), "failed": len(failed)}
        return succeeded | failed

    def _lines(self) -> Iterator[Line | Damaged]:
        return lines.read(self._b.files.content(self._found["input_file_id"], self._whose))

    async def _ask_all(self) -> None:
        counts = self._found["request_counts"]
        left = (x for x in self._lines() if isinstance(x, Line) and x.id not in self._done)
        with self._outputs.open("a") as outputs, self._errors.open("a") as errors:

            async def ask(line: Line) -> None:
                async with self._b.room:
                    told = await self._ask(line)
                well = (told["response"] or {}).get("status_code") == 200
                _append(outputs if well else errors, told)
                counts["completed" if well else "failed"] += 1
                if time.monotonic() > self._saved_at + SAVE_S:
                    self._save()

            await lines.run_all(left, ask, self._b.at_once)
        self._save(status="finalizing", finalizing_at=int(time.time()))

    async def _ask(self, line: Line) -> Record:
        if time.time() > self._found["expires_at"]:
            self._found["expired_at"] = int(time.time())
            return lines.expired(line, "batch_expired", "The window of the batch had ended.")
        try:
            return await lines.ask(self._b.runner, line, self._whose, cls=CLASS)
        except ApiError as exc:
            body = {"status_code": exc.status, "request_id": "", "body": exc.body()}
            return {"id": new_id("batch_req"), "custom_id": line.id, "response": body,
                    "error": None}  # fmt: skip

    def _finish(self, status: str) -> None:
        """The results become files."""
        for key, path in (("output_file_id", self._outputs), ("error_file_id", self._errors)):
            if path.exists() and path.stat().st_size:
                # Named first: whoever finds the name and no file makes it from what is there.
                self._found[key] = self._found[key] or new_id("file")
                self._b.store.save(self._found)
            if self._found[key]:
                name = f"{self._found['id']}_{path.name}"
                self._b.files.adopt(self._found[key], path, name, "batch_output", self._whose)
        self._save(status=status, **{f"{status}_at": int(time.time())})

    def _fail(self, errors: list[Record]) -> None:
        told = {"object": "list", "data": errors}
        self._save(status="failed", failed_at=int(time.time()), errors=told)

    def _save(self, **changes: Any) -> None:
        self._found |= changes
        self._saved_at = time.monotonic()
        with contextlib.suppress(OSError):  # of a full disk: the results are what counts
            self._b.store.save(self._found)


def _append(file: TextIO, told: Record) -> None:
    file.write(json.dumps(told, ensure_ascii=False) + "\n")
    file.flush()
