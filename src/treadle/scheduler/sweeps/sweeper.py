"""All sweeps in turn, again and again. The rules and their reasons are in docs/lifecycle.md.

It refuses to know SQL and formats. Invariants: every sweep is idempotent and works in bounded steps, so that it may
end anywhere, and another server may do the same at the same time; one that fails keeps no other from its turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from treadle.blobs import BlobStore
from treadle.config.tree import RetentionSettings
from treadle.domain.limits import CHECKPOINT_GRACE_S, MAX_ROWS_PER_SWEEP
from treadle.domain.usage import HOUR_S, SETTLED_AFTER_S
from treadle.errors import StoreUnavailable
from treadle.scheduler.sweeps.cold import ColdStorage, put_away
from treadle.scheduler.sweeps.unnamed import UnnamedBlobs, delete_blobs, wanted_by_loads
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# Blobs are listed this many times within the time that an unnamed one is kept: to list a bucket costs money.
_LISTINGS_PER_KEPT_TIME = 6
# Pages of the table of requests that one sweep walks through; the next one goes on behind them.
_MAX_PAGES_PER_SWEEP = 200


class Sweeper:
    """Sweeps one store and its blobs. `pools` are this server's, whether they lead or not."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        pools: Sequence[ColdStorage],
        settings: RetentionSettings,
        clock: Callable[[], float],
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._pools = pools
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._unnamed = UnnamedBlobs(store=store, blobs=blobs, kept_s=settings.unnamed_blobs_s)
        self._listed_at = clock()
        self._next_row = 0
        self._first_hour: int | None = None

    async def run(self) -> None:
        """Sweep once per interval until cancelled."""
        while True:
            await asyncio.sleep(self._settings.sweep_interval_s)
            await self.sweep()

    async def sweep(self) -> dict[str, int]:
        """Everything that is due now: how many of each kind went. What fails is left to the next time."""
        # Names come before what depends on them: a finished session's runs are unloaded, then their state goes.
        sweeps: tuple[tuple[str, Callable[[float], Awaitable[int]]], ...] = (
            ("expired_sessions", self._sessions),
            ("cold_runs", self._cold_runs),
            ("results", self._results),
            ("sampler_versions", self._versions),
            ("checkpoints", self._checkpoints),
            ("finished_runs", self._finished_runs),
            ("retired_blobs", self._retired),
            ("requests", self._requests),
            ("sampling_sessions", self._sampling_sessions),
            ("stability_records", self._stability_records),
            ("custom_losses", self._custom_losses),
            ("operator_commands", self._operator_commands),
            ("unnamed_blobs", self._unnamed_blobs),
            ("usage", self._usage),
            ("rates", self._rates),
        )
        counts = {}
        began = time.perf_counter()
        for name, work in sweeps:
            try:
                counts[name] = await work(self._clock())
            except StoreUnavailable as error:
                log.warning("sweep is left to the next time", what=name, reason=error.message)
                self._metrics.caught_errors.labels("sweep").inc()
            except Exception as error:  # noqa: BLE001 (background sweep: what is left is swept the next time)
                log.error("sweep failed", what=name, exc=error)
                self._metrics.caught_errors.labels("sweep").inc()
        self._metrics.sweep_seconds.observe(time.perf_counter() - began)
        self._metrics.last_sweep.set(time.time())
        swept = {name: count for name, count in counts.items() if count}
        for name, count in swept.items():
            self._metrics.swept.labels(what=name).inc(count)
        if swept:
            log.info("swept", **swept)
        return counts

    async def _sessions(self, now: float) -> int:
        since = now - self._settings.session_silence_s
        await self._store.retention.revive_sessions(silent_since=since)
        return await _until_done(lambda: self._store.retention.expire_sessions(silent_since=since))

    async def _cold_runs(self, _now: float) -> int:
        return await put_away(self._store, self._pools)

    async def _results(self, now: float) -> int:
        settings = self._settings
        return await _until_done(
            lambda: self._store.requests.sweep(
                delivered_before=now - settings.delivered_results_s,
                undelivered_before=now - settings.undelivered_results_s,
            )
        )

    async def _versions(self, now: float) -> int:
        settings = self._settings

        async def drop() -> int:
            count, keys = await self._store.retention.drop_versions(
                keep=settings.sampler_versions,
                unused_since=now - settings.sampler_version_s,
                finished_before=now - settings.finished_session_s,
            )
            await delete_blobs(self._blobs, keys)
            return count

        return await _until_done(drop)

    async def _checkpoints(self, now: float) -> int:
        # Read before the rows go: what is done by then has a snapshot that names its blob.
        wanted = await wanted_by_loads(self._store)

        async def drop() -> int:
            count, keys = await self._store.retention.drop_checkpoints(expired_before=now - CHECKPOINT_GRACE_S)
            await delete_blobs(self._blobs, set(keys) - wanted)
            return count

        return await _until_done(drop)

    async def _finished_runs(self, now: float) -> int:
        before = now - self._settings.finished_session_s
        return await _until_done(lambda: self._store.retention.unload_finished(finished_before=before))

    async def _retired(self, _now: float) -> int:
        return len(await delete_blobs(self._blobs, await self._store.snapshots.retire()))

    async def _requests(self, now: float) -> int:
        before = now - self._settings.requests_s
        count = 0
        for _ in range(_MAX_PAGES_PER_SWEEP):
            step = await self._store.retention.forget_requests(finished_before=before, after_row=self._next_row)
            count += step.num_forgotten
            self._next_row = step.next_row or 0
            if step.next_row is None:
                break
        return count

    async def _sampling_sessions(self, now: float) -> int:
        before = now - self._settings.requests_s
        return await _until_done(lambda: self._store.retention.forget_sampling_sessions(used_before=before))

    async def _stability_records(self, now: float) -> int:
        since = now - self._settings.stability_record_s
        return await _until_done(lambda: self._store.stability.forget(unused_since=since))

    async def _custom_losses(self, now: float) -> int:
        before = now - self._settings.finished_session_s
        return await _until_done(lambda: self._store.custom_losses.forget(finished_before=before))

    async def _operator_commands(self, now: float) -> int:
        before = now - self._settings.requests_s
        return await _until_done(lambda: self._store.commands.forget(created_before=before))

    async def _unnamed_blobs(self, now: float) -> int:
        if now - self._listed_at < self._settings.unnamed_blobs_s / _LISTINGS_PER_KEPT_TIME:
            return 0
        self._listed_at = now
        return await self._unnamed.sweep(now)

    async def _usage(self, now: float) -> int:
        """Write the storage of hours that are over, and forget what is old, once an hour; hours of a pause as well."""
        if self._first_hour is None:
            self._first_hour = await self._store.usage.first_hour_to_accrue()
        settled = now - HOUR_S - SETTLED_AFTER_S
        if self._first_hour > settled:
            return 0
        while self._first_hour <= settled:
            await self._store.usage.accrue_storage(self._first_hour)
            self._first_hour += HOUR_S
        count = 0
        while forgotten := await self._store.usage.forget():
            count += forgotten
        return count

    async def _rates(self, _now: float) -> int:
        count = 0
        while forgotten := await self._store.rates.forget():
            count += forgotten
        return count


async def _until_done(step: Callable[[], Awaitable[int]]) -> int:
    """Repeat a bounded step while it finds as much as it may take; the sum."""
    total = 0
    while (count := await step()) >= MAX_ROWS_PER_SWEEP:
        total += count
    return total + count
