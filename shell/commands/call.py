"""`llmos call`: call a service, ours or a plugin's. Its flags are the call's own arguments."""

from __future__ import annotations

import json
import re
from typing import Any

from llmos.kernel.errors import BadInput, NoSuchThing
from llmos.shell.context import Context
from llmos.shell.helptext import command_help, groups_help
from llmos.shell.options import Command, Option, Usage, Values, parse
from llmos.shell.resolve import nearest_hint

Record = dict[str, Any]

_TIMEOUT = Option("timeout", "how long to wait for the answer; default: what the call may take",
                  type="duration", metavar="TIME")  # fmt: skip
_PAIR = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)

# Beside what a call may take: its turn may have to come first.
QUEUE_S = 30.0


def run(ctx: Context, values: Values) -> int:
    method, *words = values["words"]
    service, _, name = method.partition(".")
    described = find_service(ctx, service)
    if not name:
        ctx.print(service_help(service, described))
        return 0
    call = find_call(service, described, name)
    command = command_of(method, call)
    if any(word in ("--help", "-h") for word in words):
        ctx.print(command_help(command).rstrip("\n"))
        return 0
    try:
        arguments, timeout_s = read(command, call, words)
    except Usage as exc:
        raise Usage(exc.message, exc.hint or f"`llmos help {method}` shows its arguments") from None
    timeout_s = values.get("timeout", timeout_s)
    timeout_s = float(call["limit_s"]) + QUEUE_S if timeout_s is None else timeout_s
    with ctx.client() as client:
        ctx.json(client.call(method, timeout_s, **arguments))
    return 0


def find_service(ctx: Context, name: str) -> Record:
    """A service as the manifest has it. Raises NoKernel, NoSuchThing, BadInput (it is broken)."""
    manifest: Record = {}
    for checked in (False, True):  # it may have been installed since the last boot
        manifest = ctx.manifest(checked) or {}
        if name in manifest.get("services", {}):
            return dict(manifest["services"][name])
    if not manifest:
        with ctx.client():  # raises: no kernel runs here, and none ever did
            pass
    check_broken(name, manifest)
    raise NoSuchThing(f"there is no service {name!r}",
                      nearest_hint(name, manifest.get("services", {})))  # fmt: skip


def find_broken(name: str, manifest: Record) -> Record | None:
    """A service that could not be imported."""
    named = (b for b in manifest.get("broken", ()) if (b["kind"], b["name"]) == ("services", name))
    return next(named, None)


def check_broken(name: str, manifest: Record) -> None:
    """Raise BadInput for a service that could not be imported."""
    broken = find_broken(name, manifest)
    if broken is not None:
        raise BadInput(f"service {name} is broken: {broken['error']}",
                       "mend it, then `llmos service reload`")  # fmt: skip


def find_call(service: str, described: Record, name: str) -> Record:
    if name not in described["calls"]:
        raise NoSuchThing(f"service {service} has no call {name!r}",
                          nearest_hint(name, described["calls"]))  # fmt: skip
    return dict(described["calls"][name])


def topic_help(ctx: Context, topic: str) -> str | None:
    """What `help SERVICE` and `help SERVICE.CALL` print; None when there is no such service.

    Raises BadInput for one that is broken.
    """
    service, _, name = topic.partition(".")
    manifest = ctx.manifest() or {}
    if service not in manifest.get("services", {}):
        manifest = ctx.manifest(checked=True) or {}
    check_broken(service, manifest)
    if service not in manifest.get("services", {}):
        return None
    described = manifest["services"][service]
    if not name:
        return service_help(service, described)
    return command_help(command_of(topic, find_call(service, described, name))).rstrip("\n")


def service_help(service: str, described: Record) -> str:
    """The calls of a service and what they take."""
    rows = []
    for name, call in sorted(described["calls"].items()):
        words = [_shown(a) for a in call["args"]]
        rows.append((f"{service}.{name} {' '.join(words)}".rstrip(), call["help"]))
    title = f"{service}: {described['summary']}"
    hint = f"`llmos help {service}.CALL` shows the arguments of one."
    return f"{title}\n\n{groups_help([('Calls', rows)])}\n{hint}"


