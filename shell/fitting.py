"""Find settings under which a program fits into some memory, by asking for its plan repeatedly.

Knows a few arguments by name (batch, accumulate, gradient_checkpointing, optimizer, method) and
uses those that a program's schema has. What a plan says is for whoever gives `predict`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

# The arguments of a program -> its plan (`total_bytes`, `footprint`).
Predict = Callable[[Record], Record]


@dataclass(frozen=True)
class Lever:
    """One setting that saves memory. `compute`: the work of a step is multiplied by about this."""

    argument: str
    value: Any
    compute: float
    label: str
    cost: str


CHECKPOINTING = Lever(
    "gradient_checkpointing", True, 1.33, "checkpointing", "each layer runs twice forward"
)
EIGHT_BIT = Lever(
    "optimizer", "adamw8bit", 1.05, "8-bit moments", "moments in 8 bits: about the same result"
)
LORA = Lever("method", "lora", 0.75, "LoRA", "only an adapter learns")

# From what changes the run least to what changes it most.
LADDER: tuple[tuple[Lever, ...], ...] = (
    (), (CHECKPOINTING,), (EIGHT_BIT,), (EIGHT_BIT, CHECKPOINTING), (LORA,), (LORA, CHECKPOINTING),
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Settings with their plan. `changed` is what differs from what was asked for."""

    changed: Record
    levers: tuple[Lever, ...]
    plan: Record

    @property
    def total_bytes(self) -> int:
        """Without the copy that checkpoints are written from: it is made where there is room."""
        copies = sum(s["bytes"] for s in self.plan["footprint"] if s["kind"] == "checkpoint")
        return int(self.plan["total_bytes"]) - int(copies)

    @property
    def compute(self) -> float:
        product = 1.0
        for lever in self.levers:
            product *= lever.compute
        return product

    @property
    def label(self) -> str:
        """The settings in few words."""
        said = [lever.label for lever in self.levers]
        if "batch" in self.changed:
            said.insert(0, f"batch {self.changed['batch']} x {self.changed['accumulate']}")
        return ", ".join(said) or "as asked"

    @property
    def cost(self) -> str:
        said = [lever.cost for lever in self.levers]
        if "batch" in self.changed:
            said.insert(0, "the same step in smaller pieces")
        return "; ".join(said)


def choices(
    schema: Record, args: Record, capacity: int, predict: Predict
) -> tuple[list[Choice], Choice]:
    """(those that fit, least changed first; the one that needs least).

    Each rung of the ladder is tried with the largest micro-batch that fits, accumulating so that a
    step sees as many examples as before.
    """
    fields = {f["name"]: f for f in schema["args"]}
    fitting: list[Choice] = []
    least: Choice | None = None
    for levers in LADDER:
        if not all(_applies(lever, fields, args) for lever in levers):
            continue
        choice = _by_batch(levers, fields, args, capacity, predict)
        if least is None or choice.total_bytes < least.total_bytes:
            least = choice
        if choice.total_bytes <= capacity:
            fitting.append(choice)
        if fitting and not fitting[0].changed:
            break  # it fits as it is
    assert least is not None, "the first rung pulls no lever"
    return fitting, least


def _applies(lever: Lever, fields: Record, args: Record) -> bool:
    """Does the program have the argument, and another value of it?"""
    field = fields.get(lever.argument)
    if field is None or _value(fields, args, lever.argument) == lever.value:
        return False
    allowed = field.get("choices")
    return not allowed or lever.value in allowed


def _by_batch(
    levers: tuple[Lever, ...], fields: Record, args: Record, capacity: int, predict: Predict
) -> Choice:
    """The largest micro-batch that fits with these levers; the smallest when none does.

    The peak grows with the micro-batch, on a line or faster and faster (LoRA is flat at first): a
    line through both ends says where to begin, and larger ones are tried while they fit.
    """

    def choice(parts: int) -> Choice:
        changed: Record = {lever.argument: lever.value for lever in levers}
        if parts > 1:
            changed["batch"] = -(-batch // parts)
            changed["accumulate"] = accumulate * parts
        return Choice(changed, levers, predict({**args, **changed}))

    whole = "batch" in fields and "accumulate" in fields
    batch = int(_value(fields, args, "batch")) if whole else 1
    accumulate = int(_value(fields, args, "accumulate")) if whole else 1
    first = choice(1)
    if first.total_bytes <= capacity or batch == 1:
        return first
    best = choice(batch)
    if best.total_bytes > capacity:
        return best
    slope = (first.total_bytes - best.total_bytes) / (batch - 1)
    reach = 1 + (capacity - best.total_bytes) / slope  # the micro-batch at which the line is full
    sizes = [n for n in range(2, batch) if batch % n == 0]  # parts, so the largest batch first
    for parts in (n for n in sizes if batch // n <= reach):
        found = choice(parts)
        if found.total_bytes <= capacity:
            best = found
            break
    for parts in (n for n in reversed(sizes) if batch // n > reach):
        found = choice(parts)
        if found.total_bytes > capacity:
            break
        best = found
    return best


def _value(fields: Record, args: Record, name: str) -> Any:
    return args.get(name, fields[name]["default"])
