"""The books of an engine's blocks: sharing, forks, eviction; against a model that keeps whole
texts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmos.services.engine.blocks import Blocks, Table

SIZE = 4


def filled(blocks: Blocks, ids: list[int], salt: object = None) -> Table:
    table = blocks.begin(ids, salt)
    assert blocks.grow(table, table.cached, len(ids)) is not None
    blocks.computed(table, ids, len(ids))
    return table


def test_a_text_finds_the_full_blocks_of_another_and_leaves_one_token_to_compute() -> None:
    blocks = Blocks(16, SIZE)
    first = filled(blocks, list(range(10)))
    second = blocks.begin(list(range(8)))
    assert (second.cached, second.blocks) == (4, first.blocks[:1]), (
        "of 8 tokens one must be computed"
    )
    third = blocks.begin(list(range(9)))
    assert (third.cached, third.blocks) == (8, first.blocks[:2])
    assert blocks.begin([0, 1, 2, 9, 4]).cached == 0


def test_another_salt_shares_nothing() -> None:
    blocks = Blocks(16, SIZE)
    filled(blocks, list(range(10)), "ann")
    assert blocks.begin(list(range(10)), "bob").cached == 0
    assert blocks.begin(list(range(10)), "ann").cached == 8


def test_what_is_let_go_is_still_known_until_its_place_is_needed() -> None:
    blocks = Blocks(4, SIZE)
    blocks.release(filled(blocks, list(range(9))))
    assert blocks.available == 4
    assert blocks.known_tokens(list(range(9))) == 8
    other = filled(blocks, [100 + i for i in range(9)])
    assert len(other.blocks) == 3
    assert blocks.known_tokens(list(range(9))) == 4, "the end of a text goes before its beginning"


def test_a_fork_copies_only_the_block_that_is_written() -> None:
    blocks = Blocks(16, SIZE)
    ids = list(range(10))
    one = filled(blocks, ids)
    two = blocks.fork(one)
    before = blocks.in_use
    copies = blocks.grow(two, 10, 11)
    assert copies == [(one.blocks[2], two.blocks[2])]
    assert two.blocks[:2] == one.blocks[:2]
    assert blocks.in_use == before + 1
    assert blocks.grow(one, 10, 11) == [], "nobody else has it any more"


def test_when_there_are_too_few_nothing_is_taken() -> None:
    blocks = Blocks(3, SIZE)
    table = filled(blocks, list(range(5)))
    other = blocks.begin([7] * 9)
    assert blocks.grow(other, 0, 9) is None
    assert other.blocks == []
    assert blocks.available == 1
    blocks.release(table)
    assert blocks.grow(other, 0, 9) == []


def test_forget_leaves_what_is_in_use() -> None:
    blocks = Blocks(8, SIZE)
    kept = filled(blocks, list(range(9)))
    blocks.release(filled(blocks, [50 + i for i in range(9)]))
    free = blocks.forget()
    assert set(free) == set(range(8)) - set(kept.blocks)
    assert blocks.known_tokens(list(range(9))) == 8
    assert blocks.known_tokens([50 + i for i in range(9)]) == 0


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), max_size=8))
def test_known_tokens_are_what_begin_gives(texts: list[list[int]]) -> None:
    blocks = Blocks(64, 2)
    for ids in texts:
        known = blocks.known_tokens(ids)
        table = filled(blocks, ids)
        assert table.cached == known
        blocks.check()


class Machine(RuleBasedStateMachine):
    """Texts over few tokens, so that they share; the content of each block is kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(12, SIZE)
        self.content: dict[int, list[int | None]] = {}
        self.texts: list[tuple[Table, list[int], int]] = []  # table, ids, computed

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from("ab"))
    def begin(self, ids: list[int], salt: str) -> None:
        table = self.blocks.begin(ids, salt)
        self.texts.append((table, ids, table.cached))

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(1, 6))
    def compute(self, data: st.DataObject, count: int) -> None:
        index = data.draw(st.integers(0, len(self.texts) - 1))
        table, ids, computed = self.texts[index]
        end = min(len(ids), computed + count)
        if end == computed:
            return
        copies = self.blocks.grow(table, computed, end)
        if copies is None:
            return
        for old, new in copies:
            self.content[new] = list(self.content.get(old, [None] * SIZE))
        for at in range(computed, end):
            block = table.blocks[at // SIZE]
            assert self.blocks.users(block) == 1, "nobody writes what others read"
            self.content.setdefault(block, [None] * SIZE)[at % SIZE] = ids[at]
        self.blocks.computed(table, ids, end)
        self.texts[index] = (table, ids, end)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), token=st.integers(0, 1))
    def fork(self, data: st.DataObject, token: int) -> None:
        table, ids, computed = self.texts[data.draw(st.integers(0, len(self.texts) - 1))]
        if computed == len(ids):
            self.texts.append((self.blocks.fork(table), [*ids, token], computed))

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), token=st.integers(0, 1))
    def go_on(self, data: st.DataObject, token: int) -> None:
        _, ids, computed = self.texts[data.draw(st.integers(0, len(self.texts) - 1))]
        if computed == len(ids):
            ids.append(token)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table, _, _ = self.texts.pop(data.draw(st.integers(0, len(self.texts) - 1)))
        self.blocks.release(table)

    @rule()
    def forget(self) -> None:
        self.blocks.forget()

    @invariant()
    def books_are_right(self) -> None:
        self.blocks.check()

    @invariant()
    def every_text_reads_its_own_tokens(self) -> None:
        for table, ids, computed in self.texts:
            for at in range(computed):
                assert self.content[table.blocks[at // SIZE]][at % SIZE] == ids[at]


TestBlocks = Machine.TestCase
TestBlocks.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
