"""`submit`: validate, plan, journal, answer. What is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import json
import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.kernel import access, adapters, admission, arguments, forecast, protocol, restarts
from llmos.kernel import events as ev
from llmos.kernel.connection import Connection
from llmos.kernel.errors import (
    BadArgument,
    Busy,
    HomeUnusable,
    LlmosError,
    NoSuchThing,
    NotAllowed,
)
from llmos.kernel.journal import journaled
from llmos.kernel.kernel import Kernel
from llmos.kernel.names import user_name
from llmos.kernel.process import CLASSES, RUNNABLE, Process, Role
from llmos.kernel.syscalls import checkpoint
from llmos.kernel.syscalls.renice import deadline_at

MOST_HANG_S = 30 * 86_400.0
FORGET_EVERY = 1024  # so many attached processes of a connection: then those that ended go
MAX_NAME = 200  # it is in every row of `ps`
OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


async def handle(kernel: Kernel, request: protocol.Submit, client: Connection) -> dict[str, Any]:
    await kernel.installed.ready.wait()
    if request.program not in kernel.manifest.get("programs", {}):
        await kernel.installed.checked.wait()  # it may have come since the last boot
    if kernel.core.m.shutting_down:
        raise Busy("the kernel shuts down", "boot it again, then submit")
    if not request.dry_run:
        kernel.health.check()
    schema = _schema(kernel, request.program)
    client = _for_user(kernel, request, client)
    access.check_rank(client, request, schema["default_class"])
    _check_room(kernel, client)
    await _first_checkpoints(kernel, schema, request, client)
    args = arguments.check(
        schema, request.args, request.cwd, lambda m: _model(kernel, m, client),
        kernel.config.argument_defaults(), request.env, request.dry_run,
    )  # fmt: skip
    args = adapters.on_its_base(
        schema, args, str(request.args.get("model", "")),
        None if access.is_admin(client.uid) else client.uid, lambda m: _model(kernel, m, client),
    )  # fmt: skip
    _check_output(kernel, schema, args)
    _check_foreign(kernel, schema, request.device)
    proc = _process(kernel, request, schema, args, client.uid)
    if request.dry_run:
        return await _dry_run(kernel, schema, proc, request.any_size)
    if proc.role is Role.GUEST:
        await _submit_guest(kernel, schema, proc, client)
    elif proc.role is Role.ENGINE and proc.engine_key in kernel.core.m.engines:
        return await _keep_engine(kernel, proc)
    else:
        _enter(kernel, proc, client)
        await _plan(kernel, schema, proc)
    if journaled(proc):
        try:
            await kernel.journal.flushed()
        except HomeUnusable:
            kernel.spawn(_withdraw(kernel, proc.pid))
            raise
    return {"pid": proc.pid}


async def _keep_engine(kernel: Kernel, asked: Process) -> dict[str, Any]:
    """It is there, or being made: no second one, but it stays for as long as is asked for now."""
    pid = kernel.core.m.engines[asked.engine_key]
    kernel.post(ev.KeepAsked(pid, float(asked.args.get("keep_alive_s", 300.0))))
    planning = kernel.planning.get(pid)
    if planning is not None:
        await asyncio.shield(planning)
    await kernel.journal.flushed()
    return {"pid": pid}


@dataclass(slots=True)
class _OnBehalf:
    """A connection of root's that submits for somebody else, who may do no more by that."""

    uid: int
    attached: set[int]


def _for_user(kernel: Kernel, request: protocol.Submit, client: Connection) -> Connection:
    """Whose process it becomes. Raises NotAllowed, NoSuchThing."""
    if not request.user or request.user == user_name(client.uid):
        return client
    if kernel.group is None or not access.is_admin(client.uid):
        raise NotAllowed(
            f"a process of {request.user} cannot be made here",
            "only root submits for others, to a kernel that serves a group (`boot --group`)",
        )
    try:
        return _OnBehalf(pwd.getpwnam(request.user).pw_uid, client.attached)
    except KeyError:
        raise NoSuchThing(
            f"there is no user {request.user!r}", "`getent passwd` lists them"
        ) from None


