"""Minutes of saturation through the gateway by locust: errors, memory, and the books at the end.

    python tests/bench/bench_load.py MODEL --peer-python PYTHON [--minutes 10] [--users 64]

MODEL is a folder, PYTHON has `locust`. Users ask for chats, completions (streamed and whole) and
vectors, without a pause; some leave in the middle of a stream. Printed each minute: the memory that
the kernel, the gateway and the engines have for themselves, and their open descriptors; at the end
what locust counted, every answer that was neither 200 nor 429 nor 503, and what the kernel's books
still promise once the engines are gone. Ends with status 1 when something is left, or was wrong.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_peers import Llmos
from bench_serving import engine_processes, private_bytes

from llmos.shell import Client

LOCUST = """
import json, random
from locust import HttpUser, constant, task

def words():
    return " ".join(random.choice("once upon a time there was a little dog".split())
                    for _ in range(random.randint(2, 60)))

class User(HttpUser):
    wait_time = constant(0)

    def judge(self, answer):
        if answer.status_code in (429, 503):
            answer.success() if answer.headers.get("retry-after") else answer.failure("no time")
        elif answer.status_code != 200:
            answer.failure(f"{answer.status_code}: {answer.text[:200]}")

    def ask(self, path, body, name):
        with self.client.post(path, json=body, name=name, catch_response=True) as answer:
            self.judge(answer)

    @task(4)
    def completion(self):
        self.ask("/v1/completions", {"model": "model", "prompt": words(), "max_tokens":
                 random.randint(1, 64), "temperature": 1.0}, "completion")

    @task(2)
    def vectors(self):
        self.ask("/v1/embeddings", {"model": "model", "input": [words(), words()]}, "embeddings")

    @task(4)
    def stream(self):
        body = {"model": "model", "prompt": words(), "max_tokens": 64, "stream": True}
        with self.client.post("/v1/completions", json=body, name="stream", stream=True,
                              catch_response=True) as answer:
            self.judge(answer)
            if answer.status_code == 200:
                lines = list(answer.iter_lines())
                if b"data: [DONE]" not in lines:
                    answer.failure("the stream did not end")

    @task(1)
    def leave(self):
        body = {"model": "model", "prompt": words(), "max_tokens": 200, "stream": True,
                "ignore_eos": True}
        with self.client.post("/v1/completions", json=body, name="leave", stream=True,
                              catch_response=True) as answer:
            self.judge(answer)
            if answer.status_code == 200:
                next(answer.iter_lines())
                answer.close()
                answer.success()
"""


def sizes(llmos: Llmos) -> dict[str, tuple[int, int]]:
    """Private bytes and open descriptors, by part."""
    with Client(llmos.home.path) as client:
        engines = engine_processes(client)
    pids = {"kernel": llmos.kernel, "gateway": llmos.gateway}
    pids |= {f"engine {n}": pid for n, pid in enumerate(sorted(engines), 1)}
    return {
        name: (private_bytes(pid), len(os.listdir(f"/proc/{pid}/fd"))) for name, pid in pids.items()
    }


def show(minutes: float, found: dict[str, tuple[int, int]]) -> None:
    parts = "   ".join(f"{n} {b / 2**20:.1f} MiB, {fds} fds" for n, (b, fds) in found.items())
    print(f"{minutes:4.1f} min   {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=64)
    args = parser.parse_args()
    args.model, args.dtype, args.tokens = os.path.abspath(args.model), "auto", 0
    with tempfile.TemporaryDirectory(prefix="l", dir="/tmp") as folder:
        llmos = Llmos(args, folder)
        try:
            right = measure(args, llmos, Path(folder))
        finally:
            llmos.close()
    sys.exit(not right)


def measure(args: argparse.Namespace, llmos: Llmos, work: Path) -> bool:
    (work / "locustfile.py").write_text(LOCUST)
    command = [args.peer_python, "-m", "locust", "-f", str(work / "locustfile.py"), "--headless",
               "-u", str(args.users), "-r", "16", "-t", f"{int(args.minutes * 60)}s",
               "--host", f"http://127.0.0.1:{llmos.port}", "--csv", str(work / "load"),
               "--exit-code-on-error", "0", "--only-summary"]  # fmt: skip
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        while load.poll() is None:
            time.sleep(min(60.0, args.minutes * 12))
            if load.poll() is None:
                show((time.monotonic() - began) / 60, sizes(llmos))
    with (work / "load_stats.csv").open() as file:
        for row in csv.DictReader(file):
            print(f"{row['Name']:<12} {row['Request Count']:>7} requests, {row['Failure Count']} "
                  f"failed, {float(row['Requests/s']):.1f}/s, p50 {row['50%']} ms, "
                  f"p99 {row['99%']} ms")  # fmt: skip
            failed = int(row["Failure Count"])
    with (work / "load_failures.csv").open() as file:
        for row in csv.DictReader(file):
            print(f"FAILED {row['Name']} {row['Error']} ({row['Occurrences']})")
    return books_are_right(llmos) and not failed


def books_are_right(llmos: Llmos) -> bool:
    """Whoever left is gone; unloaded engines promise nothing more."""
    deadline = time.monotonic() + 60
    with Client(llmos.home.path) as client:
        while time.monotonic() < deadline:
            live = [r for r in client.ps() if r["role"] == "guest"]
            if not live:
                break
            time.sleep(0.2)
        subprocess.run([sys.executable, "-P", "-m", "llmos.shell", "unload", "model"], check=True)
        time.sleep(3)
        kinds = [s["kind"] for d in client.mem() for s in d["segments"]]
        status = json.dumps(client.status()["devices"])
    print(f"left: {len(live)} guests; promised for: {', '.join(kinds) or 'nobody'}; {status}")
    return not live and set(kinds) <= {"system"}


if __name__ == "__main__":
    main()
