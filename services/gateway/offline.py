"""`llmos batch`: the lines of a file, answered into another, without a gateway.

    python -P -m llmos.services.gateway.offline REQUESTS --output RESULTS [--home HOME]
        [--model NAME] [--dtype TYPE] [--class idle] [--nice N] [--at-once N]

Each answer is a line of RESULTS as soon as it is there; what has one is not asked again. Exit
status: 0 every line was answered well; 1 some were not, or are damaged; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from llmos.kernel.errors import BadInput, Busy, LlmosError
from llmos.services.gateway import lines
from llmos.services.gateway.errors import ApiError
from llmos.services.gateway.kernel import Kernel
from llmos.services.gateway.lines import Damaged, Line
from llmos.services.gateway.run import Runner, Whose

Record = dict[str, Any]

SHOW_S = 0.25  # how often the line of progress is drawn

EXIT_FAILED, EXIT_INTERRUPTED = 1, 128


class Tally:
    """What was done so far; also who counts the tokens (llmos.services.gateway.run.Meter)."""

    def __init__(self, total: int, before: int, terminal: bool) -> None:
        self.total, self.done, self.before = total, before, before
        self.failed = self.damaged = self.tokens = 0
        self.kept_failures = 0  # of those that failed: whose error is in the results
        self._began_s = time.monotonic()
        self._terminal = terminal
        self._shown_s = 0.0

    def pace(self, endpoint: str, began_at: float) -> Callable[[float], None]:
        return lambda at: None

    def spent(self, result: Record) -> None:
        self.tokens += int(result.get("tokens") or 0)

    def said(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._began_s)
        made = self.done - self.before
        parts = [f"{self.done - self.kept_failures:,} of {self.total:,} answered"]
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.damaged:
            parts.append(f"{self.damaged:,} damaged")
        if made:
            parts.append(f"{self.tokens / seconds:,.0f} tokens/s")
        left = self.total - self.done - self.damaged
        if made and left > 0:
            parts.append(f"about {left * seconds / made:,.0f} s left")
        return ", ".join(parts)

    def show(self) -> None:
        if self._terminal and time.monotonic() > self._shown_s + SHOW_S:
            self._shown_s = time.monotonic()
            sys.stderr.write(f"\r\x1b[K{self.said()}")
            sys.stderr.flush()

    def tell(self, text: str) -> None:
        """A line for the person, above the one of progress."""
        sys.stderr.write(("\r\x1b[K" if self._terminal else "") + text + "\n")
        sys.stderr.flush()


class Batch:
    def __init__(self, options: argparse.Namespace, results: TextIO, done: dict[str, bool]) -> None:
        self._options = options
        self._results, self._done = results, done
        total = sum(1 for _ in lines.read(options.requests))
        self.tally = Tally(total, 0, sys.stderr.isatty())

    async def run(self) -> int:
        kernel = Kernel(self._options.home, float("inf"), open_s=0.0)
        self._runner = Runner(kernel, self.tally, self._options.dtype)
        try:
            await kernel.ask(lambda line: line.ping())  # one that is not there is told at once
            await lines.run_all(self._left(), self._ask, self._options.at_once)
        finally:
            await kernel.close()
        self.tally.tell(self.tally.said())
        if self.tally.kept_failures:
            self.tally.tell(f"  {self._options.output} has what failed, and why; a line that is "
                            "deleted there is asked again")  # fmt: skip
        return EXIT_FAILED if self.tally.failed or self.tally.damaged else 0

    def _left(self) -> Iterator[Line]:
        """What has no answer yet. Damaged lines are named here."""
        for line in lines.read(self._options.requests):
            if isinstance(line, Damaged):
                self.tally.damaged += 1
                self.tally.tell(f"{self._options.requests}, line {line.number}: {line.why}")
            elif line.id in self._done:
                self.tally.done += 1
                self.tally.before += 1
                self._count_failure(self._done[line.id])
            else:
                yield line

    def _count_failure(self, went_well: bool) -> None:
        self.tally.failed += not went_well
        self.tally.kept_failures += not went_well

    async def _ask(self, line: Line) -> None:
        body = line.body
        if self._options.model and "model" not in body:
            line = Line(line.number, line.id, line.url, {**body, "model": self._options.model})
        try:
            told = await lines.ask(
                self._runner, line, Whose(patient=True), self._options.nice, self._options.cls
            )
        except ApiError as exc:  # it has no answer: the next run asks it again
            self.tally.failed += 1
            self.tally.tell(f"{self._options.requests}, line {line.number}: {exc.message}")
            return
        if told["response"]["status_code"] != 200:
            self._count_failure(False)
            message = told["response"]["body"]["error"]["message"]
            self.tally.tell(f"{self._options.requests}, line {line.number}: {message}")
        self._results.write(json.dumps(told, ensure_ascii=False) + "\n")
        self._results.flush()
        self.tally.done += 1
        self.tally.show()


def run(options: argparse.Namespace) -> int:
    """Raises LlmosError."""
    if not options.requests.is_file():
        raise BadInput(f"{options.requests} is no file", "give a file of JSON lines")
    if options.output.exists() and options.output.samefile(options.requests):
        raise BadInput("the results would be written over the requests", "choose another --output")
    with options.output.open("a") as results:
        try:
            fcntl.flock(results, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another `llmos batch` writes {options.output}") from None
        batch = Batch(options, results, lines.answered(options.output))
        status = asyncio.run(_until_signal(batch))
        os.fsync(results.fileno())
    return status


async def _until_signal(batch: Batch) -> int:
    """INT and TERM end it; what is answered by then stays."""
    work = asyncio.ensure_future(batch.run())
    caught: list[int] = []

    def end(number: int) -> None:
        caught.append(number)
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        return await work
    except asyncio.CancelledError:
        batch.tally.tell(f"{batch.tally.said()}; the same command goes on from here")
        return EXIT_INTERRUPTED + caught[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="llmos-batch")
    parser.add_argument("requests", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--class", dest="cls", default="idle")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--at-once", type=int, default=32)
    options = parser.parse_args()
    options.requests, options.output = options.requests.absolute(), options.output.absolute()
    try:
        return run(options)
    except LlmosError as exc:
        sys.stderr.write(f"llmos: {exc.message}\n" + (f"  {exc.hint}\n" if exc.hint else ""))
    except (OSError, EOFError) as exc:
        sys.stderr.write(f"llmos: {exc}\n")
    return EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