async def _withdraw(kernel: Kernel, pid: int) -> None:
    """It was not acknowledged, so it must not run."""
    with contextlib.suppress(LlmosError):
        kernel.post(ev.KillAsked(pid, 9))
    with contextlib.suppress(LlmosError):
        await kernel.changed(pid, lambda p: not p.live, None)
        kernel.post(ev.Expired((pid,)))


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
            if (
                access.is_own(client, proc)
                and proc.has_checkpoint
                and proc.state in RUNNABLE
                and worker.loaded
            ):
                await checkpoint.handle(kernel, protocol.Checkpoint(proc.pid), client)


def _enter(
    kernel: Kernel, proc: Process, client: Connection, engine: Process | None = None
) -> None:
    """Into the table; from now on the process ends with its client, if it is to."""
    if proc.attached:
        if len(client.attached) % FORGET_EVERY == FORGET_EVERY - 1:  # a gateway submits for months
            procs = kernel.core.m.procs
            gone = {pid for pid in client.attached if pid not in procs or not procs[pid].live}
            client.attached.difference_update(gone)
        client.attached.add(proc.pid)
    kernel.post(ev.Submitted(proc, engine))


async def _submit_guest(
    kernel: Kernel, schema: dict[str, Any], proc: Process, client: Connection
) -> None:
    """Into the engine of its model; the first guest of a model has one made and planned."""
    m = kernel.core.m
    if access.drop_to(proc.uid) is not None:
        paths = [v for v in proc.args.values() if isinstance(v, str) and v.startswith("/")]
        model = [proc.args[f["name"]] for f in schema["args"] if f.get("model")]
        await kernel.planner.look(proc, [p for p in paths if p in model])
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
        segments = await kernel.planner.plan(schema, proc)
    except LlmosError as exc:
        kernel.post(ev.PlanFailed(proc.pid, str(exc)))
        raise
    if proc.pid in kernel.core.m.procs and proc.live:  # not killed in the meantime
        kernel.post(ev.Planned(proc.pid, segments))


async def _dry_run(
    kernel: Kernel, schema: dict[str, Any], proc: Process, any_size: bool
) -> dict[str, Any]:
    planned = schema
    if proc.role is Role.GUEST:
        proc = kernel.make_engine(schema, proc, proc.uid)
        planned = kernel.schema_of(proc.program)
    proc.segments = await kernel.planner.plan(planned, proc)
    if not any_size:
        admission.refuse_what_never_fits(kernel.core.m, proc)
    return forecast.of(kernel, proc)


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
    restarts.parse(request.restart)
    if not schema.get("needs_device", True) and (request.device or request.deadline_s):
        raise BadArgument(
            f"{schema['name']} needs no device: it waits for none and has no deadline on one",
            "leave --device and --deadline out",
        )
    hang_s = request.hang_s
    if hang_s is not None and not 0 <= hang_s <= MOST_HANG_S:
        raise BadArgument(f"hang_s is 0 to {MOST_HANG_S:.0f} seconds, not {hang_s!r}")
    if hang_s is None and schema.get("foreign"):
        hang_s = 0.0  # nobody knows what it is like when it works
    if not all(isinstance(v, str) for v in request.env.values()):
        raise BadArgument("env is a map of texts to texts")
    if request.device and request.device not in kernel.devices:
        raise NoSuchThing(
            f"there is no device {request.device!r}", f"devices: {', '.join(kernel.devices)}"
        )
    if len(request.name) > MAX_NAME:
        raise BadArgument(f"a name has at most {MAX_NAME} characters")
    hosted = _guests_of(kernel, request.program)
    role = Role.ENGINE if hosted else Role.GUEST if schema["engine"] else Role.PROCESS
    return Process(
        pid=kernel.take_pid(), program=request.program, args=args, user=user_name(uid), uid=uid,
        submitted_at=kernel.now(), name=request.name or _name(schema, {**args, **request.args}),
        role=role, preload=role is Role.ENGINE, device_wanted=request.device,
        cwd=request.cwd, env=request.env, attached=request.attached, restart=request.restart,
        has_checkpoint=schema["has_checkpoint"], cls=CLASSES[cls], nice=request.nice,
        engine_key=_engine_key(hosted or schema, args, request.device, uid),
        gang=_gang(kernel, schema, args, request),
        may_shrink=bool(args.get("may_shrink")), lanes=int(args.get("threads") or 0),
        declared=bool(schema.get("foreign") and args.get("memory")),
        deadline_at=deadline_at(kernel, request.deadline_s) or None, hang_s=hang_s,
    )  # fmt: skip


