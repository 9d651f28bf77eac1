"""`llmos plan`: what a program would take, and settings under which it fits."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from typing import Any

from llmos.kernel.errors import BadArgument, NoMemory
from llmos.kernel.units import parse_bytes
from llmos.shell import commands
from llmos.shell.client import Client, Record
from llmos.shell.commands.program import unknown_flags
from llmos.shell.context import Context
from llmos.shell.fitting import Choice, choices
from llmos.shell.options import JSON, Command, Option, Usage, Values, from_schema, parse
from llmos.shell.render import Column, size, table
from llmos.shell.resolve import schema_of

_OWN = (
    Option("memory", "how much there is, as in 24GiB; default: what is free", metavar="SIZE"),
    Option("device", "plan for this device; default: the kernel chooses"),
    JSON,
)

_COLUMNS = (
    Column("", right=True), Column("PEAK", right=True), Column("WEIGHTS", right=True),
    Column("GRADS", right=True), Column("OPTIM", right=True), Column("ACTIV", right=True),
    Column("REST", right=True), Column("COMPUTE", right=True), Column("SETTINGS", shrink=16),
)  # fmt: skip
_SHOWN = ("weights", "gradients", "optimizer", "activations")


def prepare(argv: list[str]) -> list[str]:
    """Own flags may stand anywhere; all other words are the program's."""
    own, rest = [], []
    words = iter(argv)
    for word in words:
        option = next((o for o in _OWN if word.partition("=")[0] == o.flag), None)
        if option is None:
            rest.append(word)
        else:
            own.append(word)
            if option.type != "bool" and "=" not in word:
                own += [value for value in (next(words, None),) if value is not None]
    return [*own, "--", *rest]


def run(ctx: Context, values: Values) -> int:
    name = _program(values["program"])
    words = values.get("arguments", [])
    capacity = _capacity(values.get("memory"))
    manifest = ctx.manifest()
    if manifest is None:
        raise unknown_flags(ctx, values["program"])
    schema = schema_of(manifest, name)
    with ctx.client() as client:
        _check_device(client, values.get("device", ""))
        args = _arguments(schema, words)
        predict = _Predict(client, schema["name"], values.get("device", ""))
        if capacity is None:
            capacity = max(0, int(predict(args)["free_bytes"]))
        fitting, least = choices(schema, args, capacity, predict)
    if values.get("json"):
        ctx.json({"memory_bytes": capacity, "fitting": [_json(c) for c in fitting],
                  "least": _json(least)})  # fmt: skip
        return 0 if fitting else 1
    if not fitting:
        _refuse(values["program"], least, capacity)
    _show(ctx, schema, [values["program"], *words], fitting, capacity)
    return 0


class _Predict:
    """A plan by the kernel; the same arguments are asked for once."""

    def __init__(self, client: Client, program: str, device: str) -> None:
        self._client, self._program, self._device = client, program, device
        self._known: dict[str, Record] = {}

    def __call__(self, args: Record) -> Record:
        key = repr(sorted(args.items()))
        if key not in self._known:
            self._known[key] = self._client.plan(
                self._program, args, device=self._device, any_size=True
            )
        return self._known[key]


def _program(word: str) -> str:
    """`run` is the verb of the program `infer`."""
    return {verb: name for name, verb in commands.PROGRAM_VERBS.items()}.get(word, word)


def _arguments(schema: Record, words: list[str]) -> Record:
    """What was given of the program's arguments; what a plan can do without may be missing."""
    spared = {f["name"] for f in schema["args"] if f.get("plan_without")}
    options = [
        replace(o, required=o.required and o.name not in spared) for o in from_schema(schema)
    ]
    try:
        return parse(options, words)
    except Usage as exc:
        raise Usage(exc.message, exc.hint or f"`llmos {schema['name']} --help` shows how") from None


