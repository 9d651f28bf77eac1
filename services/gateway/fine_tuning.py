"""/v1/fine_tuning/jobs: each is a process of `finetune`; what it is at, the kernel says."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llmos.kernel.errors import LlmosError, NoSuchProcess
from llmos.services.gateway.asked import registry_name, text_of
from llmos.services.gateway.errors import ApiError, bad
from llmos.services.gateway.fields import Fields
from llmos.services.gateway.files import Files
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.kernel import Kernel
from llmos.services.gateway.run import Whose
from llmos.services.gateway.store import Record, Store, page, shown
from llmos.services.gateway.web import answer, read_json

ENDED = ("succeeded", "failed", "cancelled")

# What the API calls the states of a process.
_STATUS = {
    "new": "validating_files", "planning": "validating_files", "waiting": "queued",
    "starting": "queued", "paused": "paused",
}  # fmt: skip

# Learning rates are told as a multiple of this, that of `finetune`.
LR = 5e-4
EPOCHS, BATCH = 3, 8

MOST_EVENTS = 100

# Arguments of `finetune` that follow from the rest of a job.
_OWN = ("model", "data", "out", "overwrite", "trust_remote_code")


class Jobs:
    def __init__(self, folder: Path, home: Path, files: Files, kernel: Kernel) -> None:
        self.store = Store(folder, "fine-tuning job")
        self._home, self._files, self._kernel = home, files, kernel

    # ---- over HTTP ----

    async def create(self, request: Request, whose: Whose) -> Response:
        made, args = self._understand(await read_json(request), whose)
        await asyncio.to_thread(self._prepare, made, args, whose)
        try:
            pid = await self._kernel.ask(
                lambda line: line.submit("finetune", args, name=args["out"], user=whose.user)
            )
        except LlmosError:
            self.store.delete(made["id"], whose)
            raise
        made["private"]["pid"] = pid
        self.store.save(made)
        return answer(shown(await self._look(made)))

    async def listed(self, request: Request, whose: Whose) -> Response:
        found = await asyncio.to_thread(self.store.of, whose)
        return answer(page([await self._look(job) for job in found], request.query_params))

    async def one(self, name: str, whose: Whose) -> Response:
        return answer(shown(await self._look(self.store.load(name, whose))))

    async def cancel(self, name: str, whose: Whose) -> Response:
        job = await self._live(name, whose)
        job["private"]["cancelled"] = True
        self.store.save(job)
        await self._kernel.ask(lambda line: line.kill(job["private"]["pid"]))
        return answer(shown(await self._look(job)))

    async def pause(self, name: str, whose: Whose) -> Response:
        job = await self._live(name, whose)
        await self._kernel.ask(lambda line: line.pause(job["private"]["pid"]))
        return answer(shown(await self._look(job)))

    async def resume(self, name: str, whose: Whose) -> Response:
        job = await self._live(name, whose)
        await self._kernel.ask(lambda line: line.resume(job["private"]["pid"]))
        return answer(shown(await self._look(job)))

    async def events(self, name: str, request: Request, whose: Whose) -> Response:
        job = await self._look(self.store.load(name, whose))
        found = [_event(job, n, told) for n, told in enumerate(await self._records(job))]
        first = _message(job, 0, job["created_at"], f"Created fine-tuning job: {job['id']}")
        last = _last(job)
        events = [first, *filter(None, found), *([last] if last else [])]
        return answer(page(events[::-1], request.query_params))

    async def checkpoints(self, name: str, request: Request, whose: Whose) -> Response:
        job = self.store.load(name, whose)
        metrics = {r["step"]: r["metrics"] for r in await self._records(job)
                   if r["kind"] == "progress"}  # fmt: skip
        folder = self._home / "procs" / str(job["private"]["pid"]) / "checkpoints"
        steps = sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*")
                       if p.name.removeprefix("step-").isdecimal())  # fmt: skip
        found = [_checkpoint(job, folder, step, metrics.get(step, {})) for step in steps[::-1]]
        return answer(page(found, request.query_params))

    # ---- a new one ----

    def _understand(self, body: Any, whose: Whose) -> tuple[Record, Record]:
        """-> the job, and the arguments of its process. Raises ApiError."""
        f = Fields(body)
        model = registry_name(f.text("model", required=True), "model")
        file = f.text("training_file", required=True)
        self._files.content(file, whose)
        f.refuse("validation_file", "a part of the training file is held out (llmos.val_fraction)")
        f.refuse("integrations", "there are none")
        old = Fields(f.map("hyperparameters"), "hyperparameters.")
        method = Fields(f.map("method"), "method.")
        method.only("type", "supervised")
        supervised = Fields(method.map("supervised"), "method.supervised.")
        method.done()
        new = Fields(supervised.map("hyperparameters"), "method.supervised.hyperparameters.")
        supervised.done()
        hyper = {**_hyperparameters(old), **_hyperparameters(new)}
        seed = f.integer("seed", low=0, high=2**31 - 1)
        suffix = f.text("suffix")
        metadata = f.map("metadata") or None
        more = f.map("llmos")  # arguments of `finetune` itself
        for name in more.keys() & set(_OWN):
            raise bad(f"llmos.{name}", f"'llmos.{name}' follows from the rest of the job.")
        f.done()
        name = new_id("ftjob")
        out = suffix or f"{model}-{name[-8:]}"
        args = {
            "model": model, "out": out, "method": "lora", "epochs": hyper.get("n_epochs", EPOCHS),
            "batch": hyper.get("batch_size", BATCH),
            "lr": LR * hyper.get("learning_rate_multiplier", 1.0), "seed": seed or 0, **more,
        }  # fmt: skip
        told = {"n_epochs": args["epochs"], "batch_size": args["batch"],
                "learning_rate_multiplier": args["lr"] / LR}  # fmt: skip
        made: Record = {
            "id": name, "object": "fine_tuning.job", "created_at": int(time.time()),
            "finished_at": None, "fine_tuned_model": None, "hyperparameters": told, "model": model,
            "organization_id": "llmos", "result_files": [], "seed": args["seed"],
            "status": "validating_files", "trained_tokens": None, "training_file": file,
            "validation_file": None, "error": None, "estimated_finish": None, "integrations": [],
            "metadata": metadata, "suffix": suffix or None,
            "method": {"type": "supervised", "supervised": {"hyperparameters": told}},
            "private": {"pid": 0, "out": out, "cancelled": False},
        }  # fmt: skip
        return made, args

    def _prepare(self, made: Record, args: Record, whose: Whose) -> None:
        """The data where its process can read it."""
        source = self._files.content(made["training_file"], whose)
        self.store.make(made, whose)
        data = self.store.path(made["id"], "data.jsonl")
        try:
            convert(source, data)
        except BaseException:
            self.store.delete(made["id"], whose)
            raise
        if whose.user:  # root's gateway: the process is somebody else
            found = pwd.getpwnam(whose.user)
            os.chown(data, found.pw_uid, found.pw_gid)
            for folder in (data.parent, *data.parent.parents):
                if folder == self._home:
                    break
                folder.chmod(0o711)
        args["data"] = str(data)

    # ---- what it is at ----

    async def _live(self, name: str, whose: Whose) -> Record:
        job = await self._look(self.store.load(name, whose))
        if job["status"] in ENDED:
            raise bad(None, f"Job {name} has ended already: it is {job['status']}.")
        return job

    async def _look(self, job: Record) -> Record:
        """The job as its process is now."""
        pid = job["private"]["pid"]
        if job["status"] in ENDED or not pid:
            return job
        try:
            process = await self._kernel.ask(lambda line: line.process(pid))
        except NoSuchProcess:
            told = {"code": "lost", "message": f"process {pid} was forgotten", "param": None}
            job |= {"status": "failed", "error": told, "finished_at": int(time.time())}
            self.store.save(job)
            return job
        if process["state"] != "exited":
            job["status"] = _STATUS.get(process["state"], "running")
            return job
        job["finished_at"] = int(process["ended_at"] or time.time())
        status = process["exit_status"]
        if status == 0:
            result = process["result"]
            tokens = result.get("tokens") or result.get("trained_tokens")
            job |= {"status": "succeeded", "fine_tuned_model": job["private"]["out"],
                    "trained_tokens": tokens}  # fmt: skip
        elif job["private"]["cancelled"]:
            job["status"] = "cancelled"
        else:
            why = process["reason"] or f"exit status {status}"
            told = {"code": "failed", "message": f"process {pid}: {why}", "param": None}
            job |= {"status": "failed", "error": told}
        self.store.save(job)
        return job

    async def _records(self, job: Record) -> list[Record]:
        """What its process has told so far."""
        pid = job["private"]["pid"]

        async def read(line: Any) -> list[Record]:
            return [record async for record in line.attach(pid, follow=False)]

        try:
            return await self._kernel.ask(read)
        except NoSuchProcess:
            return []


def _hyperparameters(f: Fields) -> dict[str, float]:
    """Those that were told; "auto" is what `finetune` does by itself."""
    found = {}
    for name, low in (("n_epochs", 0.001), ("batch_size", 1), ("learning_rate_multiplier", 0.0)):
        value = f.any(name)
        if value in (None, "auto"):
            continue
        number = Fields({name: value}, "hyperparameters.").number(name, 0.0, low)
        found[name] = int(number) if name == "batch_size" else number
    f.done()
    return found


# ---- the data ----


def convert(source: Path, target: Path) -> None:
    """Lines of OpenAI's chats as `finetune` reads them: contents are texts. Rows with a prompt and
    a completion are taken as they are. Raises ApiError that names the line."""
    with source.open("rb") as lines, target.open("x") as made:
        count = 0
        for number, raw in enumerate(lines, 1):
            if raw.strip():
                made.write(json.dumps(_row(number, raw), ensure_ascii=False) + "\n")
                count += 1
    if not count:
        raise _bad_line(1, "the file has no lines")


def _row(number: int, raw: bytes) -> Record:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise _bad_line(number, f"not JSON: {exc}") from None
    if not isinstance(row, dict):
        raise _bad_line(number, "a line is an object")
    if "messages" not in row:
        if all(isinstance(row.get(key), str) for key in ("prompt", "completion")):
            return {"prompt": row["prompt"], "completion": row["completion"]}
        raise _bad_line(number, "messages is missing (or prompt and completion)")
    messages = row["messages"]
    if not isinstance(messages, list):
        raise _bad_line(number, "messages is a list")
    return {"messages": [_turn(number, message) for message in messages]}


def _turn(number: int, message: Any) -> Record:
    role = message.get("role") if isinstance(message, dict) else None
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise _bad_line(number, f"a role is system, user or assistant, not {role!r}")
    if message.get("tool_calls") or message.get("weight") not in (None, 1):
        raise _bad_line(number, "calls of tools and weights are not learnt")
    try:
        text = text_of(message.get("content"), "content")
    except ApiError as exc:
        raise _bad_line(number, exc.message) from None
    if text is None:
        raise _bad_line(number, "a message has no content")
    return {"role": role, "content": text}


def _bad_line(number: int, why: str) -> ApiError:
    return bad("training_file", f"Line {number} of the training file: {why}.",
               "invalid_training_file")  # fmt: skip


# ---- events and checkpoints ----


def _message(job: Record, number: int, at: float, text: str, level: str = "info") -> Record:
    return {
        "id": f"ftevent-{job['id'][-12:]}{number:012x}", "object": "fine_tuning.job.event",
        "created_at": int(at), "level": level, "message": text, "data": None, "type": "message",
    }  # fmt: skip


def _event(job: Record, number: int, record: Record) -> Record | None:
    """What a record is for a person who follows the job; None: nothing."""
    made = _message(job, number + 1, record["at"], "")
    if record["kind"] == "note":
        return {**made, "message": record["text"]}
    if record["kind"] != "progress":
        return None
    metrics, step, total = record["metrics"], record["step"], record.get("total")
    data = {
        "step": step,
        "total_steps": total,
        **{_METRICS.get(k, k): v for k, v in metrics.items()},
    }
    loss = metrics.get("loss")
    told = f"Step {step}/{total}" if total else f"Step {step}"
    told += f": training loss={loss:.4f}" if loss is not None else ""
    if "val_loss" in metrics:
        told += f", validation loss={metrics['val_loss']:.4f}"
    return {**made, "message": told, "data": data, "type": "metrics"}


_METRICS = {"loss": "train_loss", "val_loss": "valid_loss"}


def _last(job: Record) -> Record | None:
    words = {
        "succeeded": f"New fine-tuned model created: {job['fine_tuned_model']}",
        "cancelled": "The job was cancelled",
        "failed": f"The job failed: {(job['error'] or {}).get('message')}",
    }
    if job["status"] not in ENDED:
        return None
    level = "error" if job["status"] == "failed" else "info"
    return _message(job, 0xFFFFFFFF, job["finished_at"], words[job["status"]], level)


def _checkpoint(job: Record, folder: Path, step: int, metrics: Record) -> Record:
    return {
        "id": f"ftckpt-{job['id'][-12:]}{step:012x}", "object": "fine_tuning.job.checkpoint",
        "created_at": int((folder / f"step-{step:09d}").stat().st_mtime),
        # While it trains, a model is talked to by its name: the newest checkpoint answers.
        "fine_tuned_model_checkpoint": job["private"]["out"], "fine_tuning_job_id": job["id"],
        "step_number": step,
        "metrics": {"step": step, **{_METRICS.get(k, k): v for k, v in metrics.items()}},
    }  # fmt: skip
