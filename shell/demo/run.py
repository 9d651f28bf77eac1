"""The demo: a language model, a GAN and a user in a hurry share one machine.

Everything goes through the same calls as any user's work, on real data, and everything that is
printed comes from the kernel's answers. Each part is boxed in wall time.
"""

from __future__ import annotations

import shutil
import statistics
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmos.kernel.errors import LlmosError, NoSuchThing
from llmos.shell.client import Client, Record, check_ended
from llmos.shell.context import Context
from llmos.shell.demo import material
from llmos.shell.demo.picture import draw
from llmos.shell.home import Home
from llmos.shell.launch import boot, running, wait_gone
from llmos.shell.render import Column, count, size, table

# Wall-clock boxes: 40 + 82 s of training, the rest is booting, asking and ending; in all about
# 135 s on two quiet cores. After LAST_S nothing new is begun.
PRETRAIN_S, FINETUNE_S, GAN_S = 40.0, 82.0, 128.0
LAST_S = 200.0

# 1.8 million parameters: what two cores can teach something in 40 seconds.
MODEL: dict[str, Any] = {
    "steps": 100_000, "vocab_size": 2048, "width": 192, "layers": 3, "heads": 3, "context": 96,
    "batch": 8, "lr": 3e-3,
}  # fmt: skip

TABLE_EVERY_S = 15.0
ASKED = 20  # questions of each kind
ASK_TOKENS = 40

IMPATIENT = ("The for statement", "A class definition", "The return value of")


