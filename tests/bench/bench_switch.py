"""Two models that do not fit together, each with a chat: what the next turn costs after a switch.

    python tests/bench/bench_switch.py MODEL MODEL [--dtype bfloat16] [--turn 400] [--rounds 5]

MODELs are folders. The device has room for one engine. Chats take turns, so that each turn unloads
the other's engine and loads its own; then the same conversations once more: with the model loaded
and the chat's keys and values in it (warm), and from nothing (cold: a new process that is told the
whole conversation, and whose engine has to be loaded). Printed: time from sending to the first
token, medians over the rounds, and how much of the conversation was not computed again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.shell import Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone

WORDS = (
    "once", "upon", "a", "time", "there", "was", "little", "girl", "who", "liked", "to", "play",
    "in", "the", "park", "with", "her", "dog",
)  # fmt: skip
MADE = 8  # tokens of an answer
MIB = 2**20
LOOK_S = 12.0  # after so long the kernel has measured what has grown


@dataclass
class Chat:
    """One conversation, and its process if there is one."""

    model: str
    pid: int = 0
    stream: Any = None
    history: list[dict[str, str]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # what the last turn's record says


class Bench:
    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self.client, self.args, self.random = client, args, random.Random(0)

    def open(self, model: str) -> Chat:
        settings = {"model": model, "dtype": self.args.dtype, "max_tokens": MADE,
                    "temperature": 0.0, "ignore_eos": True}  # fmt: skip
        chat = Chat(model, self.client.submit("chat", settings))
        chat.stream = self.client.attach(chat.pid)
        return chat

    def close(self, chat: Chat) -> None:
        self.client.send(chat.pid, {"end": True})
        self.client.wait(chat.pid)

    def say(self, chat: Chat, text: str, began: float = 0.0) -> float:
        """-> seconds to the first token; returns when the turn is over."""
        began, first, answer = began or time.perf_counter(), 0.0, ""
        self.client.send(chat.pid, {"prompt": text})
        for record in chat.stream:
            if record["kind"] == "text":
                first = first or time.perf_counter() - began
                answer += record["text"]
            if record["kind"] == "turn":
                chat.last = record
                break
        else:
            raise AssertionError("the chat has ended")
        assert first, "a turn without text"
        told = {"role": "user", "content": text}, {"role": "assistant", "content": answer}
        chat.history.extend(told)
        return first

    def text(self, words: int) -> str:
        return " ".join(self.random.choice(WORDS) for _ in range(words))


def measure(client: Client, args: argparse.Namespace) -> None:
    bench = Bench(client, args)
    list(client.run(args.models[0], "once", max_tokens=1, dtype=args.dtype))
    time.sleep(LOOK_S)  # what llmos itself takes has grown
    chats = [bench.open(model) for model in args.models]
    for chat in chats:
        bench.say(chat, bench.text(args.turn))
    found: dict[tuple[str, str], list[float]] = {}
    kept: dict[tuple[str, str], list[float]] = {}

    def note(what: str, chat: Chat, seconds: float) -> None:
        key = Path(chat.model).name, what
        found.setdefault(key, []).append(seconds)
        share = chat.last["cached_tokens"] / chat.last["prompt_tokens"]
        kept.setdefault(key, []).append(share)

    for _ in range(args.rounds):
        for chat in chats:  # the other one's turn was the last: this is a switch
            note("switch", chat, bench.say(chat, bench.text(4)))
            note("warm", chat, bench.say(chat, bench.text(4)))
    for _ in range(args.rounds):
        for chat in chats:
            began = time.perf_counter()
            new = bench.open(chat.model)
            client.send(new.pid, {"history": chat.history})
            note("cold", new, bench.say(new, bench.text(4), began))
            bench.close(new)
    for (model, what), seconds in sorted(found.items()):
        share = statistics.median(kept[model, what])
        middle, worst = statistics.median(seconds) * 1e3, max(seconds) * 1e3
        print(f"{model:<16} {what:<8} first token {middle:7.0f} ms (worst {worst:.0f})   "
              f"{share:4.0%} of the conversation kept")  # fmt: skip
    for chat in chats:
        print(f"{Path(chat.model).name:<16} conversation: {chat.last['prompt_tokens']} tokens")
        bench.close(chat)


def learn(home: Home, args: argparse.Namespace) -> int:
    """Bytes that hold llmos and one engine, not two; by a kernel that has room for both, and leaves
    what it has measured in the home."""
    status = boot(home)
    with Client(home.path) as client:
        bench = Bench(client, args)
        for chat in [bench.open(model) for model in args.models]:
            bench.say(chat, bench.text(args.turn))
            bench.close(chat)
        time.sleep(LOOK_S)
        segments = [s for d in client.mem() for s in d["segments"]]
        held: dict[int, int] = {}
        for s in segments:
            held[s["pids"][0]] = held.get(s["pids"][0], 0) + int(s["bytes"])
        client.shutdown()
    wait_gone(status["kernel"]["os_pid"], 60)
    system, *engines = (held[pid] for pid in sorted(held))
    room = system + max(engines) + min(engines) // 2
    print(f"llmos {system // MIB} MiB, engines {' and '.join(str(e // MIB) for e in engines)} MiB; "
          f"the device has {room // MIB} MiB")  # fmt: skip
    return room


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turn", type=int, default=400, help="words of the first turn")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.models = [str(Path(m).resolve()) for m in args.models]
    with tempfile.TemporaryDirectory(prefix="l", dir="/tmp") as folder:
        home = Home(Path(folder))
        room = learn(home, args)
        status = boot(home, [f"cpu0:memory={room}"])
        with Client(home.path) as client:
            measure(client, args)
            client.shutdown()
        wait_gone(status["kernel"]["os_pid"], 60)


if __name__ == "__main__":
    main()
