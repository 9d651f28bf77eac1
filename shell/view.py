"""The records of one process on the terminal: text on stdout, progress and notes on stderr.

On a terminal progress is a bar that stays in place; elsewhere a line every few seconds. Of several
answers the first is shown as it is made, the others when it has ended.
"""

from __future__ import annotations

import sys
from collections import deque
from types import TracebackType
from typing import Any, Self

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.render import clean, count, duration, fit, number, size, speed
from llmos.shell.textout import TextOut, text_out

LINE_EVERY_S = 5.0  # where there is no bar: often enough to see that it lives
_RATE_STEPS = 50  # the rate that the ETA is made from is an average over so many reports

# How metrics are called on one line; those that are not named here keep their names.
_SHORT = {
    "tokens_per_s": "tok/s",
    "images_per_s": "img/s",
    "samples_per_s": "samples/s",
    "learning_rate": "lr",
    "loss_generator": "G",
    "loss_discriminator": "D",
    "generator_loss": "G",
    "discriminator_loss": "D",
}
_HIDDEN = frozenset({"lr", "epoch", "grad_norm", "learning_rate"})


class View:
    """Shows records one after the other; a context manager that leaves the terminal clean."""

    def __init__(
        self,
        ctx: Context,
        label: str,
        *,
        stats: bool = False,
        quiet: bool = False,
        unit: str = "step",
        markdown: bool = False,
    ) -> None:
        self._in_bytes = unit == "byte"
        self.made_text = False
        self.offset = 0  # in the stream, after the last record that was shown
        self._markdown = markdown
        self._quiet = quiet  # the process is a command that shows its own progress
        self.elapsed_s = 0.0
        self._ctx = ctx
        self._label = label
        self._stats = stats
        self._out: TextOut = text_out(ctx, markdown)
        self._later: dict[int, str] = {}  # answers that wait until the first one has ended
        self._several = False  # are there several, each with a heading?
        self._waiting = False  # is there a line that says what is waited for?
        self._pace: deque[tuple[float, int]] = deque(maxlen=_RATE_STEPS)
        self._began_at: float | None = None
        self._last_line_at = 0.0
        self._last: Record | None = None
        self._bar: Bar | None = None
        self._shown_last = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._last is not None and not self._shown_last:
            self._ctx.say(self._line(self._last))
        self._close_text()

    def show(self, record: Record) -> None:
        match record["kind"]:
            case "text":
                self._text(str(record["text"]), record.get("index"))
            case "output":
                self._output(int(record["fd"]), record["data"])
            case "progress":
                self._progress(record)
            case "note":
                self.note(str(record["text"]))
            case "sample":
                self.note(f"sample: {record.get('path', '')}")
            case "eval":
                self.note(f"evaluation: {metrics_line(record.get('metrics', {}))}")
            case "restored":
                self.note(f"goes on from its checkpoint at step {record.get('step', '?')}")
            case _:
                return  # a newer kernel may tell more than this shell can show

    def remember(self, record: Record) -> None:
        """Take a record into account that was there before, without showing it."""
        if record["kind"] == "progress":
            self._note_progress(record)
            self._shown_last = self._quiet
        elif record["kind"] == "text":
            self._text(str(record["text"]), record.get("index"))

    def wait_for(self, what: str) -> None:
        """Say on a terminal why there is no text yet, until there is some."""
        if self._ctx.stderr_is_terminal and not self.made_text:
            self._waiting = True
            _to_terminal(f"\r\x1b[K\x1b[2m{fit(clean(what), self._ctx.width - 1)}\x1b[0m")

    def _clear_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            _to_terminal("\r\x1b[K")

    def note(self, text: str) -> None:
        text = clean(text)
        self._clear_waiting()
        self._out.pause()
        if self._bar is not None:
            self._bar.print(text)
        else:
            self._ctx.say(text)

    def finish(self, pid: int, result: Record) -> None:
        """The process has ended well: show what it says at its end."""
        if not self.made_text:
            self._result(result)
        elif self._stats:
            self._ctx.say(answer_statistics(result))

    def _result(self, result: Record) -> None:
        took = f" in {duration(self.elapsed_s)}" if self.elapsed_s else ""
        self._ctx.say(f"{self._label} is done{took}")
        width = max((len(key) for key in result), default=0)
        self._ctx.lines(
            f"{key.ljust(width)}  {_plain(key, value)}" for key, value in result.items()
        )

    def _text(self, text: str, index: int | None) -> None:
        if not text:
            return
        self.made_text = True
        if index:
            self._later[index] = self._later.get(index, "") + text
            return
        self._clear_waiting()
        if index == 0 and not self._several:
            self._several = True
            self._heading(0)
        self._out.write(text)

    def _close_text(self) -> None:
        self._clear_waiting()
        self._out.close()
        if self._later and not self._several:
            self._heading(0)
        for index in sorted(self._later):
            self._ctx.print()
            self._heading(index)
            self._out.write(self._later[index])
            self._out.close()

    def _heading(self, index: int) -> None:
        line = f"--- answer {index + 1} ---"
        self._ctx.print(f"\x1b[2m{line}\x1b[0m" if self._markdown else line)

    def _output(self, fd: int, data: bytes) -> None:
        """A command's own bytes, unchanged, to where it wrote them."""
        stream = sys.stdout if fd == 1 else sys.stderr
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()

    def _progress(self, record: Record) -> None:
        self._note_progress(record)
        if self._quiet:
            return
        if self._ctx.stderr_is_terminal:
            if self._bar is None:
                self._bar = Bar(self._label)
            self._bar.update(
                int(record["step"]), record.get("total"), self._steps(record), self._details(record)
            )
            return
        self._shown_last = record["at"] - self._last_line_at >= LINE_EVERY_S
        if self._shown_last:
            self._last_line_at = record["at"]
            self._ctx.say(self._line(record))

    def _note_progress(self, record: Record) -> None:
        self._last = record
        self._began_at = record["at"] if self._began_at is None else self._began_at
        self.elapsed_s = record["at"] - self._began_at
        if self._pace and self._pace[-1][1] > record["step"]:
            self._pace.clear()  # the next part of the work
        self._pace.append((record["at"], int(record["step"])))

    def _line(self, record: Record) -> str:
        step = "" if self._in_bytes else "step "
        return f"{self._label}: {step}{self._steps(record)}  {self._details(record)}".rstrip()

    def _steps(self, record: Record) -> str:
        """How far it is: "12/300", or "31 MB/93 MB"."""
        show = size if self._in_bytes else str
        total = record.get("total")
        return f"{show(record['step'])}/{show(total)}" if total else show(record["step"])

    def _details(self, record: Record) -> str:
        parts = [metrics_line(record.get("metrics", {}))]
        if self._in_bytes:
            parts.append(self._speed())
        left = self._left_s(record)
        if left is not None:
            parts.append(f"eta {duration(left)}")
        return "  ".join(part for part in parts if part)

    def _speed(self) -> str:
        (at, done), (now, here) = self._pace[0], self._pace[-1]
        return f"{size(round((here - done) / (now - at)))}/s" if now > at else ""

    def _left_s(self, record: Record) -> float | None:
        """Seconds to the end at the recent pace, preemptions included."""
        (at, step), total = self._pace[0], record.get("total")
        done, took = record["step"] - step, record["at"] - at
        if not total or done <= 0 or took <= 0 or record["step"] >= total:
            return None
        return max(0.0, float((total - record["step"]) * took / done))


