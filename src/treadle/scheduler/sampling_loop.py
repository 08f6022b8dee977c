"""Samples flow to the samplers continuously, outside the cycles: read rows, hand them over, commit what comes back.

One loop feeds all samplers of a pool, as they come and go. Rows keep QUEUED while a sampler works on them. When its
worker dies they are simply handed to another one; draws are keyed by the seed in the row, so a second run gives the
same tokens. Those that may have ended it are handed over in the company that the quarantine allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from treadle.blobs import BlobStore
from treadle.domain.ids import PoolName, RequestId, TenantId
from treadle.domain.limits import MAX_HEAD_ROWS
from treadle.domain.outcome import Failure, SampleOutcome
from treadle.domain.plan import SampleWork
from treadle.domain.policy import Policies
from treadle.domain.rates import RateKind
from treadle.domain.records import FinishedRequest, RequestRecord
from treadle.domain.roles import Role
from treadle.domain.states import Category
from treadle.domain.usage import SampleUsage
from treadle.errors import Fenced, StoreUnavailable, TreadleError, WorkerDied
from treadle.scheduler.lead import Lead
from treadle.scheduler.observing import SampleObserver
from treadle.scheduler.preparing import Unread, drop_blobs, read_payloads
from treadle.scheduler.quarantine import MAX_DEATHS
from treadle.scheduler.rates import HELD_BACK_POLL_S, RateGate, SampleMeter, most_sampled
from treadle.scheduler.samplers import Sampler, Samplers
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

POLL_S = 1.0
ERROR_PAUSE_S = 1.0
# Samples that all samplers of a pool hold together: as many rows are read again for each that is handed over.
MAX_HANDED_OVER_IN_ALL = MAX_HEAD_ROWS // 3


class SamplingLoop:
    """Feeds the samplers that are attached and commits their results. `run` lasts until `stop`."""

    def __init__(
        self,
        *,
        pool: PoolName,
        store: Store,
        blobs: BlobStore,
        lead: Lead,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        home: Callable[[TenantId], int | None] = lambda _: None,
        policies: Callable[[], Policies] = Policies,
        is_paused: Callable[[], bool] = lambda: False,
    ) -> None:
        """home: the number of the worker where a tenant's runs live.

        is_paused: an operator wants no sample to be begun. Call `wake` when that has changed.
        """
        self._pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._lead = lead
        self._lease = lead.lease
        self._samplers = Samplers(home)
        self._observer = SampleObserver(pool=pool, metrics=metrics, clock=clock)
        # Tokens that each of them may still draw.
        self._most_sampled: dict[RequestId, int] = {}
        self._rates = RateGate(store, policies)
        # Tenants that are over a rate.
        self._held_back: set[TenantId] = set()
        self._policies = policies
        self._is_paused = is_paused
        self._outcomes: list[SampleOutcome] = []
        self._wake = asyncio.Event()
        self._is_stopping = False
        # Being committed here; every other row that is final was ended by somebody else.
        self._committing: frozenset[RequestId] = frozenset()

    def wake(self) -> None:
        """Something was queued, or may run again."""
        self._wake.set()

    def attach(self, sampler: Sampler) -> None:
        """Feed this one too, from now on."""
        self._samplers.attach(sampler)
        self.wake()

    def detach(self, sampler: Sampler) -> None:
        """Its worker is gone, or is about to: others get what it has not answered. Idempotent.

        After a death tell its quarantine first, which knows what was there.
        """
        for request_id in list(sampler.running):
            self._most_sampled.pop(request_id, None)
            sampler.quarantine.sample_handed_back(request_id)
        self._samplers.detach(sampler)
        self.wake()

    def on_samples(self, slot: str, outcomes: Sequence[SampleOutcome]) -> None:
        """A sampler finished some; called on the event loop. What it was not asked any more is no outcome."""
        for outcome in outcomes:
            sampler = self._samplers.sampler_of(outcome.request_id)
            if sampler is not None and sampler.slot == slot:
                # It is its worker's no more, whatever becomes of that before the commit.
                sampler.quarantine.sample_handed_back(outcome.request_id)
                self._outcomes.append(outcome)
        self._wake.set()

    def num_running(self, slot: str | None = None) -> Mapping[TenantId, int]:
        """Samples that the samplers have, or the one of this slot, by tenant."""
        running = [one.running for one in self._samplers.all() if slot in (None, one.slot)]
        return dict(sorted(Counter(chain.from_iterable(of.values() for of in running)).items()))

    def stop(self) -> None:
        """End `run`; samples in flight stay queued for the next start."""
        self._is_stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Feed whoever is attached until stopped. Raises Fenced without the lease."""
        unsubscribe = self._store.events.on_finished(self._drop_cancelled)
        try:
            await self._feed()
        finally:
            unsubscribe()
        await self._commit_last()

    async def _feed(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            try:
                await self._commit()
                await self._hand_over()
            except Fenced:
                raise
            except StoreUnavailable as error:
                self._lead.outages.noticed(error)
                self._metrics.caught_errors.labels("sample_loop").inc()
                await asyncio.sleep(ERROR_PAUSE_S)
            except Exception as error:  # noqa: BLE001 (sample loop: the rows are still queued, so it tries again)
                log.error("sampling loop failed", pool=self._pool, exc=error)
                self._metrics.caught_errors.labels("sample_loop").inc()
                await asyncio.sleep(ERROR_PAUSE_S)
            if not self._outcomes:
                await self._sleep()

    def _drop_cancelled(self, finished: Sequence[RequestId]) -> None:
        """Samples that are final and were not committed here: their client cancelled them."""
        cancelled: dict[str, tuple[Sampler, list[RequestId]]] = {}
        for request_id in finished:
            sampler = self._samplers.sampler_of(request_id)
            if sampler is None:
                self._samplers.ended(request_id)
            elif request_id not in self._committing:
                cancelled.setdefault(sampler.slot, (sampler, []))[1].append(request_id)
        for sampler, request_ids in cancelled.values():
            # Of one that is dead nothing need be cancelled.
            with contextlib.suppress(WorkerDied):
                sampler.executor.cancel_samples(request_ids)
            for request_id in request_ids:
                self._forget(request_id)
                sampler.quarantine.sample_ended(request_id)
        if cancelled:
            self.wake()

    def _forget(self, request_id: RequestId) -> None:
        self._samplers.ended(request_id)
        self._observer.forget(request_id)
        self._most_sampled.pop(request_id, None)

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(HELD_BACK_POLL_S if self._held_back else POLL_S):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _hand_over(self) -> None:
        num_running = len(self._samplers.running)
        room = min(self._samplers.room, MAX_HANDED_OVER_IN_ALL - num_running)
        if room <= 0 or self._is_paused():
            return
        rooms = await self._rates.rooms(RateKind.SAMPLING, self._held_back)
        self._held_back = {tenant_id for tenant_id in self._held_back if rooms.get(tenant_id, 1) <= 0}
        num_rows = num_running + 2 * room
        rows = await self._store.requests.queued_samples(self._pool, num_rows, besides=self._held_back)
        answered = {outcome.request_id for outcome in self._outcomes}
        chosen = self._samplers.assign(row for row in rows if row.request_id not in answered)
        within = await self._within_rates([row for row in rows if row.request_id in _ids(chosen)])
        allowed = {row.request_id for row in within[:room]}
        for sampler in self._samplers.all():
            wanted = [row for row in chosen.get(sampler.slot, ()) if row.request_id in allowed]
            await self._hand_over_to(sampler, wanted)

    async def _hand_over_to(self, sampler: Sampler, rows: Sequence[RequestRecord]) -> None:
        """Give one sampler those of the rows that its quarantine lets in; it is told also when there are none."""
        quarantine = sampler.quarantine
        if condemned := [row for row in rows if quarantine.is_condemned(row.request_id)]:
            await self._give_up(sampler, condemned)
        admitted = set(quarantine.admit_samples([row.request_id for row in rows if row not in condemned]))
        if not admitted:
            return
        ready = [row for row in rows if row.request_id in admitted]
        payloads = await read_payloads([row.request_id for row in ready], self._store, self._blobs)
        if sampler not in self._samplers.all():
            return  # it went meanwhile, and others get them
        works = []
        for row in ready:
            payload = payloads[row.request_id]
            if not isinstance(payload, Unread):
                works.append(SampleWork(request_id=row.request_id, tenant_id=row.tenant_id, payload=payload))
            elif payload.is_gone:
                message = f"the stored content of request {row.request_id} could not be read; send it again"
                failure = Failure(message, Category.SERVER)
                self._outcomes.append(SampleOutcome(request_id=row.request_id, failure=failure))
                self._samplers.begin(sampler, row.request_id, row.tenant_id)
        for work in works:
            self._samplers.begin(sampler, work.request_id, work.tenant_id)
        self._most_sampled.update((row.request_id, most_sampled(row)) for row in ready)
        self._observer.begin(ready, sampler.slot)
        quarantine.samples_begin(work.request_id for work in works)
        # Of a worker that is dead its slot is about to find out, and gives them to others.
        with contextlib.suppress(WorkerDied):
            sampler.executor.submit_samples(works)

    async def _within_rates(self, rows: Sequence[RequestRecord]) -> list[RequestRecord]:
        """Those of `rows` that may start: a tenant's oldest ones, until what it has in flight may fill its rates."""
        rooms = await self._rates.rooms(RateKind.SAMPLING, {row.tenant_id for row in rows})
        running = self._samplers.running.items()
        in_flight = {id_: (tenant_id, self._most_sampled.get(id_, 0)) for id_, tenant_id in running}
        # Not read again until they have room: however many they are, they hide nobody.
        self._held_back |= {tenant_id for tenant_id, left in rooms.items() if left <= 0}
        meter = SampleMeter(rooms, in_flight)
        return [row for row in rows if meter.takes(row)]

    async def _commit(self) -> None:
        """Commit everything that came back since the last time, in one transaction."""
        outcomes, self._outcomes = self._sorted_out(self._outcomes), []
        if not outcomes:
            return
        try:
            await self._store_all(outcomes)
        except (Fenced, StoreUnavailable):
            self._outcomes = outcomes + self._outcomes
            raise
        except Exception as error:  # noqa: BLE001 (sample loop: one outcome is to blame, and must not hold up the others)
            log.error("samples not stored together", pool=self._pool, num=len(outcomes), exc=error)
            await self._store_each(outcomes)

    def _sorted_out(self, outcomes: Sequence[SampleOutcome]) -> list[SampleOutcome]:
        """Those that are final; the others go to a sampler that can do what they ask for."""
        final = []
        for outcome in outcomes:
            if not outcome.needs_builtin:
                final.append(outcome)
                continue
            sampler = self._samplers.sampler_of(outcome.request_id)
            if sampler is not None and sampler.role is not Role.SAMPLING:
                log.error("built-in sampler gave a sample back", pool=self._pool, request_id=outcome.request_id)
                failure = Failure("no sampler of this server can do what this sample asks for", Category.SERVER)
                final.append(SampleOutcome(request_id=outcome.request_id, failure=failure))
                continue
            self._samplers.give_to_builtin(outcome.request_id)
            self._most_sampled.pop(outcome.request_id, None)
        return final

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
        self._lead.outages.over()
        for outcome in outcomes:
            if (sampler := self._samplers.sampler_of(outcome.request_id)) is not None:
                sampler.quarantine.sample_ended(outcome.request_id)
            self._observer.ended(outcome)
            self._forget(outcome.request_id)
        await drop_blobs(self._blobs, unused)

    async def _commit_last(self) -> None:
        """Store what came back before the end. What cannot be stored is drawn again; nobody else waits for it."""
        try:
            await self._commit()
        except Fenced:
            raise
        except TreadleError as error:
            log.warning("samples not committed", pool=self._pool, reason=error.message)

    async def _give_up(self, sampler: Sampler, rows: Sequence[RequestRecord]) -> None:
        failure = Failure(f"this sample ended its worker {MAX_DEATHS} times", Category.SERVER)
        unused = await self._store.cycles.finish_samples(
            self._lease, [FinishedRequest(request_id=row.request_id, failure=failure) for row in rows]
        )
        self._observer.begin(rows, sampler.slot)
        for row in rows:
            sampler.quarantine.sample_ended(row.request_id)
            self._observer.ended(SampleOutcome(row.request_id, failure=failure))
            self._forget(row.request_id)
        await drop_blobs(self._blobs, unused)


def _ids(assigned: Mapping[str, Sequence[RequestRecord]]) -> set[RequestId]:
    return {row.request_id for rows in assigned.values() for row in rows}


def _used(outcome: SampleOutcome) -> SampleUsage | None:
    """What its tenant got: nothing of a sample that failed, whatever it cost."""
    if outcome.failure is not None:
        return None
    return SampleUsage(
        num_prompt_tokens=outcome.num_prompt_tokens,
        num_sampled_tokens=outcome.num_sampled_tokens,
        num_cached_tokens=outcome.num_cached_tokens,
    )
