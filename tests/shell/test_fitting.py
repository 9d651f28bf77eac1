"""Settings that fit are found by plans alone: a formula stands for the kernel's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.shell.fitting import choices


def field(name: str, default: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "default": default, **more}


TRAINING = {
    "args": [
        field("batch", 16), field("accumulate", 1), field("gradient_checkpointing", False),
        field("optimizer", "adamw"), field("method", "full", choices=["full", "lora"]),
    ]
}  # fmt: skip


def plan(args: dict[str, Any]) -> dict[str, Any]:
    each = 4 if args.get("gradient_checkpointing") else 10
    optimizer = 25 if args.get("optimizer") == "adamw8bit" else 80
    trained = 2 if args.get("method") == "lora" else 40 + optimizer
    return {"total_bytes": 50 + trained + each * args.get("batch", 16), "footprint": []}


def test_what_fits_as_it_is_stays_as_it_is() -> None:
    fitting, least = choices(TRAINING, {}, 330, plan)
    assert [c.changed for c in fitting] == [{}]
    assert least.label == "as asked"


def test_each_saving_comes_with_the_largest_micro_batch_that_fits() -> None:
    fitting, _ = choices(TRAINING, {}, 250, plan)
    assert [c.label for c in fitting] == [
        "batch 8 x 2", "checkpointing", "batch 8 x 2, 8-bit moments",
        "8-bit moments, checkpointing", "LoRA", "LoRA, checkpointing",
    ]  # fmt: skip
    assert all(c.total_bytes <= 250 for c in fitting)


def test_when_nothing_fits_the_nearest_is_told() -> None:
    fitting, least = choices(TRAINING, {}, 10, plan)
    assert not fitting
    assert least.label == "batch 1 x 16, LoRA, checkpointing"
    assert least.total_bytes == 56


def test_a_program_without_these_arguments_is_planned_once() -> None:
    asked: list[dict[str, Any]] = []

    def once(args: dict[str, Any]) -> dict[str, Any]:
        asked.append(args)
        return {"total_bytes": 5, "footprint": []}

    fitting, least = choices({"args": [field("width", 3)]}, {"width": 4}, 1, once)
    assert (fitting, least.total_bytes, asked) == ([], 5, [{"width": 4}])


@given(batch=st.integers(1, 96), accumulate=st.integers(1, 4), capacity=st.integers(1, 1500))
@pytest.mark.slow
def test_a_step_never_sees_fewer_examples(batch: int, accumulate: int, capacity: int) -> None:
    args = {"batch": batch, "accumulate": accumulate}
    fitting, least = choices(TRAINING, args, capacity, plan)
    for choice in [*fitting, least]:
        merged = {**args, **choice.changed}
        assert merged["batch"] * merged["accumulate"] == batch * accumulate


@given(
    st.integers(1, 40), st.lists(st.integers(0, 50), min_size=16, max_size=16), st.integers(1, 900)
)
def test_the_largest_size_that_fits_is_found_though_the_peak_is_flat_at_first(
    least: int, grows: list[int], capacity: int
) -> None:
    """A peak that grows faster and faster, as that of LoRA does."""
    steps = sorted(grows)
    peaks = {batch: least + sum(steps[:batch]) for batch in (1, 2, 4, 8, 16)}

    def convex(args: dict[str, Any]) -> dict[str, Any]:
        return {"total_bytes": peaks[args.get("batch", 16)], "footprint": []}

    only = {"args": TRAINING["args"][:2]}
    fitting, nearest = choices(only, {}, capacity, convex)
    fits = [batch for batch, peak in peaks.items() if peak <= capacity]
    if fits:
        assert fitting[0].changed.get("batch", 16) == max(fits)
    else:
        assert not fitting
        assert nearest.total_bytes == min(peaks[1], peaks[16])
