"""Every Prometheus metric of treadle, in one place.

Labels are pools (named by the operator), op kinds, route templates and fixed words: never anything that a client can
choose. It refuses to know when something is counted. Invariant: every metric here has a line in docs/operations.md,
and a test compares the two.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

_FAST_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60)
_CYCLE_S = (0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
_FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_TOKENS = (32, 128, 512, 2_048, 8_192, 32_768, 131_072, 524_288)


class Metrics:
    """The metrics of one server process, registered with `registry`, which its owner passes on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # The time of each first count would be a second series for every one, of use to nobody.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped in prometheus_client 0.2x
        self.registry = registry
        self.http_requests = Counter(
            "treadle_http_requests",
            "HTTP requests answered, by route template and status",
            ["route", "status"],
            registry=registry,
        )
        self.http_seconds = Histogram(
            "treadle_http_seconds",
            "Seconds from request to answer, by route template; long polls excluded",
            ["route"],
            registry=registry,
            buckets=_FAST_S,
        )
        self.cycles = Counter("treadle_cycles", "Clock cycles finished, by pool", ["pool"], registry=registry)
        self.cycle_seconds = Histogram(
            "treadle_cycle_seconds",
            "Seconds that the worker spent on one clock cycle",
            ["pool"],
            registry=registry,
            buckets=_CYCLE_S,
        )
        self.cycle_tokens = Histogram(
            "treadle_cycle_tokens", "Tokens in one clock cycle", ["pool"], registry=registry, buckets=_TOKENS
        )
        self.cycle_occupancy = Histogram(
            "treadle_cycle_occupancy",
            "Tokens in one clock cycle as a share of its budget; over 1 when a single quantum is larger",
            ["pool"],
            registry=registry,
            buckets=_FRACTIONS,
        )
        self.queued_ops = Gauge(
            "treadle_queued_ops",
            "Requests that wait or run, by pool and work (training, sampling)",
            ["pool", "work"],
            registry=registry,
        )
        self.queued_tokens = Gauge(
            "treadle_queued_tokens", "Tokens of requests that wait or run", ["pool", "work"], registry=registry
        )
        self.queued_bytes = Gauge(
            "treadle_queued_bytes", "Stored bytes of requests that wait or run", ["pool", "work"], registry=registry
        )
        self.queued_oldest_seconds = Gauge(
            "treadle_queued_oldest_seconds",
            "Age of the oldest queued request",
            ["pool"],
            registry=registry,
        )
        self.trained_tokens = Counter(
            "treadle_trained_tokens", "Tokens through forward and backward, by pool", ["pool"], registry=registry
        )
        self.base_forwards = Counter(
            "treadle_base_forwards", "Forward passes of the base model for training", ["pool"], registry=registry
        )
        self.sampled_tokens = Counter("treadle_sampled_tokens", "Tokens sampled, by pool", ["pool"], registry=registry)
        self.prompt_tokens = Counter(
            "treadle_prompt_tokens", "Prompt tokens read by the sampler, by pool", ["pool"], registry=registry
        )
        self.worker_deaths = Counter(
            "treadle_worker_deaths", "Workers that ended without being asked to", ["pool"], registry=registry
        )
        self.restores = Counter(
            "treadle_restores", "Runs rebuilt on a worker from a snapshot", ["pool"], registry=registry
        )
        self.replayed_ops = Counter(
            "treadle_replayed_ops",
            "Committed training requests that ran again behind a restore",
            ["pool"],
            registry=registry,
        )
        self.recovery_seconds = Histogram(
            "treadle_recovery_seconds",
            "Seconds from the end of a worker or a leader until every run that waited went on",
            ["pool"],
            registry=registry,
            buckets=_CYCLE_S,
        )
        self.snapshots = Counter(
            "treadle_snapshots", "Snapshots of runs written beside the cycles", ["pool"], registry=registry
        )
        self.snapshot_seconds = Histogram(
            "treadle_snapshot_seconds",
            "Seconds that a snapshot took of the device's thread",
            ["pool"],
            registry=registry,
            buckets=_FAST_S,
        )
        self.replay_debt_seconds = Gauge(
            "treadle_replay_debt_seconds",
            "Worker seconds that a death now would cost the run it costs most",
            ["pool"],
            registry=registry,
        )
        self.refused_connections = Counter(
            "treadle_refused_connections",
            "Connections ended before anybody was known, by reason (the guards of docs/security.md)",
            ["reason"],
            registry=registry,
        )
        self.failed_logins = Counter(
            "treadle_failed_logins", "Requests without a key or with one that nobody holds", registry=registry
        )
        self.used = Counter(
            "treadle_used",
            "What tenants used, as it is billed, by kind (tokens, saves, byte-seconds) and base model",
            ["kind", "base_model"],
            registry=registry,
        )
        self.caught_errors = Counter(
            "treadle_caught_errors",
            "Unexpected exceptions caught at a boundary (middleware, cycle_loop, sample_loop, sweep)",
            ["boundary"],
            registry=registry,
        )

    def render(self) -> bytes:
        """The text that GET /metrics answers, of content type METRICS_CONTENT_TYPE."""
        return generate_latest(self.registry)
