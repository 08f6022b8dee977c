"""Every Prometheus metric of treadle, in one place.

Labels are pools (named by the operator), op kinds, route templates and fixed words: never anything that a client can
choose, and never a tenant. It refuses to know when something is counted. Invariant: docs/metrics.md is made from this
file, and a test compares the two; dashboard and alert rules name only what is here, which another test checks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from treadle import __version__
from treadle.domain.ops import OpKind
from treadle.domain.states import Category

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

_FAST_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60)
_CYCLE_S = (0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
# What clients wait: from an idle server to one with a queue of an hour.
_WAIT_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_600)
_FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_TOKENS = (32, 128, 512, 2_048, 8_192, 32_768, 131_072, 524_288)
_WRITES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class MetricDoc:
    """One metric as it is documented. names: of its samples as Prometheus stores them; kind: counter and the like."""

    section: str
    names: tuple[str, ...]
    kind: str
    labels: tuple[str, ...]
    text: str


class Metrics:
    """The metrics of one server process, registered with `registry`, which its owner passes on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # The time of each first count would be a second series for every one, of use to nobody.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped in prometheus_client 0.2x
        self.registry = registry
        self.docs: list[MetricDoc] = []
        self._section = ""
        self._refreshers: dict[object, Callable[[], None]] = {}
        self._make_server_metrics()
        self._make_http_metrics()
        self._make_queue_metrics()
        self._make_clock_metrics()
        self._make_sampling_metrics()
        self._make_recovery_metrics()
        self._make_store_metrics()

    def on_scrape(self, refresh: Callable[[], None]) -> Callable[[], None]:
        """Call `refresh` before each rendering, to set gauges; it must be quick. The returned function ends it."""
        key = object()
        self._refreshers[key] = refresh

        def end() -> None:
            self._refreshers.pop(key, None)

        return end

    def render(self) -> bytes:
        """The text that GET /metrics answers, of content type METRICS_CONTENT_TYPE."""
        for refresh in tuple(self._refreshers.values()):
            refresh()
        return generate_latest(self.registry)

    def know_pool(self, pool: str) -> None:
        """Begin its counters at 0: a series that begins at its first count hides that one from `increase`."""
        self.cycles.labels(pool)
        self.worker_deaths.labels(pool, "0")
        for change in ("acquired", "lost"):
            self.lease_changes.labels(pool, change)
        for kind in OpKind:
            if kind is not OpKind.CREATE_CUSTOM_LOSS:
                self.finished_requests.labels(pool, kind.value)
                for category in Category:
                    self.failed_requests.labels(pool, kind.value, category.value)

    def _make_server_metrics(self) -> None:
        self._section = "Server and pools"
        self.build = Info("treadle_build", "Version of treadle and of Python", registry=self.registry)
        self.build.info({"version": __version__, "python": platform.python_version()})
        self._note(
            ("treadle_build_info",), "gauge", ("python", "version"), "Always 1: which treadle and Python this is"
        )
        self.pool_ready = self._gauge(
            "treadle_pool_ready", "1 while the pool serves, here or on another server", "pool"
        )
        self.pool_leader = self._gauge("treadle_pool_leader", "1 while this server leads the pool", "pool")
        self.pool_workers = self._gauge(
            "treadle_pool_workers",
            "Workers of the pool on this server, by state (loading, up, leaving, down)",
            "pool",
            "state",
        )
        self.worker_bytes = self._gauge(
            "treadle_worker_resident_bytes", "Memory of a worker process, as it said last", "pool", "worker"
        )
        self.worker_device_bytes = self._gauge(
            "treadle_worker_device_bytes", "Device memory that a worker process reserved", "pool", "worker"
        )
        self.lease_changes = self._counter(
            "treadle_lease_changes",
            "Leases that this server got (acquired) or lost to another (lost)",
            "pool",
            "change",
        )
        self.used = self._counter(
            "treadle_used",
            "What tenants used, as it is billed, by kind (tokens, saves, byte-seconds) and base model",
            "kind",
            "base_model",
        )
        self.caught_errors = self._counter(
            "treadle_caught_errors",
            "Unexpected exceptions caught at a boundary (middleware, cycle_loop, sample_loop, sweep)",
            "boundary",
        )
        for boundary in ("middleware", "cycle_loop", "sample_loop", "sweep"):
            self.caught_errors.labels(boundary)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _make_http_metrics(self) -> None:
        self._section = "Gateway"
        self.http_requests = self._counter(
            "treadle_http_requests", "HTTP requests answered, by route template and status", "route", "status"
        )
        self.http_seconds = self._histogram(
            "treadle_http_seconds",
            "Seconds from request to answer, by route template; long polls excluded",
            _FAST_S,
            "route",
        )
        self.refused_calls = self._counter(
            "treadle_refused_calls",
            "HTTP calls refused, by error of errors.py (QueueFull, Unauthenticated and the like) and status",
            "error",
            "status",
        )
        self.refused_at_admission = self._counter(
            "treadle_refused_requests",
            "Requests that were stored as failed because their content cannot be honoured, by pool and kind",
            "pool",
            "kind",
        )
        self.failed_logins = self._counter(
            "treadle_failed_logins", "Requests without a key or with one that nobody holds"
        )
        self.refused_connections = self._counter(
            "treadle_refused_connections",
            "Connections ended before anybody was known, by reason (the guards of docs/security.md)",
            "reason",
        )
        self.held_calls = self._gauge(
            "treadle_held_calls", "HTTP calls held now: until there is a result, or until there is room", "until"
        )

    def _make_queue_metrics(self) -> None:
        self._section = "Queue"
        self.queued_ops = self._gauge(
            "treadle_queued_ops", "Requests that wait or run, by pool and work (training, sampling)", "pool", "work"
        )
        self.queued_tokens = self._gauge("treadle_queued_tokens", "Tokens of requests that wait or run", "pool", "work")
        self.queued_bytes = self._gauge(
            "treadle_queued_bytes", "Stored bytes of requests that wait or run", "pool", "work"
        )
        self.queued_oldest_seconds = self._gauge(
            "treadle_queued_oldest_seconds", "Age of the oldest queued request", "pool"
        )
        self.wait_seconds = self._histogram(
            "treadle_wait_seconds",
            "Seconds from a request's row to its first work on a worker",
            _WAIT_S,
            "pool",
            "work",
        )
        self.request_seconds = self._histogram(
            "treadle_request_seconds",
            "Seconds from a request's row to its stored result, failed ones included",
            _WAIT_S,
            "pool",
            "kind",
        )
        self.finished_requests = self._counter(
            "treadle_finished_requests", "Requests that ended on this server's workers, well or not", "pool", "kind"
        )
        self.failed_requests = self._counter(
            "treadle_failed_requests",
            "Of these, requests that failed, by category: user (theirs to fix), server (ours), unknown",
            "pool",
            "kind",
            "category",
        )

    def _make_clock_metrics(self) -> None:
        self._section = "Clock"
        self.cycles = self._counter("treadle_cycles", "Clock cycles finished, by pool", "pool")
        self.cycle_seconds = self._histogram(
            "treadle_cycle_seconds", "Seconds that the worker spent on one clock cycle", _CYCLE_S, "pool"
        )
        self.cycle_part_seconds = self._histogram(
            "treadle_cycle_part_seconds",
            "Seconds of a part of a cycle on its worker (restore, setup, passes, steps, publish), samples in between "
            "included",
            _CYCLE_S,
            "pool",
            "part",
        )
        self.cycle_tokens = self._histogram("treadle_cycle_tokens", "Tokens in one clock cycle", _TOKENS, "pool")
        self.cycle_occupancy = self._histogram(
            "treadle_cycle_occupancy",
            "Tokens in one clock cycle as a share of its budget; over 1 when a single quantum is larger",
            _FRACTIONS,
            "pool",
        )
        self.trained_tokens = self._counter(
            "treadle_trained_tokens", "Tokens through forward and backward, by pool", "pool"
        )
        self.base_forwards = self._counter(
            "treadle_base_forwards", "Forward passes of the base model for training", "pool"
        )
        self.resident_runs = self._gauge(
            "treadle_resident_runs", "Runs whose state workers of this server hold", "pool"
        )

    def _make_sampling_metrics(self) -> None:
        self._section = "Sampling"
        self.sampled_tokens = self._counter("treadle_sampled_tokens", "Tokens sampled, by pool", "pool")
        self.prompt_tokens = self._counter(
            "treadle_prompt_tokens", "Prompt tokens of finished samples, cached ones included, by pool", "pool"
        )
        self.cached_prompt_tokens = self._counter(
            "treadle_cached_prompt_tokens", "Of the prompt tokens, those that the prefix cache served", "pool"
        )
        self.running_samples = self._gauge("treadle_running_samples", "Samples that are with a sampler now", "pool")

    def _make_recovery_metrics(self) -> None:
        self._section = "Recovery"
        self.worker_deaths = self._counter(
            "treadle_worker_deaths", "Workers that ended without being asked to, by slot", "pool", "worker"
        )
        self.restores = self._counter("treadle_restores", "Runs rebuilt on a worker from a snapshot", "pool")
        self.replayed_ops = self._counter(
            "treadle_replayed_ops", "Committed training requests that ran again behind a restore", "pool"
        )
        self.recovery_seconds = self._histogram(
            "treadle_recovery_seconds",
            "Seconds from the end of a worker or a leader until every run that waited went on",
            _CYCLE_S,
            "pool",
        )
        self.snapshots = self._counter("treadle_snapshots", "Snapshots of runs written beside the cycles", "pool")
        self.snapshot_seconds = self._histogram(
            "treadle_snapshot_seconds", "Seconds that a snapshot took of the device's thread", _FAST_S, "pool"
        )
        self.replay_debt_seconds = self._gauge(
            "treadle_replay_debt_seconds",
            "Worker seconds that a death now would cost the run it costs most",
            "pool",
            "worker",
        )

    def _make_store_metrics(self) -> None:
        self._section = "Store and sweeps"
        self.store_commit_seconds = self._histogram(
            "treadle_store_commit_seconds",
            "Seconds of one transaction of the store's writer, its flush included",
            _FAST_S,
        )
        self.store_commit_writes = self._histogram(
            "treadle_store_commit_writes", "Writes that one transaction of the store's writer took together", _WRITES
        )
        self.store_failed_commits = self._counter(
            "treadle_store_failed_commits", "Transactions of the store's writer that failed, tried again or not"
        )
        self.store_pending_writes = self._gauge("treadle_store_pending_writes", "Writes that wait for the next commit")
        self.sweep_seconds = self._histogram(
            "treadle_sweep_seconds", "Seconds of one round of all sweeps (docs/lifecycle.md)", _CYCLE_S
        )
        self.swept = self._counter("treadle_swept", "What sweeps let go of, by kind (docs/lifecycle.md)", "what")
        self.last_sweep = self._gauge("treadle_last_sweep_timestamp_seconds", "When the last round of sweeps ended")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self._note((f"{name}_total",), "counter", labels, text)
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self._note((name,), "gauge", labels, text)
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        self._note(tuple(f"{name}_{part}" for part in ("bucket", "sum", "count")), "histogram", labels, text)
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def _note(self, names: tuple[str, ...], kind: str, labels: tuple[str, ...], text: str) -> None:
        self.docs.append(MetricDoc(self._section, names, kind, labels, text))
