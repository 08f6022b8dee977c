"""Samples flow to the sampler continuously, outside the cycle: read rows, hand them over, commit what comes back.

Rows keep QUEUED while a sampler works on them. When its worker dies they are simply handed to the next one; draws
are keyed by the seed in the row, so a second run gives the same tokens. Those that may have ended it are handed over in
the company that the quarantine allows.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from treadle.blobs import BlobStore
from treadle.domain.ids import PoolName, RequestId, TenantId
from treadle.domain.outcome import Failure, SampleOutcome
from treadle.domain.plan import SampleWork
from treadle.domain.policy import Policies
from treadle.domain.rates import RateKind
from treadle.domain.records import FinishedRequest, LeaseRecord, RequestRecord
from treadle.domain.states import Category
from treadle.domain.usage import SampleUsage
from treadle.errors import Fenced, StoreUnavailable, TreadleError, WorkerDied
from treadle.executor.base import Executor
from treadle.scheduler.outages import Outages
from treadle.scheduler.preparing import Unread, drop_blobs, read_payloads
from treadle.scheduler.quarantine import MAX_DEATHS, Quarantine
from treadle.scheduler.rates import HELD_BACK_POLL_S, RateGate, SampleMeter, most_sampled
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


class SamplingLoop:
    """Feeds one sampler and commits its results. `run` lasts as long as its executor."""

    def __init__(
        self,
        *,
        pool: PoolName,
        store: Store,
        blobs: BlobStore,
        lease: LeaseRecord,
        metrics: Metrics,
        quarantine: Quarantine,
        outages: Outages,
        policies: Callable[[], Policies] = Policies,
        is_paused: Callable[[], bool] = lambda: False,
    ) -> None:
        """is_paused: an operator wants no sample to be begun. Call `wake` when that has changed."""
        self._pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._lease = lease
        self._running: dict[RequestId, TenantId] = {}
        # Tokens that each of them may still draw.
        self._most_sampled: dict[RequestId, int] = {}
        self._rates = RateGate(store, policies)
        # Tenants that are over a rate.
        self._held_back: set[TenantId] = set()
        self._quarantine = quarantine
        self._outages = outages
        self._policies = policies
        self._is_paused = is_paused
        self._outcomes: list[SampleOutcome] = []
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._is_abandoned = False
        # Being committed here; every other row that is final was ended by somebody else.
        self._committing: frozenset[RequestId] = frozenset()
        quarantine.on_change(self.wake)

    def wake(self) -> None:
        """Something was queued, or may run again."""
        self._wake.set()

    def on_samples(self, outcomes: Sequence[SampleOutcome]) -> None:
        """The sampler finished some; called on the event loop."""
        self._outcomes.extend(outcomes)
        self._wake.set()

    def num_running(self) -> Mapping[TenantId, int]:
        """Samples that the sampler has, by tenant."""
        return dict(sorted(Counter(self._running.values()).items()))

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
        self._most_sampled.clear()
        self._is_abandoned = False
        unsubscribe = self._store.events.on_finished(lambda ids: self._drop_cancelled(executor, ids))
        try:
            await self._feed(executor)
        finally:
            unsubscribe()
        await self._commit_last()

    async def _feed(self, executor: Executor) -> None:
        while not (self._is_stopping or self._is_abandoned):
            self._wake.clear()
            try:
                await self._commit()
                await self._hand_over(executor)
            except (WorkerDied, Fenced):
                raise
            except StoreUnavailable as error:
                self._outages.noticed(error)
                self._metrics.caught_errors.labels("sample_loop").inc()
                await asyncio.sleep(ERROR_PAUSE_S)
            except Exception as error:  # noqa: BLE001 (sample loop: the rows are still queued, so it tries again)
                log.error("sampling loop failed", pool=self._pool, exc=error)
                self._metrics.caught_errors.labels("sample_loop").inc()
                await asyncio.sleep(ERROR_PAUSE_S)
            if not self._outcomes:
                await self._sleep()

    def _drop_cancelled(self, executor: Executor, finished: Sequence[RequestId]) -> None:
        """Samples that are final and were not committed here: their client cancelled them."""
        cancelled = [id_ for id_ in finished if id_ in self._running and id_ not in self._committing]
        if not cancelled:
            return
        executor.cancel_samples(cancelled)
        for request_id in cancelled:
            del self._running[request_id]
            self._most_sampled.pop(request_id, None)
            self._quarantine.sample_ended(request_id)
        self.wake()

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(HELD_BACK_POLL_S if self._held_back else POLL_S):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _hand_over(self, executor: Executor) -> None:
        room = MAX_HANDED_OVER - len(self._running)
        if room <= 0 or self._is_paused():
            return
        rooms = await self._rates.rooms(RateKind.SAMPLING, self._held_back)
        self._held_back = {tenant_id for tenant_id in self._held_back if rooms.get(tenant_id, 1) <= 0}
        rows = await self._store.requests.queued_samples(self._pool, MAX_HANDED_OVER + room, besides=self._held_back)
        fresh = (await self._within_rates(self._within_shares(rows)))[:room]
        if condemned := [row for row in fresh if self._quarantine.is_condemned(row.request_id)]:
            await self._give_up(condemned)
        admitted = set(self._quarantine.admit_samples([row.request_id for row in fresh if row not in condemned]))
        if not admitted:
            return
        ready = [row for row in fresh if row.request_id in admitted]
        payloads = await read_payloads([row.request_id for row in ready], self._store, self._blobs)
        works = []
        for row in ready:
            payload = payloads[row.request_id]
            if not isinstance(payload, Unread):
                works.append(SampleWork(request_id=row.request_id, tenant_id=row.tenant_id, payload=payload))
            elif payload.is_gone:
                message = f"the stored content of request {row.request_id} could not be read; send it again"
                failure = Failure(message, Category.SERVER)
                self._outcomes.append(SampleOutcome(request_id=row.request_id, failure=failure))
                self._running[row.request_id] = row.tenant_id
        executor.submit_samples(works)
        self._running.update((work.request_id, work.tenant_id) for work in works)
        self._most_sampled.update(
            (row.request_id, most_sampled(row)) for row in ready if row.request_id in self._running
        )
        self._quarantine.samples_begin(work.request_id for work in works)

    async def _within_rates(self, rows: Sequence[RequestRecord]) -> list[RequestRecord]:
        """Those of `rows` that may start: a tenant's oldest ones, until what it has in flight may fill its rates."""
        rooms = await self._rates.rooms(RateKind.SAMPLING, {row.tenant_id for row in rows})
        in_flight = {id_: (tenant_id, self._most_sampled.get(id_, 0)) for id_, tenant_id in self._running.items()}
        # Not read again until they have room: however many they are, they hide nobody.
        self._held_back |= {tenant_id for tenant_id, left in rooms.items() if left <= 0}
        meter = SampleMeter(rooms, in_flight)
        return [row for row in rows if meter.takes(row)]

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
        try:
            await self._store_all(outcomes)
        except (Fenced, StoreUnavailable):
            self._outcomes = outcomes + self._outcomes
            raise
        except Exception as error:  # noqa: BLE001 (sample loop: one outcome is to blame, and must not hold up the others)
            log.error("samples not stored together", pool=self._pool, num=len(outcomes), exc=error)
            await self._store_each(outcomes)

    async def _store_each(self, outcomes: Sequence[SampleOutcome]) -> None:
        """Commit them one by one; what cannot be stored ends in a failure."""
        for place, outcome in enumerate(outcomes):
            try:
                try:
                    await self._store_all([outcome])
                except (Fenced, StoreUnavailable):
                    raise
                except Exception as error:  # noqa: BLE001 (sample loop: see _commit)
                    log.error("sample not stored", pool=self._pool, request_id=outcome.request_id, exc=error)
                    failure = Failure("the outcome of this sample could not be stored", Category.SERVER)
                    await self._store_all([SampleOutcome(request_id=outcome.request_id, failure=failure)])
            except Exception:
                self._outcomes = [*outcomes[place:], *self._outcomes]
                raise

    async def _store_all(self, outcomes: Sequence[SampleOutcome]) -> None:
        finished = [
            FinishedRequest(
                request_id=outcome.request_id,
                result=outcome.encoded,
                failure=outcome.failure,
                is_transient=outcome.is_transient,
                recorded=outcome.recorded,
                usage=_used(outcome),
            )
            for outcome in outcomes
        ]
        self._committing = frozenset(outcome.request_id for outcome in outcomes)
        unused = await self._store.cycles.finish_samples(self._lease, finished, policies=self._policies())
        self._outages.over()
        for outcome in outcomes:
            self._running.pop(outcome.request_id, None)
            self._most_sampled.pop(outcome.request_id, None)
            self._quarantine.sample_ended(outcome.request_id)
            self._metrics.sampled_tokens.labels(self._pool).inc(outcome.num_sampled_tokens)
            self._metrics.prompt_tokens.labels(self._pool).inc(outcome.num_prompt_tokens)
        await drop_blobs(self._blobs, unused)

    async def _commit_last(self) -> None:
        """Store what came back before the end. What cannot be stored is drawn again; nobody else waits for it."""
        try:
            await self._commit()
        except Fenced:
            raise
        except TreadleError as error:
            log.warning("samples not committed", pool=self._pool, reason=error.message)

    async def _give_up(self, rows: Sequence[RequestRecord]) -> None:
        failure = Failure(f"this sample ended its worker {MAX_DEATHS} times", Category.SERVER)
        unused = await self._store.cycles.finish_samples(
            self._lease, [FinishedRequest(request_id=row.request_id, failure=failure) for row in rows]
        )
        for row in rows:
            self._quarantine.sample_ended(row.request_id)
        await drop_blobs(self._blobs, unused)


def _used(outcome: SampleOutcome) -> SampleUsage | None:
    """What its tenant got: nothing of a sample that failed, whatever it cost."""
    if outcome.failure is not None:
        return None
    return SampleUsage(
        num_prompt_tokens=outcome.num_prompt_tokens,
        num_sampled_tokens=outcome.num_sampled_tokens,
        num_cached_tokens=outcome.num_cached_tokens,
    )
