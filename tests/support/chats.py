"""A kernel that answers a chat's messages by hand, as the program `chat` does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.scripted import Scripted, Send

FIELDS = [
    ("model", "str", True, None), ("system", "str", False, ""), ("max_tokens", "int", False, 512),
    ("temperature", "float", False, 0.8), ("stop", "list", False, []),
    ("loud", "bool", False, False), ("seed", "int?", False, None),
    ("dtype", "str", False, "auto"), ("logprobs", "int?", False, None),
]  # fmt: skip
SCHEMA: dict[str, Any] = {
    "name": "chat",
    "engine_args": ["model", "dtype"],
    "args": [
        {"name": name, "type": kind, "required": required, "default": default,
         "help": f"the {name}", "model": False, "path": False, "positional": name == "model"}
        for name, kind, required, default in FIELDS
    ],
    "examples": [],
}  # fmt: skip
# `run` takes what a chat takes, and a prompt.
_PROMPT = {**SCHEMA["args"][0], "name": "prompt", "required": False, "default": ""}
_N = {**SCHEMA["args"][2], "name": "n", "default": 1}
PROGRAMS = {
    "chat": SCHEMA,
    "infer": {**SCHEMA, "name": "infer", "args": [*SCHEMA["args"], _PROMPT, _N]},
}


class Chats:
    """Each turn is echoed, then ended; `inputs` has what the processes were sent."""

    def __init__(self, home: Path) -> None:
        self.streams: dict[int, Send] = {}
        self.inputs: list[dict[str, Any]] = []
        self.killed: list[int] = []
        self.submitted: list[dict[str, Any]] = []
        self.interrupts = 0  # presses of Ctrl-C in the midst of the next answers
        self.why = "stop"  # how an answer ends
        self.silent = False  # an answer has no text
        self.endless = False  # an answer does not end by itself
        self.deaf = False  # it does not hear a stop
        self.knows = {"history", "end"}  # of the newer messages
        self.offset = 0
        self.ended: dict[int, str] = {}
        self.server = Scripted(
            home,
            programs=lambda args, send: send(
                {"ok": {"programs": PROGRAMS, "services": {}, "errors": []}}
            ),
            submit=self.submit,
            attach=lambda args, send: self.streams.update({args["pid"]: send}),
            send=self.send,
            kill=self.kill,
            ps=self.ps,
        )

    @property
    def prompts(self) -> list[str]:
        return [i["prompt"] for i in self.inputs if "prompt" in i]

    def submit(self, args: dict[str, Any], send: Send) -> None:
        self.submitted.append(args)
        send({"ok": {"pid": len(self.submitted)}})

    def kill(self, args: dict[str, Any], send: Send) -> None:
        self.killed.append(args["pid"])
        send({"ok": {"pid": args["pid"]}})

    def ps(self, args: dict[str, Any], send: Send) -> None:
        why = self.ended.get(args["pid"])
        state = (
            {"state": "exited", "reason": why} if why else {"state": "waiting", "reason": "input"}
        )
        send({"ok": [{"pid": args["pid"], **state}]})

    def end(self, pid: int, status: int, reason: str) -> None:
        self.ended[pid] = reason
        self.streams[pid]({"ok": {"pid": pid, "exit_status": status, "reason": reason}})

    def send(self, args: dict[str, Any], send: Send) -> None:
        pid, message = args["pid"], args["message"]
        if pid in self.ended:
            send({"error": {"code": "illegal-move", "message": f"process {pid} takes no input"}})
            return
        self.inputs.append({"pid": pid, **message})
        send({"ok": {"pid": pid}})
        match message:
            case {"prompt": "die"}:
                self.record(pid, kind="text", text="half an ans")
                self.end(pid, 137, "killed by SIGKILL")
            case {"prompt": "refuse"}:
                self.record(pid, kind="note", text="the prompt is too long")
            case {"prompt": _} if self.endless:
                for n in range(1, 42):
                    self.record(pid, kind="text", text=f"{n} ")
            case {"prompt": prompt}:
                if not self.silent:
                    self.record(pid, kind="text", text=f"you said {prompt}")
                if self.interrupts:
                    self.interrupts -= 1
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    self.turn(pid, 3, self.why)
            case {"stop": True} if not self.deaf:
                self.turn(pid, 1, "interrupted")
            case {"stop": True} if self.interrupts:
                self.interrupts -= 1
                os.kill(os.getpid(), signal.SIGINT)
            case {"history": messages} if "history" in self.knows:
                self.record(pid, kind="history", turns=len(messages) // 2)
            case {"end": True} if "end" in self.knows:
                self.end(pid, 0, "")
            case {"history": _} | {"end": _}:
                self.record(pid, kind="note", text="a chat cannot read this message")

    def turn(self, pid: int, tokens: int, why: str) -> None:
        self.record(pid, kind="turn", tokens=tokens, finish_reason=why, first_token_s=0.01,
                    tokens_per_s=50.0, prompt_tokens=7)  # fmt: skip

    def record(self, pid: int, **record: Any) -> None:
        self.offset += 1
        self.streams[pid]({"item": {"offset": self.offset, "record": {"at": 0.0, **record}}})


class Lines:
    """A person who types these lines, then leaves. An exception is raised where it stands."""

    keeps = True

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: Iterable[str | type[BaseException]] = iter(lines)

    def read(self) -> str:
        for line in self._lines:
            if isinstance(line, str):
                return line
            raise line
        raise EOFError
