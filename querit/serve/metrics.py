"""What Prometheus is told, of each app its own."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from querit.serve.batcher import Round


class Metrics:
    """No label holds what a client wrote: `path` is one of the routes', or "other"."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "querit", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **options)
        self.seconds = Histogram("request_seconds", "From a request's first byte to its answer.", ["path"], **options)
        self.pairs = Counter("pairs", "Pairs of a query and a document, or a window of one, scored.", **options)
        self.tokens = Counter("tokens", "Tokens scored.", **options)
        self.round_requests = Histogram(
            "round_requests", "Requests that were scored together.", buckets=(1, 2, 4, 8, 16, 32, 64), **options
        )
        self.round_seconds = Histogram("round_seconds", "Time to score a round.", **options)
        self.in_flight = Gauge("in_flight", "Requests taken and not yet answered.", **options)

    def observe_round(self, scored: Round) -> None:
        self.tokens.inc(scored.tokens)
        self.pairs.inc(scored.pairs)
        self.round_requests.observe(scored.requests)
        self.round_seconds.observe(scored.seconds)
