"""Numbers of the whole server: what the store's writer does, what pools are like at a scrape.

It refuses to know how they are shown. Invariant: nothing here waits, and a scrape costs no query.
"""

from __future__ import annotations

import weakref
from dataclasses import astuple

from treadle.executor.channel import SamplingChannel
from treadle.scheduler.crew import CrewCounts
from treadle.scheduler.slot import SlotState
from treadle.server_pools import ServedPools
from treadle.store import CommitReport, Store
from treadle.telemetry.metrics import Metrics


class WorkerGauges:
    """Memory of the newest worker of each slot, as it said last."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._workers: dict[tuple[str, str], weakref.ref[SamplingChannel]] = {}
        metrics.on_scrape(self._refresh)

    def watch(self, pool: str, slot: str, worker: SamplingChannel) -> None:
        """This one has the slot now."""
        self._workers[pool, slot] = weakref.ref(worker)

    def _refresh(self) -> None:
        for labels, ref in tuple(self._workers.items()):
            worker = ref()
            vitals = None if worker is None or worker.is_over else worker.vitals
            gauges = (self._metrics.worker_bytes, self._metrics.worker_device_bytes)
            if worker is None:
                del self._workers[labels]
            for gauge, value in zip(gauges, (0, 0) if vitals is None else astuple(vitals), strict=True):
                if vitals is None:
                    gauge.labels(*labels)
                    gauge.remove(*labels)
                else:
                    gauge.labels(*labels).set(value)


def count_store(metrics: Metrics, store: Store) -> None:
    """Count what this process commits from now on."""
    used = metrics.used
    store.events.on_used(lambda base_model, kind, amount: used.labels(kind, base_model).inc(amount))

    def committed(report: CommitReport) -> None:
        if not report.is_durable:
            metrics.store_failed_commits.inc()
            return
        metrics.store_commit_seconds.observe(report.seconds)
        metrics.store_commit_writes.observe(report.num_writes)

    store.on_commit(committed)
    metrics.on_scrape(lambda: metrics.store_pending_writes.set(store.num_pending_writes))


def show_pools(metrics: Metrics, pools: ServedPools) -> None:
    """Show at each scrape how the pools are."""
    shown: set[str] = set()

    def refresh() -> None:
        views = {str(view.name): view for view in pools.views()}
        for pool in shown - views.keys():
            _show_counts(metrics, pool, None)
            metrics.pool_ready.remove(pool)
            metrics.pool_leader.remove(pool)
        for pool in views.keys() - shown:
            metrics.know_pool(pool)
        for pool, view in views.items():
            metrics.pool_ready.labels(pool).set(view.is_ready)
        for pool, counts in pools.counts().items():
            metrics.pool_leader.labels(pool).set(counts is not None)
            _show_counts(metrics, pool, counts)
        shown.clear()
        shown.update(views)

    metrics.on_scrape(refresh)


def _show_counts(metrics: Metrics, pool: str, counts: CrewCounts | None) -> None:
    """None: nothing is here."""
    counts = counts or CrewCounts()
    for state in SlotState:
        metrics.pool_workers.labels(pool, state.value).set(counts.workers.get(state.value, 0))
    metrics.resident_runs.labels(pool).set(counts.num_resident_runs)
    metrics.running_samples.labels(pool).set(counts.num_running_samples)