def _capacity(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        found = parse_bytes(text)
    except BadArgument as exc:
        raise Usage(f"--memory: {exc.message}", exc.hint) from None
    if found < 1:
        raise Usage(f"--memory {text} is no memory", "write it as 24GiB")
    return found


def _check_device(client: Client, device: str) -> None:
    known = [d["device"] for d in client.status()["devices"]]
    if device and device not in known:
        raise Usage(f"there is no device {device!r}", f"devices: {', '.join(known)}")


def _kinds(choice: Choice) -> Counter[str]:
    found: Counter[str] = Counter()
    for segment in choice.plan["footprint"]:
        found[segment["kind"]] += int(segment["bytes"])
    return found


def _json(choice: Choice) -> Record:
    return {"settings": choice.changed, "total_bytes": choice.total_bytes,
            "by_kind": dict(_kinds(choice)), "compute": round(choice.compute, 2),
            "cost": choice.cost}  # fmt: skip


def _flags(changed: Record) -> list[str]:
    words = []
    for name, value in changed.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def _refuse(program: str, least: Choice, capacity: int) -> None:
    settings = shlex.join(_flags(least.changed)) or "the settings as they are"
    raise NoMemory(
        f"{program} does not fit into {size(capacity)}: it needs at least "
        f"{size(least.total_bytes)}",
        f"nearest: {settings}; a smaller --context or model needs less",
    )


def _show(
    ctx: Context, schema: Record, words: list[str], fitting: list[Choice], capacity: int
) -> None:
    rows = [_row(number, choice) for number, choice in enumerate(fitting, 1)]
    ctx.print(f"{words[0]} fits into {size(capacity)} with:")
    ctx.lines(table(_COLUMNS, rows, ctx.width))
    ctx.print()
    for number, choice in enumerate(fitting, 1):
        if choice.cost:
            ctx.print(f"{number}: {choice.cost}")
        ctx.print(f"   {_command_line(schema, words, choice.changed)}")


def _row(number: int, choice: Choice) -> tuple[str, ...]:
    kinds = _kinds(choice)
    rest = sum(n for kind, n in kinds.items() if kind not in _SHOWN)
    shown = (size(n) for n in (choice.total_bytes, *(kinds[k] for k in _SHOWN), rest))
    return (str(number), *shown, f"{choice.compute:.2f}x", choice.label)


def _without(words: list[str], options: dict[str, Option], changed: Record) -> list[str]:
    """The words without the flags that are going to be changed."""
    kept = []
    rest = iter(words)
    for word in rest:
        flag, equals, _ = word.partition("=")
        option = options.get(flag.removeprefix("--").replace("-", "_"))
        if not flag.startswith("--") or option is None or option.name not in changed:
            kept.append(word)
        elif option.type != "bool" and not equals:
            next(rest, None)
    return kept


def _command_line(schema: Record, words: list[str], changed: Record) -> str:
    """What to type; what is still missing stands in capitals."""
    options = {o.name: o for o in from_schema(schema)}
    line = shlex.join(["llmos", *_without(words, options, changed), *_flags(changed)])
    given: Any = _arguments(schema, words[1:])
    missing = [o for n, o in options.items() if o.required and n not in given]
    return " ".join([line, *(o.shown if o.positional else f"{o.flag} {o.shown}" for o in missing)])


COMMAND = Command(
    name="plan",
    summary="What a program would take, and settings under which it fits",
    run=run,
    options=(
        Option("program", "a program, as in `llmos help`", positional=True, required=True,
               complete="program"),
        Option("arguments", "its arguments; data and --out may be missing", positional=True,
               many=True),
        *_OWN,
    ),
    prepare=prepare,
    details="Nothing runs. When the program does not fit as it is asked for, smaller micro-batches "
    "(with accumulation, so that a step sees as many examples), gradient checkpointing, 8-bit "
    "moments and LoRA are tried. COMPUTE is the work of a step against that of the settings as "
    "asked, about.",
    examples=(
        "llmos plan finetune stories15M --memory 24GiB",
        "llmos plan pretrain --width 1024 --layers 16 --batch 64 --memory 8GiB",
    ),
)  # fmt: skip
