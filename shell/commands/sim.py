"""`llmos sim`: replay a trace on simulated devices. No kernel need run."""

from __future__ import annotations

import subprocess
import sys

from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Values

_OPTIONS = (
    Option("trace", "files with jobs or requests", positional=True, required=True, many=True,
           metavar="TRACE", complete="path"),
    Option("devices", "how many, what, and their memory (repeatable)", type="list",
           required=True, metavar="16xH100-80G"),
    Option("policy", "what orders them (repeatable); default: the kernel's", type="list",
           metavar="NAME"),
    Option("csv", "write the figures there", metavar="FILE", complete="path"),
    Option("picture", "draw them there (PNG)", metavar="FILE", complete="path"),
    Option("limit", "only the first N jobs", type="int", minimum=1),
    Option("scale_arrivals", "they come X times as fast", type="float", minimum=1e-6),
    Option("job_memory", "of a job that says none; default: a whole device", metavar="SIZE"),
    Option("resume_cost", "what going on after a move out costs", type="duration", minimum=0),
    Option("slice", "longest turn of a batch job, 10ms to 60s; live 500ms",
           type="duration", minimum=0.01, maximum=60),
    Option("passing", "how long a job that does not fit is passed", type="duration", minimum=0),
    Option("aging", "after which wait a job goes before others", type="duration", minimum=0),
    Option("oracle", "policies are told how long each job takes", type="bool"),
    Option("check", "check the kernel's books after every event (slow)", type="bool"),
    Option("seed", "of what is drawn", type="int"),
    Option("cluster", "philly: only this virtual cluster", metavar="ID"),
    Option("throughputs", "gavel: the file with steps per second", metavar="FILE",
           complete="path"),
    Option("gpu", "gavel: whose steps per second; default: v100", metavar="NAME"),
    Option("tokens", "servegen: the file with token counts", metavar="FILE", complete="path"),
    Option("jitter", "step times that slow gangs down", metavar="FILE", complete="path"),
    Option("prefill_rate", "prompt tokens a device reads a second; 20000", type="float",
           minimum=1e-6),
    Option("decode_rate", "tokens a device writes a second; 2000", type="float", minimum=1e-6),
    Option("kv_bytes", "memory of a token; 128KiB", metavar="SIZE"),
    Option("weights_bytes", "memory of the model all requests share; 0", metavar="SIZE"),
    Option("requests_per_s", "where a trace has no times; 1", type="float", minimum=1e-6),
)  # fmt: skip


def run(_: Context, values: Values) -> int:
    # -P: a file in the user's folder must not shadow a module.
    command = [sys.executable, "-P", "-m", "llmos.kernel.sim.main"]
    for option in _OPTIONS:
        value = values.get(option.name)
        if option.positional or value is None or value is False:
            continue
        for one in value if isinstance(value, list) else [value]:
            command += [option.flag] if one is True else [f"{option.flag}={one}"]
    return subprocess.run([*command, "--", *values["trace"]], check=False).returncode


COMMAND = Command(
    name="sim",
    summary="Replay traces on simulated devices, to compare policies or plan a purchase",
    run=run,
    options=_OPTIONS,
    details="The kernel's own scheduler runs them, in virtual time. Times that a trace's jobs "
    "take are those of the devices it was recorded on.",
    examples=(
        "llmos sim jobs.csv --devices 1xRTX4090-24G",
        "llmos sim jobs.csv --devices 2xRTX4090-24G --policy fifo --policy las",
        "llmos sim philly.csv.gz --cluster ed69ec --devices 8xP100-16G --csv o.csv",
    ),
)
