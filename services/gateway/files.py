"""/v1/files: JSON lines that batches and fine-tunings are made of, and what batches give."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from llmos.services.gateway.errors import ApiError, bad
from llmos.services.gateway.fields import Fields
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.run import Whose
from llmos.services.gateway.store import Record, Store, no_room, page, shown
from llmos.services.gateway.web import Gone, answer

PURPOSES = ("batch", "fine-tune")
MOST_NAME = 200
UPLOAD_S = 3600.0

_PIECE_BYTES = 1 << 20


class Files:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder, "file")

    # ---- for others ----

    def content(self, name: str, whose: Whose) -> Path:
        """Where the content of a file lies. Raises ApiError (404)."""
        self.store.load(name, whose)
        return self.store.path(name, "content")

    def adopt(self, name: str, path: Path, filename: str, purpose: str, whose: Whose) -> None:
        """Make a file `name` of a finished one, which is moved. Twice is harmless."""
        content = self.store.path(name, "content")
        content.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.rename(path, content)
        made = _object(filename, purpose, content.stat().st_size)
        self.store.save({**made, "id": name, "owner": whose.owner})

    # ---- over HTTP ----

    async def upload(self, request: Request, whose: Whose) -> Response:
        try:
            async with asyncio.timeout(UPLOAD_S):
                form = await request.form(max_files=1, max_fields=8)
        except TimeoutError:
            raise ApiError(
                408,
                f"The upload did not come in {UPLOAD_S:.0f} s.",
                code="timed_out",
                headers={"Connection": "close"},
            ) from None
        except MultiPartException as exc:
            raise bad(None, f"The body of the request is no form: {exc.message}.") from None
        except ClientDisconnect:
            raise Gone from None
        except OSError as exc:
            raise no_room(exc) from None
        try:
            return answer(await self._take(form, whose))
        finally:
            await form.close()

    async def _take(self, form: FormData, whose: Whose) -> Record:
        f = Fields(dict(form))
        file = f.required("file")
        if not isinstance(file, UploadFile):
            raise bad("file", "'file' must be an upload: multipart/form-data with a filename.")
        purpose = f.choice("purpose", PURPOSES, "")
        f.ignore("expires_after", "expires_after[anchor]", "expires_after[seconds]")
        f.done()
        made = _object(Path(file.filename or "upload").name[:MOST_NAME], purpose, file.size or 0)
        try:
            await asyncio.to_thread(self._keep, made, file.file, whose)
        except OSError as exc:
            raise no_room(exc) from None
        return shown(made)

    def _keep(self, made: Record, source: Any, whose: Whose) -> None:
        folder = self.store.path(made["id"]).parent
        folder.mkdir(mode=0o700)
        try:
            with (folder / "content").open("xb") as kept:
                shutil.copyfileobj(source, kept, _PIECE_BYTES)
                kept.flush()
                os.fsync(kept.fileno())
            made["owner"] = whose.owner
            self.store.save(made)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    async def listed(self, request: Request, whose: Whose) -> Response:
        found = await asyncio.to_thread(self.store.of, whose)
        purpose = request.query_params.get("purpose")
        if purpose:
            found = [f for f in found if f["purpose"] == purpose]
        return answer(page(found, request.query_params, 10_000))

    async def one(self, name: str, whose: Whose) -> Response:
        return answer(shown(self.store.load(name, whose)))

    async def send(self, name: str, whose: Whose) -> Response:
        return FileResponse(self.content(name, whose), media_type="application/octet-stream")

    async def delete(self, name: str, whose: Whose) -> Response:
        await asyncio.to_thread(self.store.delete, name, whose)
        return answer({"id": name, "object": "file", "deleted": True})


def _object(filename: str, purpose: str, nbytes: int) -> Record:
    return {
        "id": new_id("file"),
        "object": "file",
        "bytes": nbytes,
        "created_at": int(time.time()),
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }
