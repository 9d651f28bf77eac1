"""Memory that is moved out comes back bit for bit, and the tensors stay what they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmos.drivers.worker.lanes import HostLane
from llmos.drivers.worker.mover import Mover, cut, find_blocks
from llmos.drivers.worker.store import Store
from llmos.kernel.errors import BadArgument, NoMemory, WorkerLost

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class SlowLane(HostLane):
    """A device whose copies are done when somebody waits for them, and no earlier.

    Memory that was copied to but not waited for has old bytes, so a mover that forgets a mark
    writes or gives back garbage.
    """

    direct = False

    def __init__(self) -> None:
        self.open: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.given_back = 0

    def host(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.open.append((target, source))

    def mark(self) -> Any:
        return len(self.open)

    def wait(self, mark: Any) -> None:
        while self.done < mark:
            target, source = self.open[self.done]
            target.copy_(source)
            self.done += 1

    def give_back(self) -> None:
        self.given_back += 1


LANES = {"host": HostLane, "slow": SlowLane}
WAYS = [["host"], ["disk"], ["host", "disk"]]


def bits(tensor: Tensor) -> bytes:
    # A copy: torch does not resize what numpy has looked at.
    return (
        tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


@st.composite
def tensor_sets(draw: st.DrawFn) -> list[Tensor]:
    """Tensors of many types, views of them in many shapes, the same one twice."""
    found: list[Tensor] = []
    for _ in range(draw(st.integers(1, 6))):
        rows, columns = draw(st.integers(0, 40)), draw(st.integers(1, 40))
        raw = torch.randint(0, 2, (rows, columns))
        tensor = raw.to(draw(st.sampled_from(DTYPES)))
        found.append(tensor)
        for view in draw(st.lists(st.sampled_from(("t", "row", "part", "same")), max_size=3)):
            match view:
                case "t":
                    found.append(tensor.t())
                case "row" if rows:
                    found.append(tensor[rows // 2])
                case "part":
                    found.append(tensor[::2, 1:])
                case _:
                    found.append(tensor)
    return draw(st.permutations(found))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(tensor_sets(), st.sampled_from(sorted(LANES)), st.sampled_from(WAYS), st.integers(1, 5000))
def test_any_set_of_tensors_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[Tensor],
    lane: str,
    way: list[str],
    chunk_bytes: int,
) -> None:
    before = [bits(t) for t in tensors]
    objects = [(id(t), t.untyped_storage()._cdata, t.stride()) for t in tensors]
    mover = Mover(LANES[lane](), tmp_path_factory.mktemp("moved"), chunk_bytes)
    for _ in range(2):  # with and without what was kept from the first time
        out = None
        for where in way:
            out = mover.out(tensors, where)
            assert mover.where == where
            assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
        back = mover.back()
        assert [bits(t) for t in tensors] == before
        assert [(id(t), t.untyped_storage()._cdata, t.stride()) for t in tensors] == objects
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        assert out is not None
        assert out.bytes == back.bytes == sum(storages.values())
        assert not mover.where


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, lane: str, where: str
) -> None:
    def run(moving: bool) -> list[float]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
        net[2].weight = torch.nn.Parameter(net[0].weight.t())  # tied: one storage
        optimizer = torch.optim.AdamW(net.parameters(), 0.01, fused=True)
        mover = Mover(LANES[lane](), tmp_path, 1000)
        losses = []
        for step in range(6):
            x = torch.randn(4, 8)
            loss = (net(x) - x).square().mean()
            loss.backward()
            if moving and step % 2:  # with gradients
                state = [v for s in optimizer.state.values() for v in s.values()]
                grads = [p.grad for p in net.parameters() if p.grad is not None]
                mover.out([*net.parameters(), *grads, *state], where)
                assert next(net.parameters()).untyped_storage().nbytes() == 0
                mover.back()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert run(moving=True) == run(moving=False)


def test_memory_is_really_given_back(tmp_path: Path) -> None:
    def anonymous() -> int:
        text = Path("/proc/self/smaps_rollup").read_text()
        line = next(x for x in text.splitlines() if x.startswith("Anonymous:"))
        return int(line.split()[1]) * 1024

    nbytes = 64 * 2**20
    tensor = torch.ones(nbytes, dtype=torch.uint8)
    mover = Mover(HostLane(), tmp_path)
    before = anonymous()
    mover.out([tensor], "disk")
    assert before - anonymous() > 0.95 * nbytes
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == nbytes
    mover.back()
    assert anonymous() > before - 0.05 * nbytes
    assert not list(tmp_path.iterdir())


def test_host_memory_is_kept_for_the_next_time_and_given_back_when_asked(tmp_path: Path) -> None:
    tensor = torch.ones(10_000, dtype=torch.uint8)
    lane = SlowLane()
    mover = Mover(lane, tmp_path, 1000)
    mover.out([tensor], "host")
    first = list(map(id, mover._pool))
    mover.release()  # not while it is needed
    mover.back()
    mover.out([tensor], "host")
    assert list(map(id, mover._pool)) == first
    assert mover.host_bytes == 10_000
    mover.back()
    mover.release()
    assert mover.host_bytes == 0


def test_on_its_way_to_the_disk_it_takes_a_few_chunks_of_host_memory(tmp_path: Path) -> None:
    tensor = torch.ones(100_000, dtype=torch.uint8)
    mover = Mover(SlowLane(), tmp_path, 1000)
    mover.out([tensor], "disk")
    assert mover.host_bytes == 4000
    mover.back()
    assert tensor.sum() == 100_000


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.arange(5000), torch.randn(3000)]
    before = [bits(t) for t in tensors]
    mover = Mover(SlowLane(), tmp_path, 1000)
    written = []

    def full(fd: int, views: Any, offset: int) -> int:
        written.append(offset)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return os.pwrite(fd, b"".join(views), offset)

    monkeypatch.setattr("llmos.drivers.worker.store.os.pwritev", full)
    with pytest.raises(NoMemory, match="No space left"):
        mover.out(tensors, "disk")
    assert [bits(t) for t in tensors] == before
    assert not mover.where
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    mover.out(tensors, "disk")
    mover.back()
    assert [bits(t) for t in tensors] == before


def test_a_byte_that_changed_on_the_disk_is_found(tmp_path: Path) -> None:
    tensor = torch.arange(5000)
    mover = Mover(HostLane(), tmp_path, 1000)
    mover.out([tensor], "disk")
    with (tmp_path / "memory").open("r+b") as f:
        f.seek(7777)
        f.write(b"\xff")
    with pytest.raises(WorkerLost, match="damaged"):
        mover.back()


def test_without_room_it_stays_out_and_can_come_back_later(tmp_path: Path) -> None:
    tensors = [torch.arange(500), torch.arange(600)]
    mover = Mover(HostLane(), tmp_path, 1000)
    mover.out(tensors, "disk")
    for block in mover._blocks[1:]:
        block.nbytes = 2**62  # more than any device has
    with pytest.raises(NoMemory, match="no room"):
        mover.back()
    assert mover.where == "disk"
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    mover._blocks[1].nbytes = 600 * 8
    mover.back()
    assert torch.equal(tensors[1], torch.arange(600))


def test_what_torch_cannot_resize_is_left_and_counted(tmp_path: Path) -> None:
    foreign = torch.ones(1000, dtype=torch.uint8)
    foreign.numpy()  # somebody else looks at these bytes from now on
    mine = torch.ones(500, dtype=torch.uint8)
    mover = Mover(HostLane(), tmp_path)
    moved = mover.out([foreign, mine, torch.empty(10, device="meta")], "disk")
    assert (moved.bytes, moved.left_bytes) == (500, 1000)
    assert foreign.sum() == 1000
    mover.back()


def test_nothing_to_move_is_no_error(tmp_path: Path) -> None:
    mover = Mover(HostLane(), tmp_path)
    assert mover.out([], "disk").bytes == 0
    assert mover.back().bytes == 0


def test_wrong_orders_are_refused_in_one_line(tmp_path: Path) -> None:
    mover = Mover(HostLane(), tmp_path)
    with pytest.raises(BadArgument, match="no place 'moon'"):
        mover.out([], "moon")
    with pytest.raises(BadArgument, match="layout"):
        mover.out([torch.eye(3).to_sparse()], "disk")


def test_the_chunks_are_full_and_hold_every_byte_once() -> None:
    blocks, _ = find_blocks([torch.empty(n, dtype=torch.uint8) for n in (10, 1, 99, 250)], "cpu")
    chunks = list(cut(blocks, 100))
    sizes = [sum(p.nbytes for p in chunk) for chunk in chunks]
    assert sizes == [100, 100, 100, 60]
    assert [p.at for p in chunks[0]] == [0, 10, 11]


def test_a_store_writes_many_small_pieces_in_one_call_each(tmp_path: Path) -> None:
    pieces = [bytes([n % 256]) * (n % 7 + 1) for n in range(3000)]
    store = Store(tmp_path / "s")
    store.write(0, [memoryview(p) for p in pieces])
    store.finish(sync=True)
    assert (tmp_path / "s").read_bytes() == b"".join(pieces)
    targets = [bytearray(len(p)) for p in pieces]
    store.read(0, [memoryview(t) for t in targets])
    store.finish(sync=False)
    assert targets == [bytearray(p) for p in pieces]
    store.remove()
    assert not (tmp_path / "s").exists()
