"""The share that batch keeps: how much it is, how seldom it is taken, and that gaps count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.process import Class
from llmos.kernel.sched import DeviceQueue


def serve(
    share: float, seconds: float, gap_s: float, request_s: float = 0.0, idle_s: float = 0.0
) -> tuple[float, list[float]]:
    """A stream with tokens every `gap_s` (after each `request_s` a pause of `idle_s`) beside a
    training, for so long -> (what batch got of the device, the turns that broke into the stream).
    """
    q = DeviceQueue("d", 0.0, batch_share=share)
    q.enqueue("batch", Class.BATCH, 0)
    now, got, broke, works, until = 0.0, 0.0, list[float](), False, 0.0
    while now < seconds:
        got += sum(c.seconds for c in q.charge(now) if c.worker_id == "batch")
        if now >= until - 1e-9:
            works = not works
            until = now + ((request_s or seconds) if works else idle_s)
            if works:
                q.enqueue("stream", Class.INTERACTIVE, 0)
                q.predict("stream", gap_s)
            else:
                q.dequeue("stream")
                q.released("stream")
        while decisions := q.decide(now):
            for decision in decisions:
                if decision.what == "hold":
                    broke += [now] if decision.why == "batch-share" else []
                    q.released(decision.worker_id)
        wake = q.wake_at()
        now = min(until, wake if wake is not None and wake > now else until)
    return got / seconds, broke


def test_without_a_share_interactive_work_has_everything() -> None:
    assert serve(0.0, 120.0, 0.006) == (0.0, [])


def test_the_share_is_kept_in_few_long_turns() -> None:
    share, broke = serve(0.05, 600.0, 0.006)
    assert share == pytest.approx(0.05, abs=0.005)
    tokens = 600.0 * (1 - share) / 0.006
    assert len(broke) / tokens <= 0.01


def test_slow_tokens_get_longer_turns_further_apart() -> None:
    share, broke = serve(0.05, 1200.0, 0.2)
    assert share == pytest.approx(0.05, abs=0.01)
    assert len(broke) / (1200.0 * (1 - share) / 0.2) <= 0.01


def test_what_the_gaps_between_requests_give_is_enough() -> None:
    share, broke = serve(0.05, 300.0, 0.006, request_s=5.0, idle_s=1.0)
    assert share == pytest.approx(1 / 6, abs=0.02)
    assert broke == []


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.5), st.floats(0.001, 0.3))
def test_at_most_one_gap_in_a_hundred_is_touched(share: float, gap_s: float) -> None:
    got, broke = serve(share, 200.0, gap_s)
    tokens = 200.0 * (1 - got) / gap_s
    assert len(broke) <= 0.01 * tokens + 1
    assert got <= share + 0.05
