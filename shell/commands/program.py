"""Programs as commands: pretrain, finetune, gan and whatever plugins add, from the manifest.

Knows no program: flags, help and behaviour follow from the schema.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from llmos.kernel.errors import BadInput, NoKernel
from llmos.shell import commands
from llmos.shell.context import Context
from llmos.shell.follow import follow
from llmos.shell.options import Command, Option, Usage, Values, from_schema
from llmos.shell.render import size
from llmos.shell.resolve import nearest_hint, schema_of
from llmos.shell.view import View

# What every program takes besides its own arguments; one of its own goes before.
COMMON = (
    Option("detach", "do not wait: print the pid and return", type="bool", short="-d"),
    Option("name", "a name for the process"),
    Option("nice", "-20 ... 19; lower is more important", type="int", minimum=-20, maximum=19),
    Option("class", "which processes it goes before", choices=("interactive", "batch", "idle")),
    Option("device", "run on this device; default: the kernel chooses"),
    Option("deadline", "be done in so long from now", type="duration", minimum=0, metavar="TIME"),
    Option(
        "restart",
        "when it fails: no, on-failure, on-failure:N (times in a row), always",
        metavar="POLICY",
    ),
    Option(
        "hang_after",
        "it hangs without a sign of life for so long; 0: never; default: 5 min",
        type="duration",
        minimum=0,
        metavar="TIME",
    ),
    Option("dry_run", "only say what it would take", type="bool"),
)

# Those that say nothing to a program that needs no device.
_OF_DEVICES = {"nice", "class", "device", "deadline", "hang_after", "dry_run"}


def program_command(ctx: Context, name: str) -> Command:
    """The command of a program. Raises Usage when there is none, NoKernel when nobody can tell."""
    manifest = ctx.manifest()
    if manifest is None and name in {p.name for p in entry_points(group="llmos.programs")}:
        raise unknown_flags(ctx, name)
    command = program_of(name, manifest or {"programs": {}})
    if command is None:  # it may have been installed since the last boot
        manifest = ctx.manifest(checked=True)
        command = program_of(name, manifest or {"programs": {}})
    if command is None:
        programs = manifest["programs"] if manifest else {}
        _check_broken(name, manifest or {})
        verb = commands.PROGRAM_VERBS.get(name)
        hint = f"use `llmos {verb}`" if verb else unknown_hint(name, programs)
        raise Usage(f"there is no command {name!r}", hint)
    return command


def _check_broken(name: str, manifest: dict[str, Any]) -> None:
    """BadInput for a program that nobody could import: it is there, and it is not well."""
    for broken in manifest.get("broken", ()):
        if (broken["kind"], broken["name"]) == ("programs", name):
            raise BadInput(f"the program {name} is broken: {broken['error']}",
                           "mend it, then `llmos service reload`")  # fmt: skip


def verb_of_program(ctx: Context, verb: Command) -> Command:
    """A verb such as `run` with its program's arguments. Raises NoKernel without a manifest."""
    manifest = ctx.manifest()
    if manifest is None:
        raise unknown_flags(ctx, verb.name)
    return unify(verb, manifest)


def unify(verb: Command, manifest: dict[str, Any]) -> Command:
    """A verb with its program's arguments. Raises NoSuchThing."""
    schema = schema_of(manifest, verb.program)
    own = (
        replace(o, required=o.required and o.name not in verb.optional) for o in from_schema(schema)
    )
    options = with_common((*own, *verb.options), schema)
    return replace(verb, options=options, examples=tuple(schema["examples"]))


def program_of(name: str, manifest: dict[str, Any]) -> Command | None:
    """The command of a program that has no verb of its own; None when there is none."""
    schema = manifest["programs"].get(name)
    if schema is None or schema["hidden"] or name in commands.PROGRAM_VERBS:
        return None
    return _of_schema(name, schema)


def _of_schema(name: str, schema: dict[str, Any]) -> Command:
    def run(ctx: Context, values: Values) -> int:
        return launch(ctx, name, values)

    return Command(
        name=name,
        summary=schema["summary"],
        run=run,
        options=with_common(from_schema(schema), schema),
        examples=tuple(schema["examples"]),
    )


