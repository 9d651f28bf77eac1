"""`submit`: validate, plan, journal, answer. What is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from llmos.kernel import admission, arguments, protocol
from llmos.kernel import events as ev
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument, Busy, LlmosError, NoSuchThing
from llmos.kernel.kernel import Kernel, user_name
from llmos.kernel.process import CLASSES, RUNNABLE, Process, Role
from llmos.kernel.syscalls import checkpoint

RESTARTS = ("no", "on-failure", "always")
OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


async def handle(kernel: Kernel, request: protocol.Submit, client: Connection) -> dict[str, Any]:
    await kernel.manifest_ready.wait()
    if kernel.core.m.shutting_down:
        raise Busy("the kernel shuts down", "boot it again, then submit")
    schema = _schema(kernel, request.program)
    await _first_checkpoints(kernel, schema, request, client)
    args = arguments.check(schema, request.args, request.cwd, lambda m: _model(kernel, m))
    _check_output(kernel, schema, args)
    proc = _process(kernel, request, schema, args, client.uid)
    if request.dry_run:
        return await _dry_run(kernel, schema, proc)
    if proc.role is Role.GUEST:
        await _submit_guest(kernel, schema, proc, client)
    else:
        _enter(kernel, proc, client)
        await _plan(kernel, schema, proc)
    await kernel.journal.flushed()
    return {"pid": proc.pid}


async def _first_checkpoints(
    kernel: Kernel, schema: dict[str, Any], request: protocol.Submit, client: Connection
) -> None:
    """Who asks for a model in the making gets it as it stands, also in its first minute."""
    for f in schema["args"]:
        ref = request.args.get(f["name"])
        if not f.get("model") or not isinstance(ref, str) or (kernel.home.models / ref).exists():
            continue
        for proc in list(kernel.core.m.procs.values()):
            worker = kernel.core.m.worker_of(proc)
            if proc.args.get("out") != ref or proc.checkpoint is not None or worker is None:
                continue
            if proc.has_checkpoint and proc.state in RUNNABLE and worker.loaded:
                await checkpoint.handle(kernel, protocol.Checkpoint(proc.pid), client)


def _enter(
    kernel: Kernel, proc: Process, client: Connection, engine: Process | None = None
) -> None:
    """Into the table; from now on the process ends with its client, if it is to."""
    if proc.attached:
        client.attached.add(proc.pid)
    kernel.post(ev.Submitted(proc, engine))


async def _submit_guest(
    kernel: Kernel, schema: dict[str, Any], proc: Process, client: Connection
) -> None:
    """Into the engine of its model; the first guest of a model has one made and planned."""
    m = kernel.core.m
    if proc.engine_key in m.engines:
        _enter(kernel, proc, client)
        planning = kernel.planning.get(proc.engine_pid)
        if planning is not None:
            await asyncio.shield(planning)  # it is not this client's alone
        return
    engine = kernel.make_engine(schema, proc, proc.uid)
    proc.pid = kernel.take_pid()  # an engine is older than its guests
    _enter(kernel, proc, client, engine)
    await _plan(kernel, kernel.schema_of(engine.program), engine)


async def _plan(kernel: Kernel, schema: dict[str, Any], proc: Process) -> None:
    """Predict, then admit. On any error the process never was."""
    done = kernel.spawn(_plan_and_admit(kernel, schema, proc), answers=True)
    kernel.planning[proc.pid] = done
    done.add_done_callback(lambda _: kernel.planning.pop(proc.pid, None))
    # Shielded: when the client goes, what it submitted (and who joined it) does not.
    await asyncio.shield(done)


async def _plan_and_admit(kernel: Kernel, schema: dict[str, Any], proc: Process) -> None:
    try:
        segments = await kernel.plan(schema, proc)
    except LlmosError as exc:
        kernel.post(ev.PlanFailed(proc.pid, str(exc)))
        raise
    if proc.pid in kernel.core.m.procs and proc.live:  # not killed in the meantime
        kernel.post(ev.Planned(proc.pid, segments))


async def _dry_run(kernel: Kernel, schema: dict[str, Any], proc: Process) -> dict[str, Any]:
    planned = schema
    if proc.role is Role.GUEST:
        proc = kernel.make_engine(schema, proc, proc.uid)
        planned = kernel.schema_of(proc.program)
    proc.segments = await kernel.plan(planned, proc)
    admission.refuse_what_never_fits(kernel.core.m, proc)
    ledger = kernel.core.m.ledger
    devices = admission.devices_for(kernel.core.m, proc)
    fits = [d for d in devices if ledger.can_reserve(d, proc.segments)]
    return {
        "footprint": proc.segments,
        "total_bytes": sum(s["bytes"] for s in proc.segments),
        "device": (fits or devices)[0],
        "fits_now": bool(fits),
        "free_bytes": ledger.free((fits or devices)[0]),
    }


def _schema(kernel: Kernel, program: str) -> dict[str, Any]:
    programs = kernel.manifest.get("programs", {})
    if program not in programs:
        near = difflib.get_close_matches(program, programs, 1)
        hint = f"did you mean {near[0]}?" if near else "`llmos help` lists the programs"
        raise NoSuchThing(f"there is no program {program!r}", hint)
    found: dict[str, Any] = programs[program]
    return found


def _process(
    kernel: Kernel, request: protocol.Submit, schema: dict[str, Any], args: dict[str, Any], uid: int
) -> Process:
    if not -20 <= request.nice <= 19:
        raise BadArgument(f"nice is -20 to 19, not {request.nice}", "lower is more important")
    cls = request.cls or schema["default_class"]
    if cls not in CLASSES:
        raise BadArgument(f"class is one of {', '.join(CLASSES)}, not {cls!r}")
    if request.restart not in RESTARTS:
        raise BadArgument(f"restart is one of {', '.join(RESTARTS)}, not {request.restart!r}")
    if not all(isinstance(v, str) for v in request.env.values()):
        raise BadArgument("env is a map of texts to texts")
    if request.device and request.device not in kernel.devices:
        raise NoSuchThing(
            f"there is no device {request.device!r}", f"devices: {', '.join(kernel.devices)}"
        )
    return Process(
        pid=kernel.take_pid(), program=request.program, args=args, user=user_name(uid), uid=uid,
        submitted_at=kernel.now(), name=request.name or _name(schema, {**args, **request.args}),
        role=Role.GUEST if schema["engine"] else Role.PROCESS, device_wanted=request.device,
        cwd=request.cwd, env=request.env, attached=request.attached, restart=request.restart,
        has_checkpoint=schema["has_checkpoint"], cls=CLASSES[cls], nice=request.nice,
        engine_key=_engine_key(schema, args, request.device),
    )  # fmt: skip


def _engine_key(schema: dict[str, Any], args: dict[str, Any], device: str) -> str:
    if not schema["engine"]:
        return ""
    # How long to keep the model says nothing about which model it is.
    chosen = {n: args[n] for n in schema["engine_args"] if n in args and n != "keep_alive_s"}
    versions = [_version(v) for v in chosen.values() if isinstance(v, str) and v.startswith("/")]
    text = json.dumps([schema["engine"], chosen, device, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(path: str) -> list[int]:
    """A model that was made anew under the same name is another one."""
    try:
        found = os.stat(path)
    except OSError:
        return []  # the planner says what is wrong with it
    return [found.st_ino, found.st_mtime_ns]


def _name(schema: dict[str, Any], args: dict[str, Any]) -> str:
    """What `ps` shows when the user gave no name: the output, or the model, or the data."""
    for key in ("output", "model", "path"):
        for f in schema["args"]:
            value = args.get(f["name"])
            if f.get(key) and isinstance(value, str) and value:
                return Path(value).name
    return ""


def _check_output(kernel: Kernel, schema: dict[str, Any], args: dict[str, Any]) -> None:
    for f in schema["args"]:
        name = args.get(f["name"])
        if not f.get("output") or not name:
            continue
        if not OUTPUT_NAME.fullmatch(name):
            raise BadArgument(
                f"{arguments.flag(f['name'])} {name!r} is not a name",
                "use letters, digits, dots, dashes and underscores",
            )
        if (kernel.home.models / name).exists() and not args.get("overwrite"):
            raise BadArgument(
                f"a model {name!r} exists already", "choose another --out, or say --overwrite"
            )
        for other in kernel.core.m.procs.values():
            if other.live and other.role is Role.PROCESS and other.args.get(f["name"]) == name:
                raise BadArgument(f"process {other.pid} makes a model {name!r} at this moment")


def _model(kernel: Kernel, ref: str) -> str:
    """A registry name, the name of a model in the making, a path or a hub name -> for loading."""
    if ref.startswith("/"):
        if not Path(ref).exists():
            raise NoSuchThing(f"there is no model folder {ref}", "`llmos models` lists the names")
        return ref
    if OUTPUT_NAME.fullmatch(ref):
        registered = kernel.home.models / ref
        if registered.is_dir():
            return str(registered)
        making = [p for p in kernel.core.m.procs.values() if p.args.get("out") == ref]
        ready = [p.checkpoint["folder"] for p in making if p.checkpoint]
        if ready:
            return str(ready[-1])
        if any(p.live for p in making):
            raise NoSuchThing(
                f"model {ref!r} is being made and has no checkpoint yet",
                f"`llmos checkpoint {making[-1].pid}` has it write one",
            )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", ref):
        return ref  # a hub name: the loader looks for it in the cache, then on the hub
    have = sorted(p.name for p in kernel.home.models.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(ref, have, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise NoSuchThing(
        f"there is no model {ref!r}",
        hint + "`llmos models` lists the names; a path begins with / or ./",
    )
