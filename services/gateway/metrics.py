"""What the gateway counts, for `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from llmos.services.gateway.turnstile import Turnstile

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_WHOLE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    def __init__(self, turnstile: Turnstile) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "llmos_gateway_requests", "Requests that were answered", ("endpoint", "status"), **kept
        )
        self.seconds = Histogram(
            "llmos_gateway_request_seconds",
            "From request to end of the answer",
            ("endpoint",),
            buckets=_WHOLE_S,
            **kept,
        )
        self.in_flight = Gauge(
            "llmos_gateway_in_flight", "Requests that are not answered yet", **kept
        )
        self.gone = Counter(
            "llmos_gateway_clients_gone", "Requests whose client went first", **kept
        )
        self.tokens = Counter(
            "llmos_gateway_tokens", "Tokens of prompts, of answers, from caches", ("kind",), **kept
        )
        self.first = Histogram(
            "llmos_gateway_first_token_seconds",
            "From request to first text",
            ("endpoint",),
            buckets=_FIRST_S,
            **kept,
        )
        self.gap = Histogram(
            "llmos_gateway_token_gap_seconds",
            "Between two pieces of a text",
            ("endpoint",),
            buckets=_GAP_S,
            **kept,
        )
        Gauge("llmos_gateway_active", "Requests that run", **kept).set_function(
            lambda: turnstile.active
        )
        Gauge("llmos_gateway_waiting", "Requests that wait for their turn", **kept).set_function(
            lambda: turnstile.waiting
        )

    def shown(self) -> bytes:
        return generate_latest(self.registry)

    def spent(self, result: dict[str, Any]) -> None:
        """The tokens of a process that has ended."""
        for kind, key in (
            ("prompt", "prompt_tokens"),
            ("completion", "tokens"),
            ("cached", "cached_tokens"),
        ):
            self.tokens.labels(kind).inc(int(result.get(key) or 0))

    def pace(self, endpoint: str, began_at: float) -> Callable[[float], None]:
        """For one text: what is to be called for each piece of it, with when it was made."""
        first, gap = self.first.labels(endpoint), self.gap.labels(endpoint)
        last_at, begun = began_at, False

        def came(at: float) -> None:
            nonlocal last_at, begun
            (gap if begun else first).observe(max(0.0, at - last_at))
            last_at, begun = at, True

        return came
