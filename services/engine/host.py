"""The inside of an engine: which guest gets the next token, and what is told about it.

Each step computes one token for the most urgent guest, or one piece of its prompt, and reports
what it computed for whom, so that the kernel can charge it.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmos.kernel.errors import BadArgument, BadInput, LlmosError
from llmos.services.engine.model import LoadedModel
from llmos.services.engine.replay import replay
from llmos.services.engine.session import ChatSession, InferSession, Session
from llmos.services.model import safepoints
from llmos.services.model.load import load_causal_lm, load_tokenizer
from llmos.services.programs.base import Context, Done, Gate, Guest, Idle, Report
from llmos.services.programs.chat import Chat
from llmos.services.programs.infer import Infer

# A prompt is computed in pieces of this many tokens: between two of them a more urgent guest
# gets its token.
PREFILL_TOKENS = 512

ALL_CLASSES = 2  # the floor at which the least urgent class (idle) still gets steps


class Host:
    """One loaded model and the sessions of its guests."""

    def __init__(self, model: str, dtype: str, device: str, threads: int, gate: Gate) -> None:
        torch.set_num_threads(threads)
        with gate.away():
            loaded: Any = load_causal_lm(model, dtype)
            tokenizer = load_tokenizer(model)
        self._loaded = LoadedModel(loaded.to(device), tokenizer)
        safepoints.install(self._loaded.model, gate)
        self._sessions: dict[int, Session] = {}
        self._steps = 0
        self.floor = ALL_CLASSES

    def step(self, ctx: Context) -> Report | Idle:
        session = self._most_urgent()
        if session is None:
            return Idle()
        began_s = ctx.clock()
        self._steps += 1
        session.last_served = self._steps
        ids = session.take(PREFILL_TOKENS)
        with torch.inference_mode():
            logits = self._loaded.forward(session.cache, ids)
            token = session.sampler(logits) if session.prompt_is_computed else None
        if token is not None:
            self._deliver(ctx, session, token, ctx.clock() - began_s)
        return Report(self._steps, shares={session.guest.pid: float(len(ids))})

    def admit(self, ctx: Context, guest: Guest) -> None:
        """A guest arrives. Raises BadInput when the model cannot take its prompt."""
        if guest.program == "infer":
            session = InferSession(guest, Infer.Args(**guest.args), self._loaded)
            session.start()
            self._join(session)
            self._go_on(ctx, session)
        elif guest.program == "chat":
            self._admit_chat(ctx, guest)
        else:
            raise BadArgument(f"an engine cannot serve the program {guest.program!r}")

    def drop(self, pid: int) -> None:
        """Forget a guest; its cache is freed with it."""
        self._sessions.pop(pid, None)

    def trim(self) -> None:
        """Give back the room that the guests' caches keep for tokens to come."""
        for session in self._sessions.values():
            session.cache.trim()

    def rank(self, pid: int, rank: tuple[int, int, int], parked: bool) -> None:
        """A guest was reniced, paused or resumed."""
        session = self._sessions.get(pid)
        if session is not None:
            session.guest.rank, session.guest.parked = rank, parked

    def message(self, ctx: Context, pid: int, message: dict[str, Any]) -> None:
        """Input for a chat: a turn, a stop, settings. What it cannot use is said to its user."""
        try:
            self._message(ctx, pid, message)
        except BadArgument as exc:
            ctx.emit("note", pid=pid, text=_one_line(exc))
        session = self._sessions.get(pid)
        if isinstance(session, ChatSession) and session.answer is None:
            ctx.guest_idle(pid)  # whoever sent it took it for work

    def tensors(self) -> Iterator[Tensor]:
        """Weights, and the cache of every guest."""
        yield from safepoints.tensors_of(self._loaded.model)
        for session in self._sessions.values():
            yield from session.cache.tensors()

    def _message(self, ctx: Context, pid: int, message: dict[str, Any]) -> None:
        session = self._sessions.get(pid)
        if not isinstance(session, ChatSession):
            raise BadArgument(f"process {pid} takes no messages", "only a chat does")
        match message:
            case {"prompt": str(prompt)}:
                session.turns.append(prompt)
                if session.answer is None:
                    self._next_turn(ctx, session)
            case {"stop": True}:
                if session.answer is not None:
                    ctx.emit("text", pid=pid, text=session.interrupt(), tokens=[])
                    self._finish(ctx, session, "interrupted")
            case {"set": dict(values)}:
                session.change(values)
            case _:
                raise BadArgument(
                    "a chat cannot read this message",
                    'it takes {"prompt": TEXT}, {"stop": true} or {"set": {...}}',
                )

    def _most_urgent(self) -> Session | None:
        """The runnable guest of the smallest class and nice; among equals who waits longest."""
        best: Session | None = None
        best_key = (0, 0, 0)
        for session in self._sessions.values():
            cls, nice, _ = session.guest.rank
            key = (cls, nice, session.last_served)
            if session.runnable and cls <= self.floor and (best is None or key < best_key):
                best, best_key = session, key
        return best

    def _deliver(self, ctx: Context, session: Session, token: int, spent_s: float) -> None:
        text, finish_reason = session.accept(token, spent_s)
        ctx.emit("text", pid=session.guest.pid, text=text, tokens=[token])
        if finish_reason:
            self._finish(ctx, session, finish_reason)

    def _finish(self, ctx: Context, session: Session, finish_reason: str) -> None:
        pid = session.guest.pid
        statistics = session.end(finish_reason)
        if isinstance(session, ChatSession):
            ctx.emit("turn", pid=pid, **statistics)
            self._next_turn(ctx, session)
        else:
            del self._sessions[pid]
            ctx.guest_done(pid, Done(result=statistics))

    def _next_turn(self, ctx: Context, session: ChatSession) -> None:
        """Begin the next turn that can be begun; without one the guest waits."""
        while session.turns:
            try:
                session.start_turn(session.turns.popleft())
            except BadInput as exc:
                ctx.emit("note", pid=session.guest.pid, text=_one_line(exc))
                continue
            ctx.emit("begin", pid=session.guest.pid)
            if session.has_forgotten:
                text = (
                    "the conversation has outgrown the model's context: its beginning is forgotten"
                )
                ctx.emit("note", pid=session.guest.pid, text=text)
            return
        ctx.guest_idle(session.guest.pid)

    def _admit_chat(self, ctx: Context, guest: Guest) -> None:
        session = ChatSession(guest, Chat.Args(**guest.args), self._loaded)
        self._join(session)
        self._go_on(ctx, session)
        if session.answer is None and guest.pid in self._sessions:
            self._next_turn(ctx, session)

    def _go_on(self, ctx: Context, session: Session) -> None:
        """Bring a session to where an earlier engine has left it: its reader sees no seam."""
        done = replay(session, session.guest.records)
        session.guest.records = []
        session.resume()
        if done.stopped and session.answer is not None:
            rest = session.interrupt()
            if not done.rest_is_sent:
                ctx.emit("text", pid=session.guest.pid, text=rest, tokens=[])
            self._finish(ctx, session, "interrupted")
        elif done.reason:
            self._finish(ctx, session, done.reason)

    def _join(self, session: Session) -> None:
        # As if just served: a newcomer does not go before those who wait already.
        session.last_served = self._steps
        self._sessions[session.guest.pid] = session


def _one_line(error: LlmosError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
