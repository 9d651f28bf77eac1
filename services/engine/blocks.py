"""Which block of an engine's memory holds which tokens. Plain values: no torch, no model.

Memory for keys and values is cut into blocks of `size` tokens. A text owns a table of blocks. A
block that is full and computed is known by its tokens and by the block before it, back to the
beginning: the next text with the same beginning uses the same blocks, whoever it belongs to (`salt`
keeps apart what must not be shared). Blocks that nobody uses stay known until their place is
needed, the one that was let go longest ago first.

The tree of known blocks is that of SGLang's radix cache (Zheng et al. 2024) with one block an edge;
the sharing of blocks is that of PagedAttention (Kwon et al. 2023).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

# What a block is known by: the number of the known block before it (or the salt), and its tokens.
_Name = tuple[Hashable, tuple[int, ...]]


@dataclass
class Table:
    """The blocks of one text, in order."""

    salt: Hashable = None
    blocks: list[int] = field(default_factory=list)
    # How many blocks from the front are known, and the number under which the last of them is.
    known: int = 0
    parent: Hashable = None
    cached: int = 0  # tokens of the text that were there already when it began
    shares: bool = True  # its blocks become known, and may be those of others

    def __post_init__(self) -> None:
        self.parent = ("root", self.salt)


class Blocks:
    """All blocks of a pool: free, in use by some texts, or known and not in use."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))  # the lowest first: what is used lies together
        self._users = [0] * count
        self._named: dict[_Name, int] = {}
        self._name_of: dict[int, _Name] = {}
        self._number_of: dict[int, int] = {}  # of known blocks: never used twice
        self._unused: OrderedDict[int, None] = OrderedDict()  # known, without a user: oldest first
        self._next_number = 0

    @property
    def available(self) -> int:
        """Blocks that a text could have now."""
        return len(self._free) + len(self._unused)

    @property
    def in_use(self) -> int:
        return self.count - self.available

    def needed(self, table: Table, tokens: int) -> int:
        """How many more blocks a text needs to hold so many tokens."""
        return max(0, -(-tokens // self.size) - len(table.blocks))

    def begin(self, ids: Sequence[int], salt: Hashable = None, share: bool = True) -> Table:
        """A table for a text, with the blocks that are known for its beginning.

        At least its last token is left to compute: the scores of the next one come from it.
        """
        table = Table(salt, shares=share)
        while share and (len(table.blocks) + 1) * self.size < len(ids):
            at = len(table.blocks) * self.size
            found = self._named.get((table.parent, tuple(ids[at : at + self.size])))
            if found is None:
                break
            self._use(found)
            table.blocks.append(found)
            table.known += 1
            table.parent = self._number_of[found]
        table.cached = table.known * self.size
        return table

    def known_tokens(self, ids: Sequence[int], salt: Hashable = None) -> int:
        """How many tokens of a text `begin` would find; nothing changes."""
        parent: Hashable = ("root", salt)
        at = 0
        while at + self.size < len(ids):
            found = self._named.get((parent, tuple(ids[at : at + self.size])))
            if found is None:
                break
            parent, at = self._number_of[found], at + self.size
        return at

    def grow(self, table: Table, start: int, tokens: int) -> list[tuple[int, int]] | None:
        """Make the tokens from `start` up to `tokens` writable -> blocks to be copied first, each
        (from, to); None where there are not enough blocks, and then nothing has changed.

        A block that other texts use, too, is replaced by one of this text's own.
        """
        missing = self.needed(table, tokens)
        shared = self._is_shared(table, start)
        if missing + shared > self.available:
            return None
        copies = []
        if shared:
            index = start // self.size
            old, new = table.blocks[index], self._take()
            table.blocks[index] = new
            self._let_go(old)
            copies.append((old, new))
        table.blocks.extend(self._take() for _ in range(missing))
        return copies

    def _is_shared(self, table: Table, at: int) -> bool:
        index = at // self.size
        return index < len(table.blocks) and self._users[table.blocks[index]] > 1

    def computed(self, table: Table, ids: Sequence[int], tokens: int) -> None:
        """The first `tokens` of the text are in its blocks now: the full ones become known.

        Where another text has made the same block before, its is used, and this one's is free.
        """
        while table.shares and (table.known + 1) * self.size <= tokens:
            at = table.known * self.size
            block = table.blocks[table.known]
            name = (table.parent, tuple(ids[at : at + self.size]))
            other = self._named.get(name)
            if other is None:
                self._named[name] = block
                self._name_of[block] = name
                self._number_of[block] = self._next_number
                self._next_number += 1
            elif other != block:
                self._use(other)
                table.blocks[table.known] = other
                self._let_go(block)
                block = other
            table.parent = self._number_of[block]
            table.known += 1

    def fork(self, table: Table) -> Table:
        """A second text with the same beginning: it has the same blocks."""
        for block in table.blocks:
            self._use(block)
        return Table(
            table.salt, list(table.blocks), table.known, table.parent, table.cached, table.shares
        )

    def release(self, table: Table) -> None:
        """The text needs its blocks no more; the known ones stay until their place is needed."""
        # The end first: a block is of no use without those before it.
        for block in reversed(table.blocks):
            self._let_go(block)
        table.blocks.clear()
        table.known, table.parent = 0, ("root", table.salt)

    def forget(self) -> list[int]:
        """All that nobody uses is forgotten -> the free blocks, whose memory can be given back."""
        for block in self._unused:
            self._unname(block)
            self._free.append(block)
        self._unused.clear()
        self._free.sort(reverse=True)
        return list(self._free)

    def check(self) -> None:
        """Raise AssertionError where the books contradict each other."""
        assert len(set(self._free)) == len(self._free)
        assert not set(self._free) & set(self._unused)
        for block in range(self.count):
            idle = block in self._unused or block in set(self._free)
            assert idle == (self._users[block] == 0), block
        assert set(self._name_of) == set(self._named.values()) == set(self._number_of)
        assert set(self._unused) <= set(self._name_of)

    def users(self, block: int) -> int:
        """How many texts use a block."""
        return self._users[block]

    def _use(self, block: int) -> None:
        self._users[block] += 1
        self._unused.pop(block, None)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            self._unname(block)
        self._users[block] = 1
        return block

    def _let_go(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._name_of:
            self._unused[block] = None
        else:
            self._free.append(block)

    def _unname(self, block: int) -> None:
        del self._named[self._name_of.pop(block)]
        del self._number_of[block]
