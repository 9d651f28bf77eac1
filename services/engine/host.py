"""The inside of an engine: which guests get tokens in a step, and what is told about it.

Each step computes one packed row: a token for everybody who decodes, and pieces of prompts. It
reports what it computed for whom, so that the kernel can charge it.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmos.kernel.errors import BadArgument, BadInput, LlmosError, NoMemory
from llmos.services.engine import batch, draw
from llmos.services.engine.adapters import Adapter, Adapters
from llmos.services.engine.batch import Candidate, Pace, Rank
from llmos.services.engine.beam_session import BeamSession
from llmos.services.engine.embedding import EmbedSession
from llmos.services.engine.loaded import Loaded
from llmos.services.engine.memories import Memories, is_in_file
from llmos.services.engine.model import ALL, LAST, NOTHING, Work
from llmos.services.engine.native.weights import alone
from llmos.services.engine.plan import kv_budget
from llmos.services.engine.replay import replay
from llmos.services.engine.sampling import Choice, choose, score
from llmos.services.engine.session import Answer, ChatSession, InferSession, Served, Session
from llmos.services.engine.spill import FILE, Spill
from llmos.services.engine.weights import load
from llmos.services.model import safepoints
from llmos.services.model.load import load_tokenizer
from llmos.services.programs.base import Context, Done, Gate, Guest, Idle, Report
from llmos.services.programs.chat import Chat
from llmos.services.programs.embed import Embed
from llmos.services.programs.infer import Infer

# The scores of a prompt are told in records of so many tokens: a record has a largest size.
TOLD_TOKENS = 4096

ALL_CLASSES = 2  # the floor at which the least urgent class (idle) still gets steps


@dataclass
class Part:
    """What one guest has in a step: the work of some of its texts."""

    session: Served
    texts: list[Any]
    works: list[Work]
    piece: int  # tokens of a prompt; 0: one for each answer


class Host:
    """One loaded model and the sessions of its guests."""

    def __init__(
        self, model: str, dtype: str, device: str, threads: int, gate: Gate, kv_bytes: int = 0,
        home: Path | None = None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)
        with gate.away():
            loaded: Any = load(model, dtype, device, home, print)
            tokenizer = load_tokenizer(model)
        budget = kv_bytes or kv_budget(loaded.config.get_text_config(), loaded.dtype)
        self._loaded = Loaded(loaded, tokenizer, budget)
        safepoints.install(loaded, gate)
        self._adapters = Adapters(loaded, loaded.dtype)
        self._loaded.model.routing = self._adapters.routing
        self._sessions: dict[int, Served] = {}
        self._pace = Pace()
        self._memories = Memories(
            self._loaded.model,
            Spill(model, (dtype, loaded.dtype)),
            self._pace,
            self._sessions.values,
        )
        self._steps = 0
        self.floor = ALL_CLASSES

    # ---- a step ----

    @torch.inference_mode()
    def step(self, ctx: Context) -> Report | Idle:
        parts = self._parts(ctx)
        if not parts:
            return Idle()
        began_s = ctx.clock()
        self._steps += 1
        works = [w for part in parts for w in part.works]
        with alone() if parts[0].session.exact else contextlib.nullcontext():
            self._compute(ctx, parts, works, began_s)
        piece = sum(len(w.ids) for part in parts if part.piece for w in part.works)
        self._pace.took(piece, ctx.clock() - began_s)
        shares = {
            part.session.guest.pid: float(sum(len(w.ids) for w in part.works)) for part in parts
        }
        return Report(self._steps, shares=shares)

    def _compute(self, ctx: Context, parts: list[Part], works: list[Work], began_s: float) -> None:
        kind = parts[0].session.kind
        if kind == EmbedSession.kind:
            self._embed(ctx, parts, works)
        elif kind == BeamSession.kind:
            self._search(ctx, parts, works)
        else:
            scores = self._loaded.model.forward(works)
            self._after(ctx, parts, scores, began_s)

    def _parts(self, ctx: Context) -> list[Part]:
        """The next step's work. Who finds no room waits; whoever is less urgent makes room for
        him."""
        runnable = [s for s in self._sessions.values() if self._may_run(s)]
        parts: list[Part] = []
        for share in batch.plan([self._candidate(s) for s in runnable], self._pace):
            part = self._part(self._sessions[share.pid], share.piece)
            if part is not None:
                parts.append(part)
        # Who has made room for a later one has no memory any more.
        whole = [p for p in parts if all(text.memory is not None for text in p.texts)]
        if runnable and not whole:
            # Whoever it is for finds no room beside somebody more urgent, who goes first then.
            first = min(runnable, key=lambda s: s.guest.rank)
            part = self._part(first, min(first.pending, batch.LEAST_PIECE))
            if part is not None:
                return [part]
            self._give_up(ctx, first)
        return whole

    def _give_up(self, ctx: Context, session: Served) -> None:
        """Nobody else holds anything, and it is still too much: it would wait for ever."""
        pid = session.guest.pid
        self.drop(pid)
        error = NoMemory(
            f"the texts of process {pid} do not fit in the engine's memory for keys and values",
            "ask for fewer answers at once, or give the engine more: --kv-memory",
        )
        ctx.guest_done(pid, Done(1, _one_line(error), {"error": error.to_wire()}))

    def _may_run(self, session: Served) -> bool:
        return session.runnable and session.guest.rank[0] <= self.floor

    def _candidate(self, session: Served) -> Candidate:
        return Candidate(
            session.guest.pid, Rank(*session.guest.rank), session.pending, len(session.texts),
            session.last_served, session.exact, session.kind,
        )  # fmt: skip

    def _part(self, session: Served, piece: int) -> Part | None:
        """The work of one guest, with room for it; None when there is none now.

        Of several texts those at the end wait when there is not room for all.
        """
        given, texts, works = session.texts if piece == 0 else session.texts[:1], [], []
        left = min(piece or batch.MOST_PIECE, session.most_piece)
        for text in given:
            count = min(max(1, left), len(text.ids) - text.computed)
            if not self._memories.ready(session, text, count):
                break
            count = min(count, len(text.ids) - text.computed)
            ids = text.ids[text.computed : text.computed + count]
            wanted = session.wanted(text, text.computed + count == len(text.ids))
            works.append(Work(text.memory, ids, text.computed, wanted, session.adapter))
            texts.append(text)
            left -= count
        if not works or (session.in_step and len(texts) < len(given)):
            self._memories.forget(session)
            return None
        session.last_served = self._steps + 1
        return Part(session, texts, works, piece)

    # ---- after the forward ----

    def _after(self, ctx: Context, parts: Sequence[Part], scores: Tensor, began_s: float) -> None:
        """The forward is done: what is computed is kept, and the next tokens are chosen."""
        rows: list[int] = []
        takers: list[tuple[Session, Answer]] = []
        at = 0
        for part in parts:
            session = part.session
            assert isinstance(session, Session)
            for answer, w in zip(part.texts, part.works, strict=True):
                answer.computed += len(w.ids)
                self._loaded.model.done(answer.memory, answer.ids, answer.computed)
                told = {NOTHING: 0, LAST: 1, ALL: len(w.ids)}[w.wanted]
                if w.wanted == ALL:
                    self._score_prompt(ctx, session, w, scores[at : at + told])
                at += told
                if answer.computed < len(answer.ids):
                    continue
                if session.args.max_tokens == 0:
                    self._finish(ctx, session, answer, "length")
                    continue
                for taker in self._takers(session, answer):
                    rows.append(at - 1)
                    takers.append((session, taker))
        if takers:
            wanted = scores if rows == list(range(len(scores))) else scores[rows]
            choices = choose(wanted, [answer.sampler for _, answer in takers])
            self._count_time(takers, ctx.clock() - began_s)
            for (session, answer), choice in zip(takers, choices, strict=True):
                if choice.token == draw.NOTHING:
                    self._fail(ctx, session, choice.error)
                elif session.guest.pid in self._sessions:
                    self._deliver(ctx, session, answer, choice)

    def _fail(self, ctx: Context, session: Session, why: str) -> None:
        """No token can follow a text: its form cannot be kept, or (`why` is empty) the model gives
        no scores for it. Others go on."""
        if session.guest.pid not in self._sessions:
            return  # another of its texts came first
        what = "the adapter" if session.adapter is not None else "the model"
        error = (
            BadInput(why)
            if why
            else BadInput(
                f"{what} gives no numbers for this text",
                "its training has diverged, or the dtype is too small for it: try --dtype float32",
            )
        )
        self.drop(session.guest.pid)
        reason = _one_line(error)
        ctx.guest_done(session.guest.pid, Done(1, reason, {"error": error.to_wire()}))

    def _count_time(self, takers: Sequence[tuple[Session, Answer]], spent_s: float) -> None:
        sessions = {session.guest.pid: session for session, _ in takers}
        for session in sessions.values():
            session.times.took(sum(1 for taker, _ in takers if taker is session), spent_s)

    def _takers(self, session: Session, answer: Answer) -> list[Answer]:
        """Whose next token comes from an answer's scores: at the end of the prompt of all that
        begin with it."""
        if answer.tokens or len(session.answers) + len(session.ended) > 1:
            return [answer]
        new = session.split()
        for other in new:
            self._memories.fork(answer, other)
        return [answer, *new]

    def _score_prompt(self, ctx: Context, session: Session, w: Work, scores: Tensor) -> None:
        """Tell what the model thought of each token of a prompt, when all of it is computed."""
        assert isinstance(session, InferSession)
        ids = session.answers[0].ids
        following = ids[w.start + 1 : w.start + 1 + len(w.ids)]
        if w.start == 0:
            session.prompt_scores.clear()  # its memory was needed elsewhere: once more
        found = score(scores[: len(following)], following, session.args.prompt_logprobs)
        session.prompt_scores.extend(found)
        if w.start + len(w.ids) == session.prompt_tokens:
            told = [None, *(self._told(choice) for choice in session.prompt_scores)]
            for at in range(0, session.prompt_tokens, TOLD_TOKENS):
                end = min(at + TOLD_TOKENS, session.prompt_tokens)
                ctx.emit("prompt", pid=session.guest.pid, tokens=ids[at:end], logprobs=told[at:end])

    def _deliver(self, ctx: Context, session: Session, answer: Answer, choice: Choice) -> None:
        text = session.accept(answer, choice.token)
        more: dict[str, Any] = {}
        if session.args.logprobs is not None:
            more["logprobs"] = [self._told(choice)]
        if session.numbered:
            more["index"] = answer.index
        ctx.emit("text", pid=session.guest.pid, text=text, tokens=[choice.token], **more)
        if answer.finish_reason:
            self._finish(ctx, session, answer, answer.finish_reason)

    def _told(self, choice: Choice) -> dict[str, Any]:
        """An entry of `logprobs` in a record."""
        text = self._loaded.token_text
        top = [{"id": t, "text": text(t), "logprob": p} for t, p in choice.top]
        return {
            "id": choice.token,
            "text": text(choice.token),
            "logprob": choice.logprob,
            "top": top,
        }

    def _search(self, ctx: Context, parts: Sequence[Part], works: Sequence[Work]) -> None:
        """A step of beam searches."""
        began_s = ctx.clock()
        scores = self._loaded.model.forward(works)
        at = 0
        for part in parts:
            session = part.session
            assert isinstance(session, BeamSession)
            rows = []
            for text, w in zip(part.texts, part.works, strict=True):
                text.computed += len(w.ids)
                self._loaded.model.done(text.memory, text.ids, text.computed)
                if w.wanted == LAST:
                    rows.append(at)
                    at += 1
            if len(rows) < len(session.texts):
                for text in part.texts:  # they go on together: the last token once more
                    text.computed = min(text.computed, len(text.ids) - 1)
                continue
            session.times.took(len(rows), ctx.clock() - began_s)
            self._advance(ctx, session, scores[rows])

    def _advance(self, ctx: Context, session: BeamSession, scores: Tensor) -> None:
        pid = session.guest.pid
        try:
            if session.advance(scores.float().log_softmax(-1), self._memories):
                return
        except BadInput as exc:
            self.drop(pid)
            ctx.guest_done(pid, Done(1, _one_line(exc), {"error": exc.to_wire()}))
            return
        for record in session.found():
            ctx.emit("text", pid=pid, **record)
        self.drop(pid)
        ctx.guest_done(pid, Done(result=session.statistics()))

    def _embed(self, ctx: Context, parts: Sequence[Part], works: Sequence[Work]) -> None:
        states = self._loaded.model.hidden(works)
        at = 0
        for part in parts:
            session = part.session
            assert isinstance(session, EmbedSession)
            pid = session.guest.pid
            for text, w in zip(part.texts, part.works, strict=True):
                session.add(text, states[at : at + len(w.ids)])
                text.computed += len(w.ids)
                at += len(w.ids)
                if text.computed < len(text.ids):
                    continue
                vector, tokens = session.vector(), len(text.ids)
                ctx.emit("embedding", pid=pid, index=text.index, vector=vector, tokens=tokens)
                self._memories.free(text)
                if session.end(text):
                    self.drop(pid)
                    ctx.guest_done(pid, Done(result=session.statistics()))

    # ---- guests ----

    def admit(self, ctx: Context, guest: Guest) -> None:
        """A guest arrives. Raises BadInput when the model cannot take its prompt or adapter."""
        ref = guest.args.get("adapter")
        adapter = None
        if ref:
            adapter = self._adapters.load(
                ref, lambda text: ctx.emit("note", pid=guest.pid, text=text)
            )
        try:
            session = self._session(guest, adapter)
        except LlmosError:
            if adapter is not None:
                self._adapters.release(adapter)
            raise
        self._join(session)
        try:
            if isinstance(session, Session):
                self._go_on(ctx, session)
            is_here = guest.pid in self._sessions
            if isinstance(session, ChatSession) and is_here and not session.is_answering:
                self._next_turn(ctx, session)
        except LlmosError:
            self.drop(guest.pid)
            raise
        if isinstance(session, EmbedSession) and not session.texts:
            self.drop(guest.pid)  # the engine before this one has told all of it
            ctx.guest_done(guest.pid, Done(result=session.statistics()))

    def _session(self, guest: Guest, adapter: Adapter | None) -> Served:
        if guest.program == "infer":
            args = Infer.Args(**guest.args)
            kind = BeamSession if args.beams > 1 else InferSession
            infer = kind(guest, args, self._loaded, adapter)
            infer.start()
            return infer
        if guest.program == "embed":
            embed = EmbedSession(guest, Embed.Args(**guest.args), self._loaded, adapter)
            embed.start()
            return embed
        if guest.program == "chat":
            chat = ChatSession(guest, Chat.Args(**guest.args), self._loaded, adapter)
            chat.is_spilled = is_in_file(chat)
            return chat
        raise BadArgument(f"an engine cannot serve the program {guest.program!r}")

    def drop(self, pid: int) -> None:
        """Forget a guest; its memory is free with it."""
        session = self._sessions.pop(pid, None)
        if session is not None:
            self._memories.forget(session)
            _remove_file(session)
            if session.adapter is not None:
                self._adapters.release(session.adapter)

    def close(self) -> None:
        """The engine ends in order: what chats have computed is kept for the next one."""
        self._memories.keep_chats()

    def trim(self) -> None:
        """Give back what no guest's text needs."""
        self._loaded.model.trim()
        self._adapters.trim()

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
        if isinstance(session, ChatSession) and not session.is_answering:
            ctx.guest_idle(pid)  # whoever sent it took it for work

    def tensors(self) -> Iterator[Tensor]:
        """Weights, and the memory of every guest."""
        yield from self._loaded.model.tensors()
        yield from self._adapters.tensors()

    def _message(self, ctx: Context, pid: int, message: dict[str, Any]) -> None:
        session = self._sessions.get(pid)
        if not isinstance(session, ChatSession):
            raise BadArgument(f"process {pid} takes no messages", "only a chat does")
        match message:
            case {"prompt": str(prompt)}:
                session.turns.append(prompt)
                if not session.is_answering:
                    self._next_turn(ctx, session)
            case {"end": True}:
                self.drop(pid)
                ctx.guest_done(pid, Done())
            case {"stop": True}:
                if session.is_answering:
                    ctx.emit("text", pid=pid, text=session.interrupt(), tokens=[])
                    self._finish(ctx, session, session.answers[0], "interrupted")
            case {"set": dict(values)}:
                session.change(values)
            case {"history": list(messages)}:
                if session.is_answering:
                    raise BadArgument("the conversation cannot change while it is answered")
                ctx.emit("history", pid=pid, turns=session.remember(messages))
            case _:
                raise BadArgument(
                    "a chat cannot read this message",
                    'it takes {"prompt": TEXT}, {"stop": true}, {"set": {...}}, '
                    '{"history": [...]}, {"end": true}',
                )

    def _finish(self, ctx: Context, session: Session, answer: Answer, finish_reason: str) -> None:
        pid = session.guest.pid
        # One that was stopped before its first step has none: that of the turn before stays.
        if isinstance(session, ChatSession) and answer.memory is not None:
            session.memory, session.kept_ids = answer.memory, answer.ids[: answer.computed]
            answer.memory = None
        self._memories.free(answer)
        if not session.end(answer, finish_reason):
            return
        statistics = session.statistics()
        if isinstance(session, ChatSession):
            ctx.emit("turn", pid=pid, **statistics)
            self._next_turn(ctx, session)
        else:
            self.drop(pid)
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

    def _go_on(self, ctx: Context, session: Session) -> None:
        """Bring a session to where an earlier engine has left it: its reader sees no seam."""
        done = replay(session, session.guest.records)
        session.guest.records = []
        session.resume()
        if done.stopped and session.is_answering:
            rest = session.interrupt()
            if not done.rest_is_sent:
                ctx.emit("text", pid=session.guest.pid, text=rest, tokens=[])
            self._finish(ctx, session, session.answers[0], "interrupted")
            return
        for answer in [a for a in session.answers if a.finish_reason]:
            self._finish(ctx, session, answer, answer.finish_reason)

    def _join(self, session: Served) -> None:
        # As if just served: a newcomer does not go before those who wait already.
        session.last_served = self._steps
        self._sessions[session.guest.pid] = session


def _remove_file(session: Served) -> None:
    if session.guest.folder is not None:
        with contextlib.suppress(OSError):
            (session.guest.folder / FILE).unlink(missing_ok=True)


def _one_line(error: LlmosError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