def _shown(argument: Record) -> str:
    word = f"--{argument['name'].replace('_', '-')}"
    return word if argument["required"] else f"[{word}]"


def command_of(method: str, call: Record) -> Command:
    """A call as a command: the same parser, help and completion as any other."""
    own = tuple(option_of(a) for a in call["args"])
    timeout = () if any(o.name == "timeout" for o in own) else (_TIMEOUT,)
    return Command(
        name=f"call {method}",
        summary=call["help"] or f"The call {method}",
        run=run,
        options=(*own, *timeout),
    )


def option_of(argument: Record) -> Option:
    kind = argument["type"].removesuffix("?")
    texts = kind == "list" and argument["items"] in ("str", "any", "")
    simple = kind if kind in ("int", "float", "bool") else "list" if texts else "str"
    choices = tuple(str(c) for c in argument.get("choices") or ())
    notes = {"list": "" if texts else "a JSON list", "dict": "a JSON map", "any": "JSON, or text"}
    help_ = argument["help"] or notes.get(kind, "")
    return Option(
        name=argument["name"], help=help_, type="str" if choices else simple,
        required=argument["required"], default=argument["default"], choices=choices,
    )  # fmt: skip


def read(command: Command, call: Record, words: list[str]) -> tuple[Record, float | None]:
    """The arguments of a command line: flags, or name=value -> values by name, and --timeout.

    Raises Usage.
    """
    arguments = {a["name"]: a for a in call["args"]}
    pairs = Option("pairs", "name=value", positional=True, many=True)
    optional = [Option(**{**_fields(o), "required": False}) for o in command.options]
    values = parse((*optional, pairs), words)
    given: Record = {}
    for word in values.pop("pairs", []):
        found = _PAIR.fullmatch(word)
        if found is None:
            raise Usage(f"an argument is written --name value or name=value, not {word!r}")
        if found[1] not in arguments:
            raise Usage(f"there is no argument {found[1]}", nearest_hint(found[1], arguments))
        given[found[1]] = _from_text(arguments[found[1]], found[2])
    timeout = values.pop("timeout", None) if "timeout" not in arguments else None
    for name, value in values.items():
        text = isinstance(value, str)
        given[name] = _from_text(arguments[name], value) if text else value
    missing = [o for o in command.options if o.required and o.name not in given]
    if missing:
        raise Usage(f"{missing[0].label} is missing: {missing[0].help}".removesuffix(": "))
    return given, timeout


def _fields(option: Option) -> Record:
    return {name: getattr(option, name) for name in option.__dataclass_fields__}


def _from_text(argument: Record, text: str) -> Any:
    """A value as somebody wrote it: text where text is wanted, else JSON. Raises Usage."""
    kind = argument["type"].removesuffix("?")
    if kind == "str":
        return text
    if kind == "bytes":
        return text.encode()
    try:
        return json.loads(text)
    except ValueError:
        if kind == "any":
            return text
        words = {"int": "a whole number", "float": "a number", "bool": "true or false",
                 "list": "a JSON list", "dict": "a JSON map"}  # fmt: skip
        raise Usage(f"{argument['name']} takes {words[kind]}, not {text!r}") from None


COMMAND = Command(
    name="call",
    summary="Call a service and print what it returns, as JSON",
    run=run,
    options=(
        _TIMEOUT,
        Option("words", "SERVICE.CALL, then its arguments as --name value or name=value; "
               "SERVICE alone shows its calls", positional=True, required=True, rest=True,
               metavar="SERVICE.CALL", complete="method"),
    ),
    examples=(
        "llmos call models.ls", "llmos call models.show --name shakespeare", "llmos call models",
    ),
)  # fmt: skip
