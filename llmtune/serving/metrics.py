"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "llmtune_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("llmtune_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.answer_tokens = Counter("llmtune_answer_tokens", "Tokens of answers.", ["model"], registry=self.registry)
        self.running = Gauge("llmtune_answers_running", "Answers that are being made.", registry=self.registry)
        self.first_token = Histogram(
            "llmtune_first_token_seconds", "Seconds from a request to its first token.", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "llmtune_request_seconds", "Seconds of requests that generate.", buckets=_SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self.registry)
