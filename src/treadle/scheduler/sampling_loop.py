"""Samples flow to the sampler continuously, outside the cycle: read rows, hand them over, commit what comes back.

Rows keep QUEUED while a sampler works on them. When its worker dies they are simply handed to the next one; draws
are keyed by the seed in the row, so a second run gives the same tokens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, PoolName, RequestId, TenantId
from treadle.domain.outcome import Failure, SampleOutcome
from treadle.domain.plan import SampleWork
from treadle.domain.records import FinishedRequest, LeaseRecord, RequestRecord
from treadle.domain.states import Category
from treadle.errors import Fenced, TreadleError, WorkerDied
from treadle.executor.base import Executor
from treadle.scheduler.preparing import drop_blobs, read_payloads
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

POLL_S = 1.0
ERROR_PAUSE_S = 1.0
# Samples one worker holds at a time; the rest wait as rows, where fairness over tenants and a restart find them.
MAX_HANDED_OVER = 256
# Of these, one tenant's at most: a newcomer's sample finds room however many another one has queued.
MAX_HANDED_OVER_PER_TENANT = 192
# A sample that was running at this many worker deaths is given up.
MAX_DEATHS = 3


class SamplingLoop:
    """Feeds one sampler and commits its results. `run` lasts as long as its executor."""

    def __init__(self, *, pool: PoolName, store: Store, blobs: BlobStore, lease: LeaseRecord, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._lease = lease
        self._running: dict[RequestId, TenantId] = {}
        self._deaths: dict[RequestId, int] = {}
        self._outcomes: list[SampleOutcome] = []
        self._payload_keys: dict[RequestId, BlobKey] = {}
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._is_abandoned = False

    def wake(self) -> None:
        """Something was queued."""
        self._wake.set()

    def on_samples(self, outcomes: Sequence[SampleOutcome]) -> None:
        """The sampler finished some; called on the event loop."""
        self._outcomes.extend(outcomes)
        self._wake.set()

    def stop(self) -> None:
        """End `run`; samples in flight stay queued for the next start."""
        self._is_stopping = True
        self._wake.set()

    def abandon(self) -> None:
        """The executor has died: end `run` after whatever is being committed."""
        self._is_abandoned = True
        self._wake.set()

    async def run(self, executor: Executor) -> None:
        """Feed `executor` until stopped or abandoned. Raises WorkerDied when it is dead, Fenced without the lease."""
        self._outcomes.clear()
        self._running.clear()
        self._is_abandoned = False
        try:
            while not (self._is_stopping or self._is_abandoned):
                self._wake.clear()
                try:
                    await self._commit()
                    await self._hand_over(executor)
                except (WorkerDied, Fenced):
                    raise
                except Exception as error:  # noqa: BLE001 (sample loop: the rows are still queued, so it tries again)
                    log.error("sampling loop failed", pool=self._pool, exc=error)
                    self._metrics.caught_errors.labels("sample_loop").inc()
                    await asyncio.sleep(ERROR_PAUSE_S)
                if not self._outcomes:
                    await self._sleep()
            await self._commit_last()
        finally:
            self._count_deaths()

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _hand_over(self, executor: Executor) -> None:
        room = MAX_HANDED_OVER - len(self._running)
        if room <= 0:
            return
        rows = await self._store.requests.queued_samples(self._pool, MAX_HANDED_OVER + room)
        fresh = self._within_shares(rows)[:room]
        poisoned = [row for row in fresh if self._deaths.get(row.request_id, 0) >= MAX_DEATHS]
        if poisoned:
            await self._give_up(poisoned)
        ready = [row for row in fresh if row not in poisoned]
        if not ready:
            return
        payloads = await read_payloads([row.request_id for row in ready], self._store, self._blobs)
        works = []
        for row in ready:
            payload = payloads[row.request_id]
            if isinstance(payload, Failure):
                self._outcomes.append(SampleOutcome(request_id=row.request_id, failure=payload))
            else:
                works.append(SampleWork(request_id=row.request_id, tenant_id=row.tenant_id, payload=payload))
            if row.payload_key is not None:
                self._payload_keys[row.request_id] = row.payload_key
        executor.submit_samples(works)
        self._running.update((row.request_id, row.tenant_id) for row in ready)

    def _within_shares(self, rows: Sequence[RequestRecord]) -> list[RequestRecord]:
        """The rows that are not with the sampler yet, in their order, as far as their tenants' shares go."""
        num_held = Counter(self._running.values())
        chosen = []
        for row in rows:
            if row.request_id not in self._running and num_held[row.tenant_id] < MAX_HANDED_OVER_PER_TENANT:
                num_held[row.tenant_id] += 1
                chosen.append(row)
        return chosen

    async def _commit(self) -> None:
        """Commit everything that came back since the last time, in one transaction."""
        if not self._outcomes:
            return
        outcomes, self._outcomes = self._outcomes, []
        finished = [
            FinishedRequest(
                request_id=outcome.request_id,
                result=outcome.encoded,
                failure=outcome.failure,
                is_transient=outcome.is_transient,
            )
            for outcome in outcomes
        ]
        try:
            await self._store.cycles.finish_samples(self._lease, finished)
        except Exception:
            self._outcomes = outcomes + self._outcomes
            raise
        over = []
        for outcome in outcomes:
            self._running.pop(outcome.request_id, None)
            self._deaths.pop(outcome.request_id, None)
            if (key := self._payload_keys.pop(outcome.request_id, None)) is not None:
                over.append(key)
            self._metrics.sampled_tokens.labels(self._pool).inc(outcome.num_sampled_tokens)
            self._metrics.prompt_tokens.labels(self._pool).inc(outcome.num_prompt_tokens)
        await drop_blobs(self._blobs, over)

    async def _commit_last(self) -> None:
        """Store what came back before the end. What cannot be stored is drawn again; nobody else waits for it."""
        try:
            await self._commit()
        except Fenced:
            raise
        except TreadleError as error:
            log.warning("samples not committed", pool=self._pool, reason=error.message)

    async def _give_up(self, rows: Sequence[RequestRecord]) -> None:
        failure = Failure(f"this sample was running when its worker ended {MAX_DEATHS} times", Category.SERVER)
        await self._store.cycles.finish_samples(
            self._lease, [FinishedRequest(request_id=row.request_id, failure=failure) for row in rows]
        )
        for row in rows:
            del self._deaths[row.request_id]
        await drop_blobs(self._blobs, [row.payload_key for row in rows if row.payload_key is not None])

    def _count_deaths(self) -> None:
        """Whatever was still running when the executor went away was there at its end."""
        if not self._is_stopping:
            for request_id in self._running:
                self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        self._running.clear()
