"""The table of calls: one request, one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmos.kernel import protocol
from llmos.kernel.syscalls import (
    attach,
    call,
    checkpoint,
    dmesg,
    events,
    explain,
    kill,
    logs,
    mem,
    pause,
    ping,
    programs,
    ps,
    renice,
    resume,
    send,
    services,
    shutdown,
    status,
    submit,
    wait,
)

HANDLERS: dict[type[Any], Callable[[Any, Any, Any], Any]] = {
    protocol.Ping: ping.handle,
    protocol.Status: status.handle,
    protocol.Ps: ps.handle,
    protocol.Mem: mem.handle,
    protocol.Explain: explain.handle,
    protocol.Programs: programs.handle,
    protocol.Submit: submit.handle,
    protocol.Kill: kill.handle,
    protocol.Renice: renice.handle,
    protocol.Pause: pause.handle,
    protocol.Resume: resume.handle,
    protocol.Checkpoint: checkpoint.handle,
    protocol.Wait: wait.handle,
    protocol.Attach: attach.handle,
    protocol.Logs: logs.handle,
    protocol.Send: send.handle,
    protocol.Call: call.handle,
    protocol.Services: services.handle,
    protocol.Events: events.handle,
    protocol.Dmesg: dmesg.handle,
    protocol.Shutdown: shutdown.handle,
}
