"""`llmos batch`: a file of requests, answered when nobody else wants the device."""

from __future__ import annotations

import subprocess
import sys

from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Values

DTYPES = ("auto", "float32", "bfloat16", "int8")


def run(ctx: Context, values: Values) -> int:
    # -P: a file in the user's folder must not shadow a module.
    command = [sys.executable, "-P", "-m", "llmos.services.gateway.offline"]
    command += ["--home", str(ctx.home.path), "--output", values["output"]]
    for name in ("model", "dtype", "class", "nice", "at_once"):
        if name in values:
            command.append(f"--{name.replace('_', '-')}={values[name]}")
    with subprocess.Popen([*command, "--", values["requests"]]) as process:
        while True:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                continue  # it is its, too: it says what is done, and ends
            return status


COMMAND = Command(
    name="batch",
    summary="Answer a file of requests when the device has time, into another file",
    run=run,
    options=(
        Option(
            "requests",
            "JSON lines: OpenAI's batches, or {prompt} or {messages} each; also .gz",
            positional=True,
            required=True,
            metavar="REQUESTS",
            complete="path",
        ),
        Option(
            "output",
            "where answers are appended; a line that has one is not asked again",
            short="-o",
            required=True,
            metavar="RESULTS",
            complete="path",
        ),
        Option("model", "for lines that name none", metavar="MODEL", complete="model"),
        Option("dtype", "number format of the weights", choices=DTYPES),
        Option(
            "class",
            "which processes it goes before; default: idle",
            choices=("interactive", "batch", "idle"),
        ),
        Option("nice", "-20 ... 19; lower is more important", type="int", minimum=-20, maximum=19),
        Option("at_once", "requests at a time; default: 32", type="int", minimum=1, maximum=1000),
    ),
    details="Answers are in the form of OpenAI's batches, one line each, as they come. Ctrl-C "
    "keeps what is done; the same command goes on. Damaged lines are named, the others answered; "
    "the exit status is then 1.",
    examples=(
        "llmos batch requests.jsonl -o results.jsonl --model smollm2",
        "llmos batch requests.jsonl.gz -o results.jsonl --class batch --at-once 64",
    ),
)
