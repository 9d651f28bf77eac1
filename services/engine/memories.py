"""Which guest's texts have memory in an engine, and who makes room for whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llmos.services.engine.batch import Pace
from llmos.services.engine.model import Model, PagedModel
from llmos.services.engine.session import ChatSession, Served, Text
from llmos.services.engine.spill import FILE, Spill


class Memories:
    """`everybody` gives all guests; `spill` keeps in files what is needed elsewhere."""

    def __init__(
        self, model: Model, spill: Spill, pace: Pace, everybody: Callable[[], Iterable[Served]]
    ) -> None:
        self._model = model
        self._spill = spill
        self._pace = pace
        self._everybody = everybody

    def ready(self, session: Served, text: Text, count: int) -> bool:
        """Room for the next `count` tokens of a text -> False when there is none, not even by what
        less urgent guests, and the later texts of this one, give up."""
        if text.memory is None:
            if session.is_spilled and not self._could_fit(session, text):
                return False  # its file is not read before there is room for what is in it
            self._start(session, text)
        count = min(count, len(text.ids) - text.computed)
        while not self._model.grow(text.memory, text.computed, text.computed + count):
            victim = self._victim(session)
            if victim is not None:
                self.make_way(victim)
                continue
            later = [t for t in session.texts if t.index > text.index and t.memory is not None]
            if not later:
                return False
            self.free(later[-1])
        return True

    def fork(self, text: Text, into: Text) -> None:
        """The second text begins as the first does, as far as that is computed."""
        into.memory, into.computed = self._model.fork(text.memory), text.computed

    def make_way(self, session: Served) -> None:
        """Its memory is needed by somebody else. It finds it in a file, where that is cheaper than
        to compute it again."""
        text = next((t for t in session.texts if t.memory is not None), None)
        kept = (session.memory, session.kept_ids) if text is None else (text.memory, text.ids)
        session.is_spilled = self._write(session, *kept)
        self.forget(session)

    def forget(self, session: Served) -> None:
        """Its memory is free; it is computed again, as far as nobody takes the blocks meanwhile."""
        if session.memory is not None:
            self._model.release(session.memory)
            session.memory = None
        for text in session.texts:
            self.free(text)

    def free(self, text: Text) -> None:
        if text.memory is not None:
            self._model.release(text.memory)
            text.memory, text.computed = None, 0

    def keep_chats(self) -> None:
        """The engine ends: what chats have computed is in files for the next one."""
        for session in self._everybody():
            if isinstance(session, ChatSession) and session.memory is not None:
                self.make_way(session)

    def _start(self, session: Served, text: Text) -> None:
        """What is known of a text; of a chat's, that of its last turn."""
        before, session.memory = session.memory, None
        folder = session.guest.folder
        if session.is_spilled and folder is not None and isinstance(self._model, PagedModel):
            self._spill.read(folder, self._model, _salt(session))
        session.is_spilled = False
        text.memory, text.computed = self._model.begin(
            text.ids, _salt(session), session.shares_prefix, before
        )
        if text.tokens == 0:
            session.cached_tokens = text.computed

    def _victim(self, asking: Served) -> Served | None:
        """Who makes room: who waits for his user first, else the least urgent one; never somebody
        more urgent than who asks. Who came last of equals goes first, so that somebody is done."""
        holders = self._holders(asking)
        resting = [s for s in holders if not s.runnable]
        if resting:
            return min(resting, key=lambda s: s.last_served)
        return max(holders, key=lambda s: s.guest.rank) if holders else None

    def _could_fit(self, session: Served, text: Text) -> bool:
        """Whether the text would fit now, or by what others would give up for it."""
        model = self._model
        if not isinstance(model, PagedModel):
            return True
        missing = len(text.ids) - model.blocks.known_tokens(text.ids, _salt(session))
        room = model.blocks.available + sum(
            len(held.memory.blocks)
            for other in self._holders(session)
            for held in (other, *other.texts)
            if held.memory is not None
        )
        return -(-missing // model.blocks.size) <= room

    def _holders(self, asking: Served) -> list[Served]:
        """Who has memory that he would give up for another: who rests, and who is less urgent."""
        others = [s for s in self._everybody() if s is not asking and _holds(s)]
        return [s for s in others if not s.runnable or s.guest.rank > asking.guest.rank]

    def _write(self, session: Served, memory: Any, ids: list[int]) -> bool:
        model, folder = self._model, session.guest.folder
        if not isinstance(model, PagedModel) or memory is None or folder is None:
            return False
        tokens = memory.known * model.blocks.size
        pays = self._spill.pays(model, tokens, self._pace.tokens_per_s)
        return session.shares_prefix and pays and self._spill.write(folder, model, memory, ids)


def is_in_file(session: Served) -> bool:
    """Whether an engine before this one has left something for this guest."""
    folder = session.guest.folder
    return folder is not None and (folder / FILE).exists()


def _holds(session: Served) -> bool:
    return session.memory is not None or any(text.memory is not None for text in session.texts)


def _salt(session: Served) -> Any:
    """Texts of one salt share blocks: keys and values depend on the adapter."""
    return getattr(session.adapter, "key", None)
