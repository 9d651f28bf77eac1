"""What a program is: the contract between a worker and the code that it runs.

A program is a class found through the entry point group `llmos.programs`. Its module and
its `Args` must import without torch (the manifest is made from them in milliseconds);
torch is imported inside the methods, or in modules that the methods import.

    class Spin(Program):
        name = "spin"
        summary = "Multiply matrices: a load for tests and benchmarks"

        @dataclass(frozen=True)
        class Args:
            steps: int = arg(100, help="how many steps to run")

        def load(self, ctx): ...
        def step(self, ctx): return Report(step=1, total=self.args.steps) or Done()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

# The kinds of memory that the books know.
KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "kv",
    "checkpoint",
    "context",
    "system",
)

# The copy of a process's state that a checkpoint is written from while the process goes on. Where a
# device has no room for it, the kernel leaves it out, and the process stands still instead.
COPY = "checkpoint"


def arg(
    default: Any = MISSING,
    *,
    help: str,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    positional: bool = False,
    path: bool = False,
    local: bool = False,
    model: bool = False,
    output: bool = False,
    command: bool = False,
    env: str = "",
    interval: bool = False,
    duration: bool = False,
    plan_without: bool = False,
    shape: bool = True,
    plugin: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field of an argument schema.

    Without a default the argument is required. `path`: a file or folder, made absolute by
    the client; `local`: a name, or a path that is written as one (./x, ~/x, x.gguf). `model`: a
    registry name, a local path or a hub name; the kernel puts the folder in its place. `output`:
    the name of a model that the run makes; the kernel refuses one that exists unless the argument
    `overwrite` is set. `plan_without`: a plan can be made without it; it is an empty text then.
    `positional`: given without a flag on the command line. `command`: the words of somebody's
    command line, taken as they are to the end.
    `interval`: so many steps, or so much time (kernel/units.py). `duration`: a float of seconds
    that people write as 5m, 0 or -1 (for ever); its flag goes without the `_s` of its name.
    `env`: when it is not given, this variable of the submitter's environment is. `shape`: it may
    change how much memory a process takes, or what its plan refuses; a known profile is then one
    of the same value. `plugin`: a name of what is installed
    ("optimizers"), which are its choices. `minimum`/`maximum` are inclusive.
    """
    meta = {
        "help": help,
        "metavar": metavar,
        "choices": choices,
        "positional": positional,
        "path": path,
        "local": local,
        "model": model,
        "output": output,
        "command": command,
        "env": env,
        "interval": interval,
        "duration": duration,
        "plan_without": plan_without,
        "shape": shape,
        "plugin": plugin,
        "minimum": minimum,
        "maximum": maximum,
    }
    if default is MISSING:
        return field(metadata=meta)
    if isinstance(default, list | dict):
        made = default
        return field(default_factory=lambda: type(made)(made), metadata=meta)
    return field(default=default, metadata=meta)


def save_every() -> Any:
    """The argument of a program with checkpoints: how often the worker writes one by itself."""
    return arg(
        "60s", help="checkpoint every so many steps (500) or so often (90s, 10min)",
        metavar="EVERY", interval=True, shape=False,
    )  # fmt: skip


def keep() -> Any:
    """The argument of a program with checkpoints: how many stay."""
    return arg(2, help="newest checkpoints that stay (0: all)", minimum=0, shape=False)


def save_in_place() -> Any:
    """The argument of a program that can `capture`: whether it does."""
    return arg(
        False,
        help="stand still while a checkpoint is written: saves the copy of the state in memory",
    )


def planned_device() -> str:
    """The kind of device ("cpu", "cuda") that a `plan` is made for."""
    return os.environ.get("LLMOS_DEVICE", "cpu").partition(":")[0]


@dataclass(frozen=True)
class Segment:
    """Some bytes of device memory, by kind. `shared` names a file whose mapping is counted once."""

    kind: str
    bytes: int
    shared: str = ""