def _plain(key: str, value: Any) -> str:
    if key in ("bytes", "parameters") and isinstance(value, int):
        return size(value) if key == "bytes" else count(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def answer_statistics(result: Record) -> str:
    """ "31 tokens · first after 210 ms · 24.5 tokens/s": what an answer cost."""
    first, rate = result.get("first_token_s"), result.get("tokens_per_s")
    parts = [f"{result.get('tokens', 0)} tokens"]
    parts += [f"first after {first * 1000:.0f} ms"] if first is not None else []
    parts += [f"{speed(rate)} tokens/s"] if rate else []
    return " · ".join(parts)


def _to_terminal(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def metrics_line(metrics: dict[str, Any]) -> str:
    """ "loss 3.412  tok/s 15.2k": what a person watches."""
    parts = []
    for name, value in metrics.items():
        if name in _HIDDEN:
            continue
        text = count(value) if name.endswith("_per_s") else number(value)
        parts.append(f"{_SHORT.get(name, name)} {text}")
    return "  ".join(parts)


class Bar:
    """A progress bar on stderr; lines printed meanwhile appear above it."""

    def __init__(self, label: str) -> None:
        # Here and not above: rich costs more to import than most commands take to run.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[steps]}", markup=False),
            TextColumn("{task.fields[details]}", markup=False),
            console=self._console,
            refresh_per_second=5,
            redirect_stdout=False,
        )
        self._task = self._progress.add_task(label, total=None, steps="", details="")
        self._progress.start()

    def update(self, step: int, total: int | None, steps: str, details: str) -> None:
        self._progress.update(self._task, completed=step, total=total, steps=steps, details=details)

    def print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
