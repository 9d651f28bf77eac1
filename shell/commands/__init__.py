"""The table of commands: one verb, one module in this folder, each with a `COMMAND`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmos.shell.options import Command

# In the order of `help`. Programs (pretrain, finetune, gan, a plugin's) are not here: they come
# from the manifest, through commands/program.py.
GROUPS: dict[str, tuple[str, ...]] = {
    "Machine": ("boot", "shutdown", "demo", "status", "mem", "plan", "top", "dmesg", "sim", "fsck"),
    "Inference": ("run", "chat", "batch"),
    "Processes": (
        "ps", "attach", "logs", "wait", "explain", "kill", "pause", "resume", "checkpoint",
        "nice", "renice",
    ),
    "Models and services": (
        "pull", "models", "load", "unload", "serve", "key", "service", "call",
    ),
    "Help": ("help", "version"),
}  # fmt: skip

NAMES: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)

# What other systems call it, and fingers know.
ALIASES: dict[str, tuple[str, ...]] = {
    "list": ("models",), "ls": ("models",), "show": ("models", "show"), "rm": ("models", "rm"),
    "stop": ("unload",),
}  # fmt: skip

# Programs that have a verb of their own, by the program's name.
PROGRAM_VERBS = {"infer": "run", "chat": "chat", "pull": "pull"}


def named(name: str) -> Command:
    """The command of a name in `NAMES`; only its own module is imported."""
    module = importlib.import_module(f"llmos.shell.commands.{name}")
    command: Command = module.COMMAND
    return command
