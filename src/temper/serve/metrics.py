"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from temper.serve.answering import Desk
from temper.serve.engine import Work
from temper.serve.gallery import Served

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self, desk: Desk) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("temper_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.read = Counter("temper_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.written = Counter("temper_generation_tokens", "Tokens sampled.", ["model"], registry=self.registry)
        self.given_up = Counter("temper_answers_given_up", "Answers whose client hung up.", ["model"], registry=self.registry)  # fmt: skip
        self.first = Histogram("temper_time_to_first_token_seconds", "From the request to its first token.", ["model"], buckets=SECONDS, registry=self.registry)  # fmt: skip
        self.seconds = Histogram("temper_request_seconds", "From the request to its last token.", ["model"], buckets=SECONDS, registry=self.registry)  # fmt: skip
        under_way = Gauge("temper_answers_under_way", "Answers being written or waiting.", registry=self.registry)
        under_way.set_function(lambda: desk.under_way)
        desk.over = self.count

    def count(self, served: Served, works: Sequence[Work], seconds: float, written: bool) -> None:
        """Works that are over, or that were given up; `written`: something was to follow their prompts."""
        model = served.name
        self.seconds.labels(model).observe(seconds)
        for work in works:
            self.read.labels(model).inc(len(work.ids))
            self.written.labels(model).inc(work.written)
            if work.first is not None:
                self.first.labels(model).observe(work.first)
            lost = sum(draft.done is None for draft in work.drafts)
            if lost and work.failed is None and written:
                self.given_up.labels(model).inc(lost)

    def text(self) -> bytes:
        return generate_latest(self.registry)
