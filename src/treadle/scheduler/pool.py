"""One pool on one server: led from here with its workers and what feeds them, or by another server.

A worker has a slot (slot.py), where it is replaced when it dies; crew.py has as many as are wanted. Whoever does not
lead stands by for the lease and shows what the leader reports; a leader that lost its lease drops its workers and
stands by again. Invariant: a worker of this server runs only while its lease is believed to be held; every write
proves that it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from treadle.blobs import BlobStore
from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.outcome import PoolFacts
from treadle.domain.policy import Policies
from treadle.domain.records import LeaseRecord
from treadle.domain.roles import Scale
from treadle.errors import ConfigError, Fenced, ServerError, StoreUnavailable, WorkerDied
from treadle.scheduler.clock_settings import CycleSettings
from treadle.scheduler.commands import watch_commands
from treadle.scheduler.crew import Crew, CrewCounts, MakeExecutor
from treadle.scheduler.lead import Lead
from treadle.scheduler.lease import Standby, keep_lease
from treadle.scheduler.outages import Outages
from treadle.scheduler.slot import Slot
from treadle.scheduler.slot_report import report_slots
from treadle.store import PoolReport, Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# Before a pool that was added at run time, and whose model could not be loaded, is tried again on this server: each try
# is a process that imports everything.
LOAD_PAUSES_S = (10.0, 30.0, 60.0, 300.0)
# How long a leader waits before it tries again to tell the other servers how its pool is.
PUBLISH_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What readiness and the gateway see. `reason` says why it is not ready.

    num_workers: that have loaded the model. num_deaths: of workers since its leader leads.
    """

    facts: PoolFacts | None
    is_ready: bool
    reason: str
    num_workers: int = 0
    num_deaths: int = 0


