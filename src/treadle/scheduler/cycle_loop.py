"""The clock: one loop per worker that reads queued ops, plans a cycle, has it run, and commits it.

One request's life in this file: `_gather` sees its row, `plan_cycle` picks it, `begin` books it as in flight,
the executor runs it, `finish` commits its outcome in one fenced transaction. Rows keep QUEUED until then, so a
death at any point leaves nothing to clean up: the next leader plans the same rows again. What a worker lacks of a run
is restored and replayed in the same cycles (replay.py).
Of a pool with several workers each has a loop of its own, over the runs of the tenants that live there (tenancy.py).
Invariants: the state a worker holds is the committed one, or it is dropped before the run's next op; the book has only
runs of tenants whose home this is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from treadle.blobs import BlobStore
from treadle.domain.commands import OperatorCommand
from treadle.domain.ids import ModelId, PoolName, RequestId, TenantId
from treadle.domain.ops import OpKind, phase_of
from treadle.domain.ops import Phase as OpPhase
from treadle.domain.outcome import CycleOutcome, PoolFacts
from treadle.domain.plan import CyclePlan, CycleWork, ModelQueue, PolicyInput, PolicyState
from treadle.domain.policy import Policies
from treadle.domain.records import SnapshotRecord
from treadle.domain.states import ModelState
from treadle.errors import Fenced, StoreUnavailable, WorkerDied
from treadle.executor.base import Executor
from treadle.scheduler.budget import TokenBudget, guessed_tokens_per_s
from treadle.scheduler.clock_settings import CycleSettings
from treadle.scheduler.commands import CommandDesk
from treadle.scheduler.committing import Committer
from treadle.scheduler.finishing import CycleLedger, OpTimes
from treadle.scheduler.lead import Lead
from treadle.scheduler.observing import CycleObserver
from treadle.scheduler.outcomes import Booked, book_outcomes, take_states
from treadle.scheduler.persisting import Persister
from treadle.scheduler.policy import plan_cycle
from treadle.scheduler.preparing import Prepared, drop_half_done, prepare
from treadle.scheduler.quarantine import Quarantine
from treadle.scheduler.rates import HELD_BACK_POLL_S, RateGate
from treadle.scheduler.replay import RecoveryWatch, Replayer
from treadle.scheduler.runs import Run, RunBook, is_over
from treadle.scheduler.save_quotas import SaveGate
from treadle.scheduler.snapshots import SnapshotBudget, Snapshotter
from treadle.scheduler.sorting import Queues, QueueSorter, is_settled, is_something_left, model_queue
from treadle.scheduler.tenancy import SlotTenancy
from treadle.store import Store
from treadle.telemetry.logs import bind_context, get_logger, log_context
from treadle.telemetry.metrics import Metrics
from treadle.telemetry.phases import Phase, phase

log = get_logger(__name__)

# The slow poll of the queue: events only make the loop quicker, this is what makes it right.
POLL_S = 1.0
# After an unexpected error the loop waits before it tries again, so that it cannot spin.
ERROR_PAUSE_S = 1.0


class CycleLoop:
    """Runs the cycles of one worker. One task at a time calls `run`; `stop` ends it after the cycle in flight."""

    def __init__(
        self,
        *,
        pool: PoolName,
        store: Store,
        blobs: BlobStore,
        lead: Lead,
        slot: str,
        tenancy: SlotTenancy,
        settings: CycleSettings,
        metrics: Metrics,
        clock: Callable[[], float],
        quarantine: Quarantine,
        weights: Callable[[], Mapping[TenantId, float]] = dict,
        policies: Callable[[], Policies] = Policies,
        is_paused: Callable[[], bool] = bool,
    ) -> None:
        """slot: the worker's name in its pool. tenancy: whose runs are its.

        is_paused: an operator wants nothing to be planned. Call `wake_all` when that has changed.
        """
        lease = lead.lease
        self._pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._lead = lead
        self._slot = slot
        self._tenancy = tenancy
        self._settings = settings
        self._clock = clock
        self._quarantine = quarantine
        self._weights = weights
        self._policies = policies
        self._is_paused = is_paused
        self._book = RunBook(store)
        self._committer = Committer(store=store, blobs=blobs, lead=lead, slot=slot, policies=policies)
        self._rates = RateGate(store, policies)
        # Runs of which nothing may run until their tenant is below its rate: nobody waits for their company.
        self._held_back: set[ModelId] = set()
        self._replayer = Replayer(pool=pool, store=store, blobs=blobs, lease=lease, metrics=metrics)
        self._recovery = RecoveryWatch(pool=pool, metrics=metrics)
        self._sorter = QueueSorter(pool=pool, quarantine=quarantine, replayer=self._replayer, recovery=self._recovery)
        # Set by whatever was queued, and by what ends the wait for company.
        self._wake = asyncio.Event()
        self._may_be_settled = asyncio.Event()
        self._snapshotter = Snapshotter(
            pool=pool,
            slot=slot,
            budget=SnapshotBudget(max_replay_s=settings.max_replay_s),
            metrics=metrics,
            on_landed=self._wake.set,
        )
        self._observer = CycleObserver(pool=pool, slot=slot, token=lease.token, metrics=metrics, clock=clock)
        self._budget = TokenBudget(target_cycle_s=settings.target_cycle_s, fixed_tokens=settings.budget_tokens)
        self._policy_state = PolicyState()
        self._sent_at: dict[RequestId, float] = {}
        self._cold: set[ModelId] = set()
        self._persister = Persister(pool=pool, snapshotter=self._snapshotter, register=self._register)
        self._desk = CommandDesk(
            pool=pool,
            store=store,
            lease=lease,
            clock=clock,
            write=self._persister.write_one,
            is_ours=tenancy.answers_for,
        )
        self._numerics_profile = ""
        # What was read last was more than one reading holds.
        self._is_cut = False
        self._is_new = True
        # Cycles that were committed, over all workers.
        self.num_finished = 0
        self._is_stopping = False
        self._is_abandoned = False
        quarantine.on_change(self.wake_all)

    def wake(self, kind: OpKind) -> None:
        """An op of this kind was queued."""
        self._wake.set()
        if phase_of(kind) is not OpPhase.PASS:
            self._may_be_settled.set()

    def stop(self) -> None:
        """End `run` once the cycle in flight is committed."""
        self._is_stopping = True
        self.wake_all()

    def abandon(self) -> None:
        """The executor has died: end `run` after whatever is being committed."""
        self._is_abandoned = True
        self.wake_all()

    def note_death(self, reason: str) -> None:
        """The worker is gone for this reason, and another one will be given to `run`."""
        self._quarantine.worker_died()
        self._recovery.begin(reason)

    def resident_runs(self) -> Collection[ModelId]:
        """Runs that the worker holds."""
        return [run.record.model_id for run in self._book.resident()]

    def park_cold(self, model_ids: Iterable[ModelId]) -> None:
        """Nobody will use these runs for a while: write those that the worker holds, and have it forget them."""
        self._cold.update(model_ids)
        self.wake_all()

    def take_commands(self, commands: Collection[OperatorCommand]) -> None:
        """These are all that operators want of the pool's runs now; they are carried out between cycles."""
        if self._desk.take(commands):
            self.wake_all()

    def wake_all(self) -> None:
        """Look again, whatever is being waited for."""
        self._wake.set()
        self._may_be_settled.set()

    async def run(self, executor: Executor, facts: PoolFacts) -> None:
        """Run cycles on `executor` until stopped or abandoned. facts: what it reported when it had loaded.

        Raises WorkerDied when a cycle was in flight at its death, Fenced when the lease is lost.
        """
        # A fresh worker holds nothing, and what was committed is in the store.
        self._book = RunBook(self._store)
        self._numerics_profile = self._persister.numerics_profile = facts.numerics_profile
        self._budget.expect(guessed_tokens_per_s(facts))
        self._is_abandoned = False
        if self._is_new:
            # A new leader's runs are restored, and so are those behind a death.
            self._recovery.begin("a new leader")
            self._is_new = False
        while not (self._is_stopping or self._is_abandoned):
            try:
                await self._lead.take_over(self._quarantine)
                with log_context(pool=self._pool, slot=self._slot):
                    is_some_left = await self._run_one(executor)
                if not is_some_left:
                    await _wait(
                        self._wake, self._replayer.shortest_pause_s(HELD_BACK_POLL_S if self._held_back else POLL_S)
                    )
            except (WorkerDied, Fenced):
                raise
            except StoreUnavailable as error:
                self._lead.outages.noticed(error)
                self._metrics.caught_errors.labels("cycle_loop").inc()
                await asyncio.sleep(ERROR_PAUSE_S)
            except Exception as error:  # noqa: BLE001 (cycle loop: the rows are still queued, so it tries again)
                log.error("cycle failed", pool=self._pool, slot=self._slot, exc=error)
                self._metrics.caught_errors.labels("cycle_loop").inc()
                await asyncio.sleep(ERROR_PAUSE_S)

    async def persist(self, executor: Executor) -> None:
        """Write every resident run of which no snapshot holds all. Raises WorkerDied."""
        await self._persister.write_all(executor, self._book)

    async def _register(self, snapshots: Sequence[SnapshotRecord]) -> None:
        ledger = self._new_ledger()
        ledger.snapshots += snapshots
        await self._commit(ledger)

    def _new_ledger(self) -> CycleLedger:
        """What a commit starts with: snapshots that are durable by now."""
        landed = list(self._snapshotter.landed)
        return CycleLedger(now=self._clock(), numerics_profile=self._numerics_profile, snapshots=landed)

    async def _let_go(self, executor: Executor) -> None:
        """Release those who are to live elsewhere; one with a request half done when that has ended."""
        for tenant_id in self._tenancy.leaving():
            runs = self._book.of_tenant(tenant_id)
            if any(run.is_half_done for run in runs):
                continue
            await self._persister.let_go(executor, self._book, runs)
            self._tenancy.released(tenant_id)

    def _without_leaving(self, queues: Queues) -> Queues:
        """Of tenants that are about to leave only the request that is half done."""
        leaving = set(self._tenancy.leaving())
        kept: Queues = {}
        for model_id, rows in queues.items():
            run = self._book.known(model_id)
            if rows[0].tenant_id not in leaving:
                kept[model_id] = rows
            elif run is not None and run.is_half_done and run.part is not None:
                kept[model_id] = tuple(row for row in rows if row.request_id == run.part[0])
        return kept

    async def _run_one(self, executor: Executor) -> bool:
        """Run one cycle if there is anything to do; whether something that was queued before it may be left."""
        if self._cold:
            cold, self._cold = self._cold, set()
            await self._persister.put_away(executor, self._book, cold)
        await self._let_go(executor)
        self._tenancy.forget(self._book.tenants)
        is_paused = self._is_paused()
        if is_paused:
            # Nobody else takes it back then, and a wait that ends at once would stop the whole process.
            self._wake.clear()
        await self._desk.obey(executor, self._book)
        if is_paused:
            return False
        queues = self._without_leaving(await self._gather())
        if self._is_paused():
            return False
        ledger = self._new_ledger()
        runs = await self._book.of(queues)
        is_some_unread = len(runs) < len(queues)
        queues = {model_id: queues[model_id] for model_id in runs}
        runnable = await self._sorter.sort_out(queues, runs, ledger)
        plan, policy_state = self._plan(runnable, runs, await self._models(runnable, runs))
        if (plan.is_empty and ledger.is_empty) or self._is_abandoned:
            return is_some_unread and not self._is_abandoned
        self._sorter.give_up_gaps(plan, runs, ledger)
        policies = self._policies()
        prepared = await prepare(
            plan,
            runs,
            self._store,
            self._blobs,
            revoked_losses=policies.revoked_losses,
            saves=SaveGate(self._store, policies),
        )
        await self._book_refusals(prepared, runs, ledger)
        await drop_half_done(executor, prepared, runs)
        if prepared.items:
            with await self._lead.turn([item.planned.request_id for item in prepared.items]):
                await self._run_and_commit(executor, prepared, queues, runs, ledger)
        elif not ledger.is_empty:
            await self._commit(ledger)
            self._observer.requests_ended(ledger, queues)
        self._policy_state = policy_state
        await self._forget_over(executor, runs)
        self._snapshotter.consider(executor, self._book.resident(), numerics_profile=self._numerics_profile)
        # What is held back comes with the next poll; to look at it again now would only keep the others waiting.
        rest = {model_id: rows for model_id, rows in queues.items() if model_id not in self._held_back}
        return is_some_unread or self._is_cut or is_something_left(rest, ledger)

    async def _gather(self) -> Queues:
        """Queue heads by run, after the gather window if some run still waits for its step.

        Reading them is what an idle cycle costs, so it waits for an event that can end the window: where a client
        sends its pass and its step together, they are read once. A recovery waits for nobody.
        """
        window_s = 0.0 if self._recovery.is_on else self._settings.gather_window_s
        deadline = asyncio.get_running_loop().time() + window_s
        if self._wake.is_set() and window_s > 0.0:
            await _wait(self._may_be_settled, window_s)
        while True:
            self._wake.clear()
            self._may_be_settled.clear()
            queues = await self._heads()
            remaining_s = deadline - asyncio.get_running_loop().time()
            if remaining_s <= 0 or self._is_stopping or self._is_abandoned:
                return queues
            if all(is_settled(rows) for model_id, rows in queues.items() if model_id not in self._held_back):
                return queues
            await _wait(self._may_be_settled, remaining_s)

    async def _heads(self) -> Queues:
        reading = await self._tenancy.read()
        self._is_cut = reading.is_cut
        return reading.queues

    async def _models(self, queues: Queues, runs: Mapping[ModelId, Run]) -> Mapping[ModelId, ModelQueue]:
        """What planning sees of these queues: not the passes of tenants that are over a rate."""
        now = self._clock()
        models = {model_id: model_queue(runs[model_id], rows, now) for model_id, rows in queues.items()}
        within = await self._rates.within(models, [model_id for model_id in models if runs[model_id].needs_replay])
        self._held_back = {model_id for model_id, queue in within.items() if not queue.ops and models[model_id].ops}
        return within

    def _plan(
        self, queues: Queues, runs: Mapping[ModelId, Run], models: Mapping[ModelId, ModelQueue]
    ) -> tuple[CyclePlan, PolicyState]:
        """The next cycle, of one run alone while the quarantine wants that; empty while a sample runs alone."""
        alone = self._isolated(queues, runs)
        if not self._quarantine.may_train:
            return CyclePlan(), self._policy_state
        if alone is not None:
            plan, _ = self._plan_of([models[alone]])
            if not plan.is_empty:
                # Those who are kept waiting meanwhile keep what they are owed.
                return plan, self._policy_state
        return self._plan_of(list(models.values()))

    def _plan_of(self, models: Sequence[ModelQueue]) -> tuple[CyclePlan, PolicyState]:
        budget = self._budget.tokens
        tenants = {model.tenant_id for model in models}
        cap = budget if len(tenants) <= 1 else max(1, int(budget * self._settings.cap_fraction))
        return plan_cycle(
            PolicyInput(
                models=tuple(models),
                state=self._policy_state,
                budget_tokens=budget,
                tenant_cap_tokens=cap,
                gap_wait_s=self._settings.gap_wait_s,
                weights=self._weights(),
                quarantined=self._quarantine.suspects,
            )
        )

    def _isolated(self, queues: Queues, runs: Mapping[ModelId, Run]) -> ModelId | None:
        """The only run that may be planned, while the quarantine says so."""
        if not self._quarantine.suspects:
            return self._quarantine.isolated({}, ())
        replayed = {model_id: [row.request_id for row in runs[model_id].log] for model_id in queues}
        lines = {
            model_id: [*replayed[model_id], *(row.request_id for row in rows)] for model_id, rows in queues.items()
        }
        return self._quarantine.isolated(lines, {request_id for ids in replayed.values() for request_id in ids})

    async def _book_refusals(self, prepared: Prepared, runs: Mapping[ModelId, Run], ledger: CycleLedger) -> None:
        for planned, failure in prepared.refused:
            ledger.fail(runs[planned.model_id], planned.request_id, planned.seq_id, failure)
        for model_id, reason in prepared.postponed.items():
            self._replayer.try_again(runs[model_id], f"what it needs cannot be read now: {reason}")
        for model_id, reason in prepared.broken_logs.items():
            await self._replayer.lose(runs[model_id], f"could not be replayed: {reason}", ledger)

    async def _run_and_commit(
        self,
        executor: Executor,
        prepared: Prepared,
        queues: Queues,
        runs: Mapping[ModelId, Run],
        ledger: CycleLedger,
    ) -> None:
        """Run the cycle and make its outcome public; if that fails, the worker's newer states are void and dropped."""
        outcome = await self._execute(executor, prepared)
        phase(Phase.OUTCOME_RECEIVED, pool=self._pool, cycle=outcome.cycle)
        touched = sorted({item.planned.model_id for item in prepared.items})
        try:
            ledger.now, ledger.cycle = self._clock(), outcome.cycle
            ledger.times = self._times(queues, prepared)
            booked = await book_outcomes(outcome, prepared, runs, ledger, self._replayer)
            await self._commit(ledger)
        except Fenced:
            raise
        except Exception as error:
            self._book.forget(touched)
            await executor.evict(touched)
            if not isinstance(error, StoreUnavailable):
                # One op's outcome is to blame, and the same plan would end here again.
                self._quarantine.suspect_unstorable([item.planned.request_id for item in prepared.items])
            raise
        take_states(outcome, prepared, runs, booked, self._replayer)
        self._quarantine.clear(booked.done_again)
        for request_id in booked.replayed:
            self._sent_at.pop(request_id, None)
        self._observe(outcome, booked, ledger)
        self._observer.requests_ended(ledger, queues)

    async def _execute(self, executor: Executor, prepared: Prepared) -> CycleOutcome:
        """Book the cycle as in flight and run it; at a death it stays so for the quarantine."""
        request_ids = [item.planned.request_id for item in prepared.items]
        cycle = await self._lead.begin(self._slot, self._quarantine.note_of(request_ids))
        bind_context(cycle=cycle)
        phase(Phase.CYCLE_BEGUN, pool=self._pool, cycle=cycle)
        self._observer.cycle_begins()
        now = self._clock()
        for request_id in request_ids:
            self._sent_at.setdefault(request_id, now)
        num_tokens = sum(item.planned.num_tokens for item in prepared.items)
        work = CycleWork(
            token=self._lead.lease.token,
            cycle=cycle,
            items=tuple(prepared.items),
            restores=tuple(prepared.restores.values()),
            predicted_s=self._budget.predict_s(num_tokens),
        )
        self._quarantine.cycle_begins(request_ids)
        outcome = await executor.run_cycle(work)
        self._quarantine.cycle_ended()
        assert outcome.cycle == cycle, f"an outcome of cycle {outcome.cycle} in cycle {cycle}"
        return outcome

    def _times(self, queues: Queues, prepared: Prepared) -> Mapping[RequestId, OpTimes]:
        planned = {item.planned.request_id for item in prepared.items}
        return {
            row.request_id: OpTimes(queued_at=row.created_at, sent_at=self._sent_at[row.request_id])
            for rows in queues.values()
            for row in rows
            if row.request_id in planned
        }

    async def _commit(self, ledger: CycleLedger) -> None:
        """Make everything in the ledger public, and take it over into the book."""
        finished = ledger.close()
        try:
            await self._committer.commit(finished)
        except StoreUnavailable:
            # It may have been committed all the same: what is known of these runs is read again.
            self._book.forget(advance.model_id for advance in finished.advances)
            raise
        self._book.take_over(finished)
        self._snapshotter.note_registered(self._book, finished.snapshots)
        self._quarantine.clear(request.request_id for request in finished.finished)
        for request in finished.finished:
            self._sent_at.pop(request.request_id, None)

    async def _forget_over(self, executor: Executor, runs: Mapping[ModelId, Run]) -> None:
        """Runs that are over need no memory, here or on the worker."""
        over = [run for run in runs.values() if is_over(run.record.state)]
        lost = [run.record.model_id for run in over if run.record.state is ModelState.LOST]
        for run in over:
            run.drop_state()
            self._snapshotter.forget(run.record.model_id)
        if lost:
            await executor.evict(lost)
        self._book.forget(run.record.model_id for run in over)

    def _observe(self, outcome: CycleOutcome, booked: Booked, ledger: CycleLedger) -> None:
        """How fast the worker was, and how much of it was done again."""
        self.num_finished += 1
        self._observer.cycle_ended(outcome, ledger, booked.replayed, budget_tokens=self._budget.tokens)
        num_tokens = sum(one.num_tokens for one in outcome.outcomes)
        self._budget.observe(num_tokens=num_tokens, compute_s=outcome.compute_s)
        self._snapshotter.earn(outcome.compute_s)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
