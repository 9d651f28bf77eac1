"""The zygote: a process with everything imported that forks workers in milliseconds.

    python -P -m llmos.drivers.worker.zygote SOCKET

A plain blocking loop: no asyncio, one OS thread, and it never computes (a child of a parent
that ran a two-thread matmul hangs for ever, since the OpenMP threads are not there after the
fork). It listens on a socket that the kernel dials, so it outlives a kernel and is adopted by
the next. It is the parent of the workers: it reaps them and writes each exit status to the
worker's folder before it tells anybody.

Messages (frames of kernel/wire.py). From the kernel:
    fork   worker_id, folder, log, cwd, env, cores, ranks, home, user, private
                                                              -> forked os_pid | failed error
    plan   ticket, entry, args, user, private                 -> planned segments | error
    end                                                       the zygote exits
`user` is whom the child becomes (drop.py); `private` names a file with the rest of the order.
To the kernel: ready, forked, failed, exited (worker_id, status), planned.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.metadata
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from llmos.drivers.worker import ranks
from llmos.drivers.worker.link import ALONE_S
from llmos.drivers.worker.output import forgive, write_whole
from llmos.drivers.worker.reap import WORKER_VARIABLE, let_go, reap
from llmos.kernel import drop
from llmos.kernel.errors import BadInput, LlmosError
from llmos.kernel.wire import Unpacker, pack

# The exit status of a zygote that finds another one of its home.
EXIT_OTHER = 75

# With no kernel and no child for this long nobody will ever ask again.
LONELY_S = 60.0

# An exit status that the disk did not take is tried again after so long.
UNWRITTEN_S = 1.0

# prctl(2): orphaned descendants become children of this process; the signal at the parent's end.
PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG = 1

# With workers it looks so often whether there is a kernel.
LOOK_S = 1.0

# One thread each: `import numpy` alone starts OpenBLAS threads, and a fork copies only the
# thread that forks. Workers raise the number for themselves after the fork.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

PRELOADED = (
    "torch",
    "numpy",
    "safetensors.torch",
    "tokenizers",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "accelerate",
    "peft",
    "llmos.drivers.worker.main",
)


# How much likelier a worker is than the kernel to be ended when the machine has no memory left:
# as if it held half of it. What a worker starts inherits it.
OOM_ABOVE, OOM_MOST = 500, 1000


class Zygote:
    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.listener.bind(path)
        os.chmod(path, 0o600)
        self.listener.listen(2)
        self.path = path
        self.kernel: socket.socket | None = None
        self.unpacker = Unpacker()
        self.workers: dict[int, tuple[str, Path]] = {}  # os_pid -> worker_id, folder
        self.unwritten: dict[Path, int] = {}  # exit statuses that the disk has not taken
        self.plans: dict[int, tuple[int, bytearray]] = {}  # pipe -> ticket, what it has said
        self.lonely_since = time.monotonic()
        self.alone_since: float | None = None  # since when there is no kernel
        self.alone_s = ALONE_S
        self.thawed = False
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until told to end, or left alone for good."""
        while True:
            watched: list[Any] = [self.listener, self.wake_read, *self.plans]
            if self.kernel is not None:
                watched.append(self.kernel)
            pause = LOOK_S if self.workers else UNWRITTEN_S if self.unwritten else LONELY_S
            ready, _, _ = select.select(watched, [], [], pause)
            for source in ready:
                if source is self.listener:
                    self.meet()
                elif source is self.kernel:
                    if not self.listen_to_kernel():
                        return
                elif source in self.plans:
                    self.read_plan(source)
            with contextlib.suppress(BlockingIOError):
                os.read(self.wake_read, 4096)
            self.reap()
            self.thaw_when_alone()
            self.write_exits()
            if self.kernel is not None or self.workers:
                self.lonely_since = time.monotonic()
            elif time.monotonic() - self.lonely_since > LONELY_S:
                return

    def thaw_when_alone(self) -> None:
        """Without a kernel for a while: who was held goes on, to a safepoint, and waits there."""
        if self.kernel is not None:
            self.alone_since = None
        elif self.alone_since is None:
            self.alone_since, self.thawed = time.monotonic(), False
        elif not self.thawed and time.monotonic() - self.alone_since >= self.alone_s:
            self.thawed = True
            for os_pid, (_, folder) in self.workers.items():
                let_go(os_pid, folder)

    def meet(self) -> None:
        """A kernel dials. The newest one is the one that counts."""
        connection, _ = self.listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = int.from_bytes(credentials[4:8], sys.byteorder)
        if uid != os.getuid():
            connection.close()
            return
        if self.kernel is not None:
            self.kernel.close()
        self.kernel, self.unpacker = connection, Unpacker()
        self.tell(
            {"k": "ready", "os_pid": os.getpid(), "threads": len(os.listdir("/proc/self/task")),
             "workers": {worker_id: os_pid for os_pid, (worker_id, _) in self.workers.items()}}
        )  # fmt: skip

    def tell(self, message: dict[str, Any]) -> None:
        """To the kernel, if there is one. What must not be lost lies on disk."""
        if self.kernel is None:
            return
        try:
            self.kernel.sendall(pack(message))
        except OSError:
            self.kernel.close()
            self.kernel = None

    def listen_to_kernel(self) -> bool:
        """Read what came; False when it was `end`."""
        assert self.kernel is not None
        try:
            data = self.kernel.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self.kernel.close()
            self.kernel = None
            return True
        for message in self.unpacker.feed(data):
            if message["k"] == "fork":
                self.fork_worker(message)
            elif message["k"] == "plan":
                self.fork_plan(message)
            elif message["k"] == "end":
                return False
        return True

    def fork_worker(self, order: dict[str, Any]) -> None:
        """Bind the worker's socket first: whoever is told of the fork can dial at once."""
        self.alone_s = float(order.get("alone_s", ALONE_S))
        folder = Path(order["folder"])
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            listener = socket.socket(socket.AF_UNIX)
            address = str(folder / "sock")
            for old in (address, str(folder / "exit")):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(old)
            listener.bind(address)
            os.chmod(address, 0o600)
            listener.listen(4)
            os_pid = os.fork()
        except OSError as exc:
            self.tell({"k": "failed", "worker_id": order["worker_id"], "error": str(exc)})
            return
        if os_pid == 0:
            self.become_worker(order, listener)
        listener.close()
        self.workers[os_pid] = (order["worker_id"], folder)
        self.tell({"k": "forked", "worker_id": order["worker_id"], "os_pid": os_pid})

    def become_worker(self, order: dict[str, Any], listener: socket.socket) -> NoReturn:
        status = 70  # what a shell calls an internal software error
        try:
            self.leave_parent(keep=listener.fileno())
            order = {**drop.read_private(order), "owner": os.getuid()}
            leave_session()
            drop.become(order.get("user"))
            order["env"] = {**drop.environment(order.get("user")), **(order.get("env") or {})}
            settle(order)
            forgive()
            team = ranks.fork(order, listener)
            main = importlib.import_module("llmos.drivers.worker.main")
            status = main.main(order, listener, team)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            # Not sys.exit: the parent's exit handlers and buffers are not this process's.
            os._exit(status)

    def fork_plan(self, order: dict[str, Any]) -> None:
        read, write = os.pipe()
        os_pid = os.fork()
        if os_pid == 0:
            try:
                self.leave_parent(keep=write)
                order = drop.read_private(order)
                drop.become(order.get("user"))
                answer = plan(order)
                with os.fdopen(write, "wb") as out:
                    out.write(pack(answer))
            finally:
                os._exit(0)
        os.close(write)
        self.plans[read] = (order["ticket"], bytearray())

    def read_plan(self, pipe: int) -> None:
        ticket, collected = self.plans[pipe]
        data = os.read(pipe, 1 << 16)
        if data:
            collected += data
            return
        os.close(pipe)
        del self.plans[pipe]
        answers = list(Unpacker().feed(bytes(collected))) if collected else []
        if not answers:
            error = {"code": "worker-lost", "message": "the planner died", "hint": ""}
            answers = [{"error": error}]
        self.tell({"k": "planned", "ticket": ticket, **answers[0]})

    def reap(self) -> None:
        """Collect dead children; a worker's status goes to disk, then to the kernel.

        Among them are planners, and the ranks of workers that died before them.
        """
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            if found.si_pid in self.workers:
                self.bury(found.si_pid)
            else:
                os.waitpid(found.si_pid, 0)

    def bury(self, os_pid: int) -> None:
        worker_id, folder = self.workers.pop(os_pid)
        status = reap(os_pid, folder)
        assert status is not None, "it has ended"
        self.unwritten[folder] = status
        self.write_exits()
        self.tell({"k": "exited", "worker_id": worker_id, "status": status})

    def write_exits(self) -> None:
        """On a full disk they wait here for room."""
        for folder, status in list(self.unwritten.items()):
            if write_exit(folder, status):
                del self.unwritten[folder]

    def leave_parent(self, keep: int) -> None:
        """In a child: nothing of the zygote's sockets, pipes and signals stays."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        limit = 3 + max(int(n) for n in os.listdir("/proc/self/fd"))
        os.closerange(3, keep)
        os.closerange(keep + 1, limit)


def write_exit(folder: Path, status: int) -> bool:
    """Leave the exit status where a later kernel finds it -> False when it must be tried again."""
    try:
        write_whole(folder / "exit", {"status": status})
    except FileNotFoundError:
        return True  # the kernel knows already: it has cleaned up
    except OSError:
        return False
    return True


def leave_session() -> None:
    """Make the forked child an OS process of its own for the system's scheduler and its end."""
    os.setsid()
    # Sessions are scheduling groups where autogroup is on: nice alone does nothing between
    # them. 0 is the middle; the kernel is what decides among workers.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("0")
    # Raising it needs no privilege, lowering it would: the kernel and the services keep theirs.
    with contextlib.suppress(OSError, ValueError):
        adjust = Path("/proc/self/oom_score_adj")
        adjust.write_text(str(min(OOM_MOST, int(adjust.read_text()) + OOM_ABOVE)))