def _guests_of(kernel: Kernel, program: str) -> dict[str, Any] | None:
    """The schema of a program that is hosted by this one; None when it is no engine."""
    programs = kernel.manifest["programs"].values()
    return next((s for s in programs if s["engine"] == program), None)


def _gang(
    kernel: Kernel, schema: dict[str, Any], args: dict[str, Any], request: protocol.Submit
) -> int:
    """How many devices a process wants. Raises BadArgument when there are not so many."""
    count = int(args.get("devices") or 1) if schema.get("needs_device", True) else 0
    if count > 1 and request.device:
        raise BadArgument(
            f"--devices {count} and --device {request.device} cannot be together",
            "the kernel chooses the devices of a process that wants several",
        )
    have = len(kernel.core.m.pool)
    if count > have:
        raise BadArgument(
            f"--devices is {count}; this machine has {have}",
            "ask for fewer, or boot with more: --device cpu0:cores=0 --device cpu1:cores=1",
        )
    return count


def _engine_key(schema: dict[str, Any], args: dict[str, Any], device: str, uid: int) -> str:
    if not schema["engine"]:
        return ""
    # How long to keep the model says nothing about which model it is.
    chosen = {n: args[n] for n in schema["engine_args"] if n in args and n != "keep_alive_s"}
    versions = [_version(v) for v in chosen.values() if isinstance(v, str) and v.startswith("/")]
    # An engine runs as one user, and reads what he may read: another's guests have their own.
    whose = [] if access.drop_to(uid) is None else [uid]
    text = json.dumps([schema["engine"], chosen, device, versions, *whose], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(path: str) -> list[int]:
    """A model that was made anew under the same name is another one."""
    try:
        found = os.stat(path)
    except OSError:
        return []  # the planner says what is wrong with it
    return [found.st_ino, found.st_mtime_ns]


def _check_room(kernel: Kernel, client: Connection) -> None:
    """Raise Busy when a user has as many processes as one may have."""
    most = kernel.config.max_processes
    if len(kernel.core.m.by_user.get(client.uid, ())) >= most:
        raise Busy(
            f"user {user_name(client.uid)} has {most:,} processes that have not ended",
            "wait for some to end; the limit is max_processes in config.toml",
        )


def _name(schema: dict[str, Any], args: dict[str, Any]) -> str:
    """What `ps` shows when the user gave no name: the command, output, model or data."""
    for key in ("command", "output", "model", "local", "path"):
        for f in schema["args"]:
            value = args.get(f["name"])
            if not f.get(key) or not value:
                continue
            if isinstance(value, list):  # `python -u train.py` is called by its script
                value = next((w for w in value if w.endswith((".py", ".sh"))), value[0])
            return Path(str(value)).name
    return ""


def _check_foreign(kernel: Kernel, schema: dict[str, Any], device: str) -> None:
    """A command knows no gate: on a device that no signal holds it would go on beside others."""
    names = [device] if device in kernel.devices else list(kernel.core.m.pool)
    if schema.get("foreign") and any(kernel.devices[n][0].kind == "cuda" for n in names):
        raise BadArgument(
            f"{schema['name']} on {names[0]} cannot be held yet, so it is not run there",
            "boot with a CPU device beside it, and say --device cpu0",
        )


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


def _model(kernel: Kernel, ref: str, client: Connection) -> str:
    """A registry name, the name of a model in the making, a path or a hub name -> for loading."""
    if ref.startswith("/"):
        # Whether others' folders exist is not told here: the plan, under his uid, says it.
        if access.is_admin(client.uid) and not Path(ref).exists():
            raise NoSuchThing(f"there is no model folder {ref}", "`llmos models` lists the names")
        return ref
    if OUTPUT_NAME.fullmatch(ref):
        registered = kernel.home.models / ref
        if registered.is_dir() and (access.is_admin(client.uid) or not registered.is_symlink()):
            return str(registered)
        making = [
            p for p in kernel.core.m.procs.values()
            if p.args.get("out") == ref and access.is_own(client, p)
        ]  # fmt: skip
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