def with_common(own: tuple[Option, ...], schema: dict[str, Any]) -> tuple[Option, ...]:
    """A program's options and those that all programs take; its own go before."""
    taken = {o.name for o in own}
    if not schema.get("needs_device", True):
        taken |= _OF_DEVICES
    return (*own, *(replace(o, common=True) for o in COMMON if o.name not in taken))


def launch(
    ctx: Context,
    program: str,
    values: Values,
    view: Callable[[str], View] | None = None,
) -> int:
    """Submit a program and show it until it ends, or print its pid. `view` makes what shows it,
    from what the process is called."""
    schema = schema_of(ctx.manifest() or {"programs": {}}, program)
    args = {f["name"]: values[f["name"]] for f in schema["args"] if f["name"] in values}
    options = {o.name: values[o.name] for o in COMMON if o.name in values and o.name not in args}
    if options.get("dry_run"):
        return _dry_run(ctx, schema["name"], args, options)
    detach = bool(options.get("detach"))
    stays = schema["on_interrupt"] == "detach"
    ends_with_us = not stays and not detach and not ctx.interactive
    with ctx.client() as client:
        pid = client.submit(
            schema["name"],
            args,
            name=options.get("name", ""),
            nice=options.get("nice", 0),
            cls=options.get("class", ""),
            device=options.get("device", ""),
            restart=options.get("restart", "no"),
            hang_s=options.get("hang_after"),
            deadline_s=options.get("deadline", 0.0),
            attached=ends_with_us,
        )
        if ctx.on_submit is not None:
            ctx.on_submit(pid, schema["name"])
        if detach:
            ctx.print(f"[{pid}] {program}" if ctx.in_background else str(pid))
            return 0
        shown = view(f"{program} {pid}") if view is not None else None
        return follow(ctx, client, pid, schema, view=shown)


def _dry_run(ctx: Context, program: str, args: dict[str, Any], options: dict[str, Any]) -> int:
    with ctx.client() as client:
        plan = client.plan(
            program, args, device=options.get("device", ""), cls=options.get("class", "")
        )
    segments = plan.get("footprint", [])
    devices = str(plan.get("device") or "a device").split("+")
    each = "" if len(devices) == 1 else "each of "
    here = sum(s["bytes"] for s in segments)
    ctx.print(f"{program} would take {size(here)} of memory on {each}{' and '.join(devices)}:")
    ctx.lines(f"  {s['kind']:<12} {size(s['bytes']):>7}" for s in segments)
    ctx.print(f"free now: {size(plan['free_bytes'])}")
    for victim in plan.get("would_move_out", ()):
        ctx.print(f"process {victim['pid']} ({victim['name'] or 'no name'}) would be moved out: "
                  f"{size(victim['bytes'])}")  # fmt: skip
    starts = plan.get("starts")
    if starts:
        when = f", in about {starts['in_s']:.0f} s" if starts["in_s"] else ""
        ctx.print(f"it would start {starts['at']}{when}: {starts['why']}")
    return 0


def unknown_hint(name: str, programs: dict[str, Any]) -> str:
    """The nearest command, or where the list is."""
    visible = [
        n for n, s in programs.items() if not s["hidden"] and n not in commands.PROGRAM_VERBS
    ]
    near = nearest_hint(name, [*commands.NAMES, *visible])
    return near if near.startswith("did you mean") else "`llmos help` lists the commands"


def unknown_flags(ctx: Context, name: str) -> NoKernel:
    """The error for a program whose flags nobody can tell yet."""
    return NoKernel(
        f"no kernel runs for the home {ctx.home.path}, and none ever did: "
        f"the flags of `{name}` are not known yet",
        "start one with `llmos boot`",
    )


def listing(manifest: dict[str, Any] | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Programs by group, for `help`: those that have no verb of their own."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, schema in sorted((manifest or {"programs": {}})["programs"].items()):
        if not schema["hidden"] and name not in commands.PROGRAM_VERBS:
            groups.setdefault(schema["group"].capitalize(), []).append((name, schema["summary"]))
    return sorted(groups.items())