def settle(order: dict[str, Any]) -> None:
    """Its folder, log, environment and cores, as the user whose process it is."""
    # With the zygote goes who would let it go on when no kernel comes: it is let go at once. A
    # kernel that lives holds it again. (Here: who becomes another user is asked anew.)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)
    os.environ.update(order.get("env") or {})
    os.environ[WORKER_VARIABLE] = order["folder"]
    with contextlib.suppress(OSError):
        os.chdir(order.get("cwd") or order["home"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open("/dev/null", os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    if order.get("cores"):
        os.sched_setaffinity(0, order["cores"])


def plan(order: dict[str, Any]) -> dict[str, Any]:
    """Run a program's plan -> {"segments"} or {"error"}."""
    from llmos.drivers.worker.programs import build_args, load_program

    if not order["entry"]:
        return look(order["args"]["paths"])
    # A child of its own makes each plan: nobody else sees this.
    os.environ["LLMOS_DEVICE"] = order["device"]
    try:
        program = load_program(order["entry"])
        footprint = program.plan(build_args(program, order["args"]))
    except LlmosError as exc:
        return {"error": exc.to_wire()}
    except Exception as exc:  # noqa: BLE001  a plugin's plan may raise anything; its caller is told
        import traceback

        traceback.print_exc()
        text = f"planning failed: {type(exc).__name__}: {exc}".splitlines()[0]
        return {"error": LlmosError(text, "the zygote's log has the whole story").to_wire()}
    return {"segments": footprint.to_wire()}


def look(paths: list[str]) -> dict[str, Any]:
    """Whether this user can open these folders and what lies in them -> a plan of nothing."""
    try:
        for path in paths:
            for name in os.listdir(path):
                os.close(os.open(os.path.join(path, name), os.O_RDONLY | os.O_NONBLOCK))
    except OSError as exc:
        text = f"{exc.filename} cannot be read: {exc.strerror}"
        return {"error": BadInput(text, "`llmos models` lists those of the home").to_wire()}
    return {"segments": []}


def preload() -> None:
    """Import what workers will need. Of programs only llmos's own: a plugin's code might do
    at import what must not be done before a fork."""
    for name in PRELOADED:
        importlib.import_module(name)
    for point in importlib.metadata.distribution("llmos").entry_points:
        if point.group == "llmos.programs":
            for name in (point.module, *point.load().preload):
                importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    # What is alive now lives for ever: the collector must not touch (and so copy) its pages.
    gc.collect()
    gc.freeze()


def be_the_one(path: str) -> bool:
    """Lock a file for as long as this process lives: while one zygote loads, a kernel that follows
    the one that started it would start another."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True  # never closed: children close what they have of it


def main() -> None:
    if not be_the_one(sys.argv[1] + ".lock"):
        raise SystemExit(EXIT_OTHER)
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"
    preload()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        sys.stderr.write(f"zygote: {threads} OS threads after preloading; forks may hang\n")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The ranks of a worker that dies come here to be reaped.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    zygote = Zygote(sys.argv[1])
    try:
        zygote.serve()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(zygote.path)


if __name__ == "__main__":
    main()