class Demo:
    def __init__(self, ctx: Context, home: Home) -> None:
        self.ctx, self.home = ctx, home
        self.began = time.monotonic()
        self.seen_events = 0
        self.first_token_s: list[float] = []
        self.preemptions: list[Record] = []
        self.hold_s: list[float] = []
        self._taken_at: dict[int, float] = {}

    # ---- the story ----

    def run(self) -> int:
        self.say(f"A kernel of its own boots in {self.home.path}")
        with self.kernel() as client:
            data = self.home.path / "demo-data"
            asked = self.write(data)
            gan = self.submit(client, "gan", data=str(data / "digits.npz"), out="digits", nice=10,
                              time_limit_s=GAN_S, steps=0)  # fmt: skip
            self.pretrain(client, data)
            self.finetune(client, data)
            self.ask(client, asked)
            self.finish_gan(client, gan)
            self.account(client)
        self.goodbye()
        return 0

    def write(self, data: Path) -> list[material.Question]:
        data.mkdir(exist_ok=True)
        text_bytes = material.write_text(data / "python-docs.txt")
        asked = material.questions()
        pairs = material.write_pairs(data / "questions.jsonl", asked)
        digits = material.write_digits(data / "digits.npz")
        self.say(
            f"Material of this machine: {size(text_bytes)} of Python's documentation, "
            f"{pairs} questions about the standard library ({len(asked) - pairs} more are held "
            f"out), {digits} handwritten digits"
        )
        return asked

    def pretrain(self, client: Client, data: Path) -> None:
        self.head(
            "Pretraining a language model on the documentation; a GAN learns digits beside it"
        )
        pid = self.submit(client, "pretrain", data=str(data / "python-docs.txt"), out="docs",
                          time_limit_s=PRETRAIN_S, **MODEL)  # fmt: skip
        self.watch(client, pid, {0.35: IMPATIENT[0], 0.6: IMPATIENT[1], 0.85: IMPATIENT[2]}, "docs")

    def finetune(self, client: Client, data: Path) -> None:
        self.head("Fine-tuning it on questions and answers, while the GAN goes on")
        pid = self.submit(client, "finetune", model="docs", data=str(data / "questions.jsonl"),
                          out="answers", time_limit_s=FINETUNE_S, steps=100_000, batch=16,
                          lr=3e-3, weight_decay=0.0, val_fraction=0.0)  # fmt: skip
        self.watch(client, pid, {0.4: "What does math.gcd do?", 0.8: "What does math.gcd do?"},
                   "answers")  # fmt: skip

    def ask(self, client: Client, asked: list[material.Question]) -> None:
        self.head("Asking: questions it was trained on, and held-out ones that it never saw")
        scores: dict[bool, list[float]] = {True: [], False: []}
        for seen in (True, False):
            chosen = [q for q in asked if q.seen is seen]
            for q in chosen[:: max(1, len(chosen) // ASKED)][:ASKED]:
                if self.elapsed() > LAST_S:
                    self.say("  (out of time: the rest is not asked)")
                    break
                answer = self.answer(client, "answers", q.prompt)
                scores[seen].append(material.token_f1(answer, q.answer))
                if len(scores[seen]) <= 4:
                    self.show_answer(q, answer, scores[seen][-1])
        for seen, label in ((True, "seen in training"), (False, "held out, unseen")):
            if scores[seen]:
                mean = statistics.mean(scores[seen])
                self.say(f"  token-F1, {label:<17} {mean:.2f}   ({len(scores[seen])} questions)")
        self.say(
            "  A model this small remembers; it does not know. Unseen answers only sound right."
        )

    def finish_gan(self, client: Client, pid: int) -> None:
        self.head("The digits that the GAN draws")
        ended = client.wait(pid, timeout_s=max(1.0, LAST_S - self.elapsed()))
        check_ended(pid, ended)
        picture = Path(ended["result"]["folder"]) / "samples.png"
        colour = self.ctx.stdout_is_terminal
        self.ctx.lines("  " + line for line in draw(picture, 72, 36, colour))
        self.say(f"  after {ended['result']['steps']} updates: {picture}")

    def account(self, client: Client) -> None:
        self.head("The books, from the kernel's records")
        self.collect(client)
        processes = client.ps(all=True)
        self.print_table([p for p in processes if p["role"] == "process"])
        answers = [p for p in processes if p["role"] == "guest"]
        spent = sum(p["device_seconds"] for p in answers)
        self.say(f"  and {len(answers)} answers in {spent:.1f} s of device time, loading included")
        device = client.mem()[0]
        self.say(
            f"  {device['device']}: foreign {size(device['foreign_bytes'])} + promised "
            f"{size(device['promised_bytes'])} + free {size(device['free_bytes'])} = capacity "
            f"{size(device['capacity_bytes'])}"
        )
        self.print_preemptions()

    def goodbye(self) -> None:
        self.head(f"Done in {self.elapsed():.0f} s. To go on from here:")
        self.ctx.lines(
            (
                f"  LLMOS_HOME={self.home.path} llmos",
                "                            the interactive shell on this home; in it:",
                '      run answers "What does heapq.merge do?"',
                "      chat answers",
                "      models",
                "  llmos pretrain YOUR.txt --out mine",
                "                            the same with your own text, in your own home",
                "  llmos demo --clean        removes the home of the demo",
            )
        )

    # ---- its parts ----

    @contextmanager
    def kernel(self) -> Iterator[Client]:
        """A kernel that is ended again, whatever happens; the home stays."""
        status = boot(self.home)
        try:
            with Client(self.home.path) as client:
                yield client
                client.shutdown()
        finally:
            stop(self.home)
            wait_gone(status["kernel"]["os_pid"], 60.0)

    def submit(self, client: Client, program: str, nice: int = 0, **args: Any) -> int:
        pid = client.submit(program, {"overwrite": True, **args}, nice=nice)
        self.say(f"  process {pid}: {program} -> {args['out']}")
        return pid

    def watch(self, client: Client, pid: int, asks: dict[float, str], model: str) -> None:
        """Show a training until it ends; a user asks its newest state in between."""
        limit = PRETRAIN_S if model == "docs" else FINETUNE_S
        began = next_table = time.monotonic()
        pending = sorted(asks.items())
        while True:
            try:
                ended = client.wait(pid, timeout_s=0.5)
                break
            except LlmosError as exc:
                if exc.code != "timed-out":
                    raise
            self.collect(client)
            now = time.monotonic()
            if now >= next_table and now - began > 3:
                self.print_table(client.ps())
                next_table = now + TABLE_EVERY_S
            if pending and now - began > pending[0][0] * limit:
                self.impatient(client, pid, model, pending.pop(0)[1])
        check_ended(pid, ended)
        if "perplexity" in ended["result"]:
            self.say(
                f"  {model} is done: validation perplexity {ended['result']['perplexity']:.1f}"
            )
        else:
            self.say(f"  {model} is done")

    def impatient(self, client: Client, pid: int, model: str, prompt: str) -> None:
        """Somebody does not want to wait: the model as it stands answers, the training goes on."""
        try:
            step = client.checkpoint(pid)["step"]
            text = self.answer(client, model, prompt, keep_alive_s=0.0)
        except (LlmosError, NoSuchThing) as exc:
            self.say(f"  a user was too late: {exc}")
            return
        first = self.first_token_s[-1] * 1000
        self.say(
            f"  a user asks {model} as it stands (step {step}; first token after {first:.0f} ms):"
        )
        self.say(f"    {prompt} | {one_line(text)}")

    def answer(self, client: Client, model: str, prompt: str, **args: Any) -> str:
        asked_at, text = time.monotonic(), ""
        for piece in client.run(model, prompt, temperature=0.0, max_tokens=ASK_TOKENS, **args):
            if not text:
                self.first_token_s.append(time.monotonic() - asked_at)
            text += piece
        return text.strip()

    def show_answer(self, q: material.Question, answer: str, score: float) -> None:
        label = "seen  " if q.seen else "unseen"
        self.say(f"  [{label}] {q.prompt}  F1 {score:.2f}")
        self.say(f"           {one_line(answer)}")

    def collect(self, client: Client) -> None:
        """Read the kernel's record of decisions since the last time."""
        for event in client.events(self.seen_events):
            self.seen_events = event["seq"]
            if event["what"] == "preempted":
                self.preemptions.append(event)
                self._taken_at[event["pid"]] = event["at"]
            elif event["what"] == "held" and event["pid"] in self._taken_at:
                self.hold_s.append(event["at"] - self._taken_at.pop(event["pid"]))

    def print_table(self, processes: list[Record]) -> None:
        columns = (
            Column("PID", right=True), Column("PROGRAM"), Column("NAME", shrink=6),
            Column("STATE"), Column("NI", right=True), Column("DEV-S", right=True),
            Column("PROMISED", right=True), Column("MEASURED", right=True),
            Column("PREEMPT", right=True), Column("STEP", right=True),
        )  # fmt: skip
        shown = [p for p in processes if p["role"] != "service"]
        rows = [
            (
                str(p["pid"]), p["program"], p["name"], p["state"], str(p["nice"]),
                f"{p['device_seconds']:.1f}", size(p["memory"]["promised_bytes"]),
                size(p["memory"]["peak_bytes"]), str(p["preemptions"]),
                count(p["progress"]["step"]) if p["progress"] else "-",
            )
            for p in shown
        ]  # fmt: skip
        self.ctx.lines("  " + line for line in table(columns, rows, self.ctx.width - 2))

    def print_preemptions(self) -> None:
        if not self.preemptions:
            self.say("  no process was preempted")
            return
        median = statistics.median(self.hold_s) * 1000 if self.hold_s else 0.0
        self.say(
            f"  {len(self.preemptions)} preemptions; the trainer was off the device after "
            f"{median:.1f} ms (median)"
        )
        for victim, by in grouped(self.preemptions):
            self.say(f"    process {victim} gave way to {', '.join(map(str, by))}")

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def head(self, text: str) -> None:
        self.say("")
        self.say(f"[{self.elapsed():5.1f} s] {text}")

    def say(self, text: str) -> None:
        indent = text[: len(text) - len(text.lstrip())]
        wrapped = textwrap.wrap(text, self.ctx.width, subsequent_indent=indent + "  ")
        self.ctx.lines(wrapped or [""])


def grouped(preemptions: list[Record]) -> list[tuple[int, list[int]]]:
    """Preemptions by victim, in the order in which they began."""
    found: dict[int, list[int]] = {}
    for event in preemptions:
        found.setdefault(event["pid"], []).append(event["by"])
    return list(found.items())


def one_line(text: str, width: int = 66) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def stop(home: Home) -> None:
    """End the kernel of a home, if one runs."""
    status = running(home)
    if status is None:
        return
    try:
        with Client(home.path) as client:
            client.shutdown()
    except LlmosError:
        return  # it ended while it was asked to
    wait_gone(status["kernel"]["os_pid"], 60.0)


def clean(ctx: Context, home: Home) -> int:
    """Remove the demo's home; its kernel is ended first."""
    if not home.path.exists():
        ctx.print(f"there is nothing to remove: {home.path} does not exist")
        return 0
    if not (home.path / "demo-data").is_dir():
        raise LlmosError(f"{home.path} is not a home that the demo made", "remove it by hand")
    stop(home)
    shutil.rmtree(home.path)
    ctx.print(f"removed {home.path}")
    return 0
