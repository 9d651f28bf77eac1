"""Spin: a load that does what it was told, to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.services.programs.spin import Spin
from support.run_program import Run, make_context


def test_a_continued_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    args = {"steps": 8, "busy_ms": 0.1, "size": 32}
    whole = Run.start(Spin, make_context(tmp_path), **args).to_end()
    half = Run.start(Spin, make_context(tmp_path), **args).steps(3)
    folder = half.save(tmp_path / "checkpoint")
    resumed = Run.resume(Spin, make_context(tmp_path), folder, **args)
    assert resumed.to_end() == whole
    assert [r.step for r in resumed.reports] == [4, 5, 6, 7, 8]


def test_each_step_has_another_checksum(tmp_path: Path) -> None:
    run = Run.start(Spin, make_context(tmp_path), steps=5, busy_ms=0.0, size=4).steps(5)
    assert len({r.metrics["checksum"] for r in run.reports}) == 5


def test_it_fails_at_the_step_it_was_told_to(tmp_path: Path) -> None:
    run = Run.start(Spin, make_context(tmp_path), steps=5, busy_ms=0.0, fail_at=3).steps(2)
    with pytest.raises(RuntimeError, match="step 3"):
        run.step()


def test_it_ends_with_the_status_it_was_told(tmp_path: Path) -> None:
    run = Run.start(Spin, make_context(tmp_path), steps=1, busy_ms=0.0, exit_status=7)
    assert run.to_end().status == 7


def test_its_plan_counts_the_memory_it_was_told_to_hold() -> None:
    small, large = (Spin.plan(Spin.Args(memory_bytes=n)).total_bytes for n in (0, 10**9))
    assert large - small == 10**9