@dataclass(frozen=True)
class Footprint:
    """The predicted peak of a process on its device."""

    segments: tuple[Segment, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(s.bytes for s in self.segments)

    def to_wire(self) -> list[dict[str, Any]]:
        return [{"kind": s.kind, "bytes": s.bytes, "shared": s.shared} for s in self.segments]


@dataclass(frozen=True)
class Report:
    """One step is done. `metrics` are plain floats; `total` is None when the end is not known.

    `shares` is set by an engine: how much of this step each guest (by pid) caused, in tokens.
    """

    step: int
    total: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The program has ended. `result` is shown by `wait` and `attach` (plain values only)."""

    status: int = 0
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Idle:
    """Nothing to do until a message comes (an engine without a runnable guest)."""


class Gate(Protocol):
    """Where a worker is held on a device that no signal stops (CUDA). Open and free elsewhere."""

    @property
    def active(self) -> bool:
        """Is this how the worker is held? If not, a program need not install anything."""
        ...

    def boundary(self, name: str) -> None:
        """Work for the device, called `name`, is queued next. To be called every few
        milliseconds of the device's time: a hold takes effect here."""
        ...

    def away(self) -> AbstractContextManager[None]:
        """Around what takes long and does not use the device (reading data): it can be held
        meanwhile, and goes on behind it when it has the device again."""
        ...


class OpenGate:
    """A Gate at which nobody is held: for planning."""

    active = False

    def boundary(self, name: str) -> None:
        pass

    def away(self) -> AbstractContextManager[None]:
        return nullcontext()


# A tensor -> one of the same numbers, contiguous and in host memory, that no later step changes.
# Tensors that share their memory share that of the copy.
Keep = Callable[["Tensor"], "Tensor"]


def as_it_is(tensor: Tensor) -> Tensor:
    """The Keep of a program that stands still while it is written: nothing is copied."""
    return tensor.detach()


@dataclass(frozen=True)
class Waiting:
    """The step goes on outside of this process; `step` is to be called again.

    That is when one of the descriptors `on` can be read, when `at_most_s` have passed or when a
    message came, whichever is first. Meanwhile the worker obeys, and uses no time. A program
    that waits in this way has the device: it is not `Idle`.
    """

    on: tuple[int, ...]
    at_most_s: float | None = None


class Context(Protocol):
    """What a worker offers to the program that runs in it."""

    pid: int
    home: Path  # the llmos home: models/ lies in it
    work: Path  # a folder of this process alone
    device: str  # for torch: "cpu", "cuda:0"
    threads: int  # CPU threads that torch may use in this worker
    environment: dict[str, str]  # what whoever submitted the process sent of theirs

    # On several devices the program is loaded and stepped once for each, in an OS process of its
    # own, and torch.distributed is ready. Rank 0 reports for all; every rank is asked to `save`.
    rank: int
    ranks: int

    def can_checkpoint(self) -> None:
        """From now on `save` works: for a program that learns it only while it runs."""
        ...

    @property
    def gate(self) -> Gate:
        """Where a step can be held on a GPU."""
        ...

    def clock(self) -> float:
        """Seconds that this worker had the device for, from any zero: a hold stops it.

        For rates and for limits of work; `time.monotonic` counts what others took, too.
        """
        ...

    def emit(self, kind: str, pid: int | None = None, **values: Any) -> None:
        """Append a record to the process's stream: what `attach` and `run` show.

        kinds: "text" (text=...), "note" (text=...: one line for the user), "progress"
        (made by the worker from every Report), "sample" (path=... of a picture), "eval"
        (metrics). `pid` names a guest; without it the record is this process's own.
        """
        ...

    def guest_done(self, pid: int, done: Done) -> None:
        """An engine's guest has ended."""
        ...

    def guest_idle(self, pid: int) -> None:
        """An engine's guest waits for input (a chat between turns)."""
        ...

    def call(self, method: str, /, **arguments: Any) -> Any:
        """Call a service ("models.register"). Raises LlmosError. Not inside `step` of an engine."""
        ...


@dataclass
class Guest:
    """A process that runs in an engine. `rank` is (class, nice, order): smaller goes first."""

    pid: int
    program: str
    args: dict[str, Any]
    rank: tuple[int, int, int]
    # What its stream has from an earlier engine, which died: it goes on behind that.
    records: list[dict[str, Any]] = field(default_factory=list)
    parked: bool = False  # paused by a person: keeps its memory, gets no step
    folder: Path | None = None  # its own, for what is to be there after this engine


class Program:
    """Base of all programs. Subclasses set the class variables and `Args`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    examples: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[str] = "programs"  # the heading in `llmos help`
    default_class: ClassVar[str] = "batch"
    hidden: ClassVar[bool] = False  # not offered on the command line
    # For a program whose processes are guests: the program that hosts them, and which of the
    # guest's arguments the host is chosen and started by.
    engine: ClassVar[str] = ""
    engine_args: ClassVar[tuple[str, ...]] = ()
    # Modules that the zygote may import before any worker is forked: a start is that much faster.
    # Importing them must not compute anything with torch and must not start a thread.
    preload: ClassVar[tuple[str, ...]] = ()
    # What Ctrl-C on an attached run does: "detach" (it has checkpoints), "kill", or "interrupt":
    # the process is sent SIGINT as a command in the foreground is, and may still have its say.
    on_interrupt: ClassVar[str] = "detach"
    guest_type: ClassVar[type[Guest]] = Guest  # what the worker hands to `admit`
    # It runs somebody's command, which knows nothing of llmos: it is given the whole environment of
    # whoever submits it; attached, it looks like the command; nothing is known of it but what it
    # says by itself (services/steps.py), and its memory is declared.
    foreign: ClassVar[bool] = False
    # False: it waits for a network or a disk and computes next to nothing. It gets an OS process of
    # its own at once, beside whoever has a device: it stands in no line, is never held, and nobody
    # is charged. `ctx.device` is empty, and torch is not made ready for it. When the kernel dies it
    # ends, too, and is started again by the next one.
    needs_device: ClassVar[bool] = True
    # Variables of the submitter's environment that it is given beside those that all programs are,
    # by the beginning of their names.
    environment: ClassVar[tuple[str, ...]] = ()
    # What its progress is counted in: "step", or "byte".
    progress_unit: ClassVar[str] = "step"

    @dataclass(frozen=True)
    class Args:
        pass

    def __init__(self, args: Any) -> None:
        self.args = args

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        """Predict the peak by kind and check the input files. Raises BadInput, BadArgument.

        Runs in a short-lived child with torch at hand; uses the meta device, allocates nothing.
        """
        return Footprint()

    def load(self, ctx: Context) -> None:
        """Bring everything to the device, as at the first step."""

    def step(self, ctx: Context) -> Report | Done | Idle | Waiting:
        """The smallest unit worth reporting. Between two calls the worker may checkpoint."""
        raise NotImplementedError

    # A program without a state of its own leaves `has_checkpoint` False. One that learns while
    # it runs that it has checkpoints sets it on itself, and calls `ctx.can_checkpoint()`.
    has_checkpoint: bool = False

    def save(self, folder: Path) -> int | None:
        """Write everything that `restore` needs into the empty `folder`: safetensors and JSON.

        For a program that makes a model the folder is also a loadable model folder. The worker
        gives a folder aside, syncs it, checksums it and renames it into place. Returns the step
        that was written where it is not the last that was reported. Raises IllegalMove when the
        program comes to no safepoint any more, TimedOut when to none now; the worker then goes on
        with the next step.
        """
        return None

    def capture(self, keep: Keep) -> Callable[[Path], None] | None:
        """`save` in two halves, so that steps can follow while the disk is busy.

        Every tensor that is to be written goes through `keep`, everything else is made into plain
        values; what is returned writes them into a folder, in another thread, and must not look
        at the running program. None: it can only `save`, and stands still.
        """
        return None

    def restore(self, folder: Path) -> None:
        """After `load`: go back to exactly the state that `save` wrote."""

    # It is told when its worker is asked to end (SIGTERM), and has a moment for its `close`.
    ends_in_order: ClassVar[bool] = False

    def close(self) -> None:
        """The worker ends, whatever the reason: let go of what lies outside of it."""

    def shrink(self, ctx: Context, level: str) -> bool:
        """Take less memory from now on, between two steps -> whether that was possible.

        "caches": drop what can be made again and nobody has asked for (the worker collects
        garbage and trims the allocator itself, afterwards). "batch": work in smaller pieces, to
        the same result but for the order of sums; only where the user has allowed it.
        """
        return level == "caches"

    def tensors(self) -> Iterable[Tensor]:
        """Everything on the device that must be whole for the next step: parameters, buffers,
        gradients, optimizer state, caches. Between two steps their memory may be moved out and
        back; views and tied weights may be given more than once."""
        return ()

    # Only engines:
    def admit(self, ctx: Context, guest: Guest) -> None:
        """A guest arrives."""

    def drop(self, ctx: Context, pid: int) -> None:
        """A guest was killed: its memory is free at the next step."""

    def rank(self, ctx: Context, pid: int, rank: tuple[int, int, int], parked: bool) -> None:
        """A guest was reniced, paused (`parked`) or resumed."""

    def message(self, ctx: Context, pid: int, message: dict[str, Any]) -> None:
        """Input for a guest (the next turn of a chat)."""

    def floor(self, class_rank: int) -> None:
        """Guests whose class is less urgent than this get no step until the next call."""


def describe(cls: type[Program]) -> dict[str, Any]:
    """The schema of a program as plain data, for the manifest."""
    hints = get_type_hints(cls.Args)
    return {
        "name": cls.name,
        "summary": cls.summary,
        "examples": list(cls.examples),
        "group": cls.group,
        "default_class": cls.default_class,
        "hidden": cls.hidden,
        "engine": cls.engine,
        "engine_args": list(cls.engine_args),
        "on_interrupt": cls.on_interrupt,
        "foreign": cls.foreign,
        "needs_device": cls.needs_device,
        "environment": list(cls.environment),
        "progress_unit": cls.progress_unit,
        "has_checkpoint": cls.has_checkpoint,
        "args": [_describe_field(f, hints[f.name]) for f in fields(cls.Args)],
    }


def _describe_field(f: Any, hint: Any) -> dict[str, Any]:
    made = f.default_factory() if f.default_factory is not MISSING else f.default
    return {
        "name": f.name,
        "type": _type_name(hint),
        "required": made is MISSING,
        "default": None if made is MISSING else made,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in f.metadata.items()},
    }


_TYPES: dict[Any, str] = {
    str: "str", int: "int", float: "float", bool: "bool", list[str]: "list", Any: "any",
}  # fmt: skip


def _type_name(hint: Any) -> str:
    """One of str, int, float, bool, list, any (plain values); `?` at the end: None is allowed."""
    if hint in _TYPES:
        return _TYPES[hint]
    inner = [h for h in getattr(hint, "__args__", ()) if h is not type(None)]
    if len(inner) == 1 and inner[0] in _TYPES:
        return _TYPES[inner[0]] + "?"
    raise TypeError(f"an argument schema knows str, int, float, bool, list[str], Any, not {hint}")