class PoolRunner:
    """Runs one pool. `run` returns after `drain`, or raises what ended the pool for good.

    is_essential: a model that cannot be loaded ends it; else any server tries again after a pause.
    """

    def __init__(
        self,
        *,
        pool: PoolName,
        store: Store,
        blobs: BlobStore,
        make_executor: MakeExecutor,
        settings: CycleSettings,
        holder: str,
        lease_ttl_s: float,
        metrics: Metrics,
        clock: Callable[[], float],
        weights: Callable[[], Mapping[TenantId, float]] = dict,
        policies: Callable[[], Policies] = Policies,
        is_essential: bool = True,
        scale: Scale = Scale(),
    ) -> None:
        """policies: what operators decided, as it is known now. scale: how many workers, until `set_scale`."""
        self.pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._make_executor = make_executor
        self._settings = settings
        self._holder = holder
        self._lease_ttl_s = lease_ttl_s
        self._clock = clock
        self._weights = weights
        self._policies = policies
        self._is_essential = is_essential
        self._scale = scale
        self._is_paused = False
        self._num_workers = 0
        self._num_deaths = 0
        # Of this server, since a model was loaded here: how often it could not be, and why.
        self._num_failed_loads = 0
        self._load_failure = ""
        # Once all workers that were wanted at first had loaded: what cannot load later is no reason to end.
        self._has_been_complete = False
        self._status = PoolStatus(facts=None, is_ready=False, reason="waiting for the lease")
        self._status_changed = asyncio.Event()
        self._standby = Standby(store, pool, holder=holder, ttl_s=lease_ttl_s, on_report=self._show)
        self._crew: Crew | None = None
        self._draining = asyncio.Event()
        # Set once a worker of this server that trains has loaded, and once the pool serves, from here or from another
        # server; what happens later shows in `status`.
        self.loaded = asyncio.Event()
        self.served = asyncio.Event()

    @property
    def status(self) -> PoolStatus:
        return self._status

    async def recall(self, source_dir: str | None) -> None:
        """Show what the last leader reported of the base model, so that requests can be admitted before it is loaded.

        source_dir: of a local model, None for one of a hub; of another directory nothing is recalled. Call it before
        `run`. Raises StoreUnavailable.
        """
        facts = (await self._store.pools.report(self.pool)).facts
        if facts is not None and source_dir in (None, facts.source_dir):
            self._set_status(facts, reason=self._status.reason)

    def wake(self, kind: OpKind) -> None:
        """A request of this kind was queued."""
        if self._crew is not None:
            self._crew.wake(kind)

    def resident_runs(self) -> Collection[ModelId]:
        """Runs that workers of this server hold."""
        return () if self._crew is None else self._crew.resident_runs()

    def count(self) -> CrewCounts | None:
        """What workers of this server hold, for metrics; None while another server leads."""
        return None if self._crew is None else self._crew.count()

    def park_cold(self, model_ids: Iterable[ModelId]) -> None:
        """Have these runs leave their workers between cycles, each once its state is durable."""
        if self._crew is not None:
            self._crew.park_cold(model_ids)

    def set_paused(self, is_paused: bool) -> None:
        """Plan nothing, of training and of sampling, until told otherwise; what runs is finished. Idempotent."""
        if is_paused is self._is_paused:
            return
        self._is_paused = is_paused
        log.info("pool paused" if is_paused else "pool resumed", pool=self.pool)
        if self._crew is not None:
            self._crew.wake_all()

    def set_scale(self, scale: Scale) -> None:
        """Have so many workers from now on: more are started, those too many end when nobody needs them. Idempotent."""
        if scale == self._scale:
            return
        log.info("pool scaled", pool=self.pool, workers=scale.workers, samplers=scale.samplers)
        self._scale = scale
        if self._crew is not None:
            self._crew.set_scale(scale)

    def drain(self) -> None:
        """Finish the cycles in flight, persist every run, stop the workers; `run` then returns. Idempotent."""
        self._draining.set()
        self._standby.stop()
        if self._crew is not None:
            self._crew.drain()

    async def run(self) -> None:
        """Stand by and lead, in turn, until drained. Raises ConfigError when an essential model cannot load."""
        while (lease := await self._standby.lease()) is not None:
            self._metrics.lease_changes.labels(self.pool, "acquired").inc()
            try:
                await self._lead(lease)
            except Fenced as error:
                self._metrics.lease_changes.labels(self.pool, "lost").inc()
                log.warning("lead lost", pool=self.pool, token=lease.token, reason=error.message)
                self._set_status(self._status.facts, reason="another server leads now")
                continue
            except Exception as error:
                # Nobody need wait for it to expire: the worker is gone.
                await self._store.leases.release(lease)
                if self._is_essential or self._draining.is_set() or not isinstance(error, ConfigError | ServerError):
                    raise
                self._note_failed_load(error.message)
                continue
            await self._store.leases.release(lease)
            return

    def _note_failed_load(self, reason: str) -> None:
        """Have another server try, or this one after a pause."""
        pause_s = LOAD_PAUSES_S[min(self._num_failed_loads, len(LOAD_PAUSES_S) - 1)]
        self._num_failed_loads += 1
        self._load_failure = f"its model could not be loaded: {reason}"
        log.error("model not loaded", pool=self.pool, reason=reason, again_in_s=pause_s)
        self._standby.hold_off(pause_s)
        self._set_status(self._status.facts, reason=self._load_failure)

    async def _lead(self, lease: LeaseRecord) -> None:
        """Serve until drained. Raises Fenced when another leader took over."""
        lead = Lead(self._store, lease)
        self._num_workers = self._num_deaths = 0
        self._crew = crew = Crew(
            lead=lead,
            store=self._store,
            blobs=self._blobs,
            make_executor=self._make_executor,
            settings=self._settings,
            metrics=self._metrics,
            clock=self._clock,
            weights=self._weights,
            policies=self._policies,
            is_paused=lambda: self._is_paused,
            scale=self._scale,
            on_change=self._show_crew,
            may_replace=self._may_replace,
        )
        if self._draining.is_set():
            crew.drain()
        keeper = asyncio.create_task(keep_lease(self._store, lease, ttl_s=self._lease_ttl_s))
        publisher = asyncio.create_task(self._publish_forever(lease, lead.outages))
        reporter = asyncio.create_task(report_slots(self._store, lease, crew.report))
        commands = asyncio.create_task(
            watch_commands(self._store, self.pool, outages=lead.outages, take=crew.take_commands)
        )
        serving = asyncio.create_task(crew.serve())
        tasks = {keeper, publisher, reporter, commands, serving}
        try:
            # Of these only the last one ends without an error.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._crew = None
            self._set_status(self._status.facts, reason="stopped")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _show_crew(self, crew: Crew) -> None:
        """How the workers are has changed."""
        if crew is not self._crew:
            return
        self._num_workers, self._num_deaths = crew.num_up, crew.num_deaths
        facts = crew.facts or self._status.facts
        if crew.facts is not None and not self.loaded.is_set():
            self.loaded.set()
        if crew.num_up:
            self._num_failed_loads, self._load_failure = 0, ""
        reason = crew.why_not_ready()
        if facts is not None and not reason and self._status.reason:
            log.info("pool ready", pool=self.pool, workers=crew.num_up)
        self._set_status(facts, reason="stopping" if reason and self._draining.is_set() else reason)
        if crew.is_complete:
            self._has_been_complete = True

    def _may_replace(self, slot: Slot, death: ServerError | ConfigError) -> bool:
        """Whether another worker may do better. One that cannot load at first is the operator's to mend.

        Of an added pool neither may one that dies of loading: its model may be too large for this machine.
        """
        if slot.has_loaded or not slot.is_first:
            return True
        if not self.loaded.is_set() and slot.trains:
            return isinstance(death, WorkerDied) and self._is_essential
        # One of several: the pool can do without it, but at the start of a server its settings are to blame.
        return not (isinstance(death, ConfigError) and self._is_essential and not self._has_been_complete)

    def _set_status(self, facts: PoolFacts | None, *, reason: str) -> None:
        """reason: why the pool is not ready; "" when it is."""
        status = PoolStatus(
            facts, is_ready=not reason, reason=reason, num_workers=self._num_workers, num_deaths=self._num_deaths
        )
        if status != self._status:
            self._status = status
            self._status_changed.set()
        if not reason:
            self.served.set()

    def _show(self, report: PoolReport) -> None:
        """What the leader says, while this server stands by."""
        reason = "" if report.is_ready else report.reason or "its leader is starting"
        if self._load_failure and not report.holder:
            reason = self._load_failure
        self._num_workers, self._num_deaths = report.num_workers, report.num_deaths
        self._set_status(report.facts or self._status.facts, reason=reason)

    async def _publish_forever(self, lease: LeaseRecord, outages: Outages) -> None:
        """Tell the other servers how the pool is, now and whenever that changes. Raises Fenced."""
        while True:
            self._status_changed.clear()
            status = self._status
            try:
                await self._store.pools.publish(
                    lease,
                    facts=status.facts,
                    is_ready=status.is_ready,
                    reason=status.reason,
                    num_workers=status.num_workers,
                    num_deaths=status.num_deaths,
                )
            except Fenced:
                raise
            except ServerError as error:
                if isinstance(error, StoreUnavailable):
                    outages.noticed(error)
                else:
                    log.error("pool not reported", pool=self.pool, reason=error.message)
                await asyncio.sleep(PUBLISH_PAUSE_S)
            else:
                outages.over()
                await self._status_changed.wait()
