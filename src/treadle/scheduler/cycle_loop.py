"""The clock: one loop per worker that reads queued ops, plans a cycle, has it run, and commits it.

One request's life in this file: `_gather` sees its row, `plan_cycle` picks it, `begin` books it as in flight,
the executor runs it, `finish` commits its outcome in one fenced transaction. Rows keep QUEUED until then, so a
death at any point leaves nothing to clean up: the next leader plans the same rows again.
Invariant: the state a worker holds is the committed one, or it is dropped before the run's next op.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from treadle.blobs import BlobStore
from treadle.domain.ids import ModelId, PoolName, RequestId, op_request_id
from treadle.domain.limits import MAX_HEAD_ROWS, MAX_HEADS_PER_MODEL
from treadle.domain.ops import OpKind, Phase, phase_of
from treadle.domain.outcome import CycleOutcome, Failure
from treadle.domain.plan import CyclePlan, CycleWork, ModelQueue, PolicyInput, PolicyState, QueuedOp
from treadle.domain.records import FinishedCycle, LeaseRecord, NewRequest, RequestRecord
from treadle.domain.states import Category, ModelState, RequestState
from treadle.errors import Fenced, ServerError, StoreUnavailable, WorkerDied
from treadle.executor.base import Executor
from treadle.scheduler.budget import TokenBudget
from treadle.scheduler.finishing import CycleLedger
from treadle.scheduler.policy import plan_cycle
from treadle.scheduler.preparing import Prepared, drop_blobs, new_blob_key, prepare
from treadle.scheduler.runs import Run, RunBook, is_over
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# The slow poll of the queue: events only make the loop quicker, this is what makes it right.
POLL_S = 1.0
# A request that was in flight, alone, at this many worker deaths is poison.
MAX_DEATHS = 3
# After an unexpected error the loop waits before it tries again, so that it cannot spin.
ERROR_PAUSE_S = 1.0
# How long a commit is tried again while the database does not answer. Work that is done is worth waiting for: giving
# up costs every run of the cycle what its newest snapshot lacks.
COMMIT_PATIENCE_S = 60.0
# Runs that a drain persists together: what is registered stays, should the rest take too long.
RUNS_PER_SNAPSHOT = 8
COMMIT_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True)
class CycleSettings:
    """How the clock beats.

    gather_window_s: how long ready work waits for company. budget_tokens: 0 follows target_cycle_s and the measured
    speed. cap_fraction: of the budget, per tenant, when several wait.
    """

    gather_window_s: float
    target_cycle_s: float
    budget_tokens: int
    cap_fraction: float
    gap_wait_s: float


class CycleLoop:
    """Runs the cycles of one worker. One task at a time calls `run`; `stop` ends it after the cycle in flight."""

    def __init__(
        self,
        *,
        pool: PoolName,
        store: Store,
        blobs: BlobStore,
        lease: LeaseRecord,
        settings: CycleSettings,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._lease = lease
        self._settings = settings
        self._clock = clock
        self._book = RunBook(store)
        self._budget = TokenBudget(target_cycle_s=settings.target_cycle_s, fixed_tokens=settings.budget_tokens)
        self._policy_state = PolicyState()
        self._cycle = lease.cycle
        self._quanta_done: dict[RequestId, int] = {}
        self._deaths: dict[RequestId, int] = {}
        # Set by whatever was queued, and by what ends the wait for company.
        self._wake = asyncio.Event()
        self._may_be_settled = asyncio.Event()
        self._is_stopping = False
        self._is_abandoned = False

    def wake(self, kind: OpKind) -> None:
        """An op of this kind was queued."""
        self._wake.set()
        if phase_of(kind) is not Phase.PASS:
            self._may_be_settled.set()

    def stop(self) -> None:
        """End `run` once the cycle in flight is committed."""
        self._is_stopping = True
        self._wake_all()

    def abandon(self) -> None:
        """The executor has died: end `run` after whatever is being committed."""
        self._is_abandoned = True
        self._wake_all()

    def _wake_all(self) -> None:
        self._wake.set()
        self._may_be_settled.set()

    async def run(self, executor: Executor) -> None:
        """Run cycles on `executor` until stopped or abandoned.

        Raises WorkerDied when a cycle was in flight at its death, Fenced when the lease is lost.
        """
        # A fresh worker holds nothing, and what was committed is in the store.
        self._book = RunBook(self._store)
        self._quanta_done.clear()
        self._is_abandoned = False
        while not (self._is_stopping or self._is_abandoned):
            try:
                if not await self._run_one(executor):
                    await _wait(self._wake, POLL_S)
            except (WorkerDied, Fenced):
                raise
            except Exception as error:  # noqa: BLE001 (cycle loop: the rows are still queued, so it tries again)
                log.error("cycle failed", pool=self._pool, cycle=self._cycle, exc=error)
                self._metrics.caught_errors.labels("cycle_loop").inc()
                await asyncio.sleep(ERROR_PAUSE_S)

    async def persist(self, executor: Executor) -> None:
        """Write every resident run whose newest snapshot is older than its state, so that a restart continues it.

        Raises ServerError when some could not be written; the others are.
        """
        stale = [run for run in self._book.resident() if not run.can_restore]
        num_written = 0
        for start in range(0, len(stale), RUNS_PER_SNAPSHOT):
            num_written += await self._persist_some(executor, stale[start : start + RUNS_PER_SNAPSHOT])
        log.info("runs persisted", pool=self._pool, num_runs=num_written)
        if num_written < len(stale):
            raise ServerError(f"{len(stale) - num_written} runs of pool {self._pool} could not be persisted")

    async def _persist_some(self, executor: Executor, runs: Sequence[Run]) -> int:
        """Write and register the states of these runs; how many could be."""
        by_id = {run.record.model_id: run for run in runs}
        keys = {model_id: new_blob_key(model_id) for model_id in by_id}
        written = await executor.snapshot(
            [(run.tag, keys[model_id]) for model_id, run in by_id.items() if run.tag is not None]
        )
        advances = tuple(by_id[model_id].snapshot_taken(keys[model_id]) for model_id in written)
        if advances:
            await self._finish(FinishedCycle(advances=advances))
        for advance in advances:
            by_id[advance.model_id].apply(advance)
        return len(advances)

    async def _run_one(self, executor: Executor) -> bool:
        """Run one cycle if there is anything to do; whether something that was queued before it may be left."""
        queues = await self._gather()
        ledger = CycleLedger(now=self._clock())
        runs = {model_id: await self._book.get(model_id) for model_id in queues}
        runnable = await self._set_aside_lost(queues, runs, ledger)
        plan, policy_state = self._plan(runnable, runs)
        if (plan.is_empty and ledger.is_empty) or self._is_abandoned:
            return False
        self._give_up_gaps(plan, runs, ledger)
        prepared = await prepare(plan, runs, self._store, self._blobs)
        for planned, failure in prepared.refused:
            ledger.fail(runs[planned.model_id], planned.request_id, planned.seq_id, failure)
        if prepared.items:
            await self._run_and_commit(executor, prepared, runs, ledger)
        else:
            await self._commit(ledger, runs)
        self._policy_state = policy_state
        self._book.forget_over(runs)
        await self._drop_payloads(queues, ledger)
        return _is_something_left(queues, ledger)

    async def _gather(self) -> dict[ModelId, tuple[RequestRecord, ...]]:
        """Queue heads by run, after the gather window if some run still waits for its step.

        Reading them is what an idle cycle costs, so it waits for an event that can end the window: where a client
        sends its pass and its step together, they are read once.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.gather_window_s
        if self._wake.is_set():
            await _wait(self._may_be_settled, self._settings.gather_window_s)
        while True:
            self._wake.clear()
            self._may_be_settled.clear()
            queues = await self._heads()
            remaining_s = deadline - asyncio.get_running_loop().time()
            if remaining_s <= 0 or self._is_stopping or self._is_abandoned:
                return queues
            if all(_is_settled(rows) for rows in queues.values()):
                return queues
            await _wait(self._may_be_settled, remaining_s)

    async def _heads(self) -> dict[ModelId, tuple[RequestRecord, ...]]:
        rows = await self._store.requests.heads(self._pool, MAX_HEADS_PER_MODEL)
        return {row[0].model_id: row for row in rows if row and row[0].model_id is not None}

    async def _set_aside_lost(
        self,
        queues: Mapping[ModelId, tuple[RequestRecord, ...]],
        runs: Mapping[ModelId, Run],
        ledger: CycleLedger,
    ) -> dict[ModelId, tuple[RequestRecord, ...]]:
        """Queues that can run; every op of the others fails with the reason, never on older weights."""
        runnable = {}
        for model_id, rows in queues.items():
            run = runs[model_id]
            if run.record.state is ModelState.READY and run.tag is None and not run.can_restore:
                message = await self._book.loss_message(run)
                ledger.set_state(run, ModelState.LOST, message)
                log.warning("run lost", model_id=model_id, changed_seq=run.record.changed_seq)
                self._fail_queue(run, rows, message, ledger, Category.SERVER)
            elif is_over(run.record.state):
                category = Category.SERVER if run.record.state is ModelState.LOST else Category.USER
                message = run.record.state_message or f"run {model_id} is {run.record.state}; create a new one"
                ledger.set_state(run, run.record.state, message)
                self._fail_queue(run, rows, message, ledger, category)
            else:
                run.note_refused(rows)
                runnable[model_id] = rows
                # Now, not with the next op: there may never be one, and the line would be read for ever.
                if (newest := run.newest_to_step_over(rows)) is not None:
                    ledger.consume(run, newest)
        return runnable

    def _fail_queue(
        self, run: Run, rows: tuple[RequestRecord, ...], message: str, ledger: CycleLedger, category: Category
    ) -> None:
        for row in rows:
            if row.state is RequestState.QUEUED:
                ledger.fail(run, row.request_id, row.seq_id, Failure(message=message, category=category))
            else:
                ledger.consume(run, row.seq_id)

    def _plan(
        self, queues: Mapping[ModelId, tuple[RequestRecord, ...]], runs: Mapping[ModelId, Run]
    ) -> tuple[CyclePlan, PolicyState]:
        budget = self._budget.tokens
        tenants = {runs[model_id].record.tenant_id for model_id in queues}
        cap = budget if len(tenants) <= 1 else max(1, int(budget * self._settings.cap_fraction))
        now = self._clock()
        return plan_cycle(
            PolicyInput(
                models=tuple(self._model_queue(runs[model_id], rows, now) for model_id, rows in queues.items()),
                state=self._policy_state,
                budget_tokens=budget,
                tenant_cap_tokens=cap,
                gap_wait_s=self._settings.gap_wait_s,
                quarantined=frozenset(self._deaths),
            )
        )

    def _model_queue(self, run: Run, rows: tuple[RequestRecord, ...], now: float) -> ModelQueue:
        record = run.record
        return ModelQueue(
            model_id=record.model_id,
            tenant_id=record.tenant_id,
            next_seq_id=record.next_seq_id,
            ops=tuple(
                QueuedOp(
                    request_id=row.request_id,
                    seq_id=row.seq_id,
                    kind=row.kind,
                    quantum_tokens=row.quantum_tokens,
                    num_quanta_done=self._quanta_done.get(row.request_id, 0),
                    queued_s=max(0.0, now - row.created_at),
                )
                for row in rows
                if row.state is RequestState.QUEUED
            ),
            settled_seq_ids=frozenset(row.seq_id for row in rows if row.state is not RequestState.QUEUED),
        )

    def _give_up_gaps(self, plan: CyclePlan, runs: Mapping[ModelId, Run], ledger: CycleLedger) -> None:
        """Ids that never came become FAILED rows, and the line moves on."""
        for gap in plan.gaps:
            run = runs[gap.model_id]
            first, last = gap.seq_ids[0], gap.seq_ids[-1]
            log.warning("gap given up", model_id=gap.model_id, first=first, last=last, num_missing=len(gap.seq_ids))
            for seq_id in gap.seq_ids:
                ledger.never_received.append(_never_received(run, seq_id, self._pool))
                ledger.consume(run, seq_id)

    async def _run_and_commit(
        self, executor: Executor, prepared: Prepared, runs: Mapping[ModelId, Run], ledger: CycleLedger
    ) -> None:
        """Run the cycle and make its outcome public; if that fails, the worker's newer states are void and dropped."""
        outcome = await self._execute(executor, prepared)
        try:
            ledger.now = self._clock()
            await self._book_outcome(outcome, prepared, runs, ledger)
            await self._commit(ledger, runs)
        except Fenced:
            raise
        except Exception as error:
            await self._void(executor, prepared, runs)
            if not isinstance(error, StoreUnavailable):
                # One op's outcome is to blame, and the same plan would end here again: find it as poison is found.
                await self._suspect(prepared, f"the outcome of this request could not be stored {MAX_DEATHS} times")
            raise
        self._observe(outcome, prepared, runs)

    async def _execute(self, executor: Executor, prepared: Prepared) -> CycleOutcome:
        """Book the cycle as in flight and run it. A death counts against the ops that were in flight."""
        request_ids = [item.planned.request_id for item in prepared.items]
        self._cycle += 1
        await self._store.cycles.begin(self._lease, self._cycle, request_ids)
        work = CycleWork(
            token=self._lease.token,
            cycle=self._cycle,
            items=tuple(prepared.items),
            restores=tuple(prepared.restores.values()),
        )
        try:
            outcome = await executor.run_cycle(work)
        except WorkerDied:
            await self._suspect(prepared, f"this request ended its worker {MAX_DEATHS} times")
            raise
        assert outcome.cycle == self._cycle, f"an outcome of cycle {outcome.cycle} in cycle {self._cycle}"
        return outcome

    async def _suspect(self, prepared: Prepared, verdict: str) -> None:
        """Suspects run alone from now on; only a death while alone counts, and the third one is final."""
        is_alone = len(prepared.items) == 1
        for item in prepared.items:
            request_id = item.planned.request_id
            self._deaths[request_id] = self._deaths.get(request_id, 0) + (1 if is_alone else 0)
            if self._deaths[request_id] < MAX_DEATHS:
                continue
            run = await self._book.get(item.planned.model_id)
            ledger = CycleLedger(now=self._clock())
            ledger.fail(run, request_id, item.planned.seq_id, Failure(verdict, Category.SERVER))
            await self._commit(ledger, {item.planned.model_id: run})

    async def _book_outcome(
        self, outcome: CycleOutcome, prepared: Prepared, runs: Mapping[ModelId, Run], ledger: CycleLedger
    ) -> None:
        for model_id, restore in prepared.restores.items():
            ledger.restored(runs[model_id], restore.tag.incarnation)
        for op_outcome in outcome.outcomes:
            run = runs[op_outcome.model_id]
            ledger.record_outcome(run, op_outcome, prepared.named_ops.get(op_outcome.request_id))
            if op_outcome.model_id in prepared.restores and op_outcome.tag_after is None and op_outcome.failure:
                # Its snapshot could not be restored. Going on from anything else would be silently older weights.
                message = await self._book.loss_message(run, why="could not be read back from its snapshot")
                ledger.set_state(run, ModelState.LOST, message)

    async def _commit(self, ledger: CycleLedger, runs: Mapping[ModelId, Run]) -> None:
        """Make everything in the ledger public, and take it over into the book."""
        finished = ledger.close()
        await self._finish(finished)
        for advance in finished.advances:
            runs[advance.model_id].apply(advance)
        # Only what is over is no suspect any more: a pass that kills its worker in a later part would be cleared by
        # each earlier one.
        for request in finished.finished:
            self._deaths.pop(request.request_id, None)
            self._quanta_done.pop(request.request_id, None)

    async def _finish(self, finished: FinishedCycle) -> None:
        """Commit, with patience while the database does not answer.

        To commit again what may have been written after all changes nothing, except that tokens count twice.
        """
        deadline = asyncio.get_running_loop().time() + COMMIT_PATIENCE_S
        while True:
            try:
                await self._store.cycles.finish(self._lease, finished)
            except StoreUnavailable as error:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
                log.warning("commit is tried again", pool=self._pool, cycle=self._cycle, reason=error.message)
                await asyncio.sleep(COMMIT_PAUSE_S)
            else:
                return

    async def _drop_payloads(self, queues: Mapping[ModelId, tuple[RequestRecord, ...]], ledger: CycleLedger) -> None:
        """Large payloads of requests that are over. Inline ones went with the commit."""
        over = {finished.request_id for finished in ledger.finished}
        keys = [row.payload_key for rows in queues.values() for row in rows if row.request_id in over]
        await drop_blobs(self._blobs, [key for key in keys if key is not None])

    async def _void(self, executor: Executor, prepared: Prepared, runs: Mapping[ModelId, Run]) -> None:
        """What the worker applied was not committed: forget it there, so that it is restored and run once."""
        touched = {item.planned.model_id for item in prepared.items}
        for model_id in touched:
            runs[model_id].tag = None
        for item in prepared.items:
            self._quanta_done.pop(item.planned.request_id, None)
        await executor.evict(sorted(touched))

    def _observe(self, outcome: CycleOutcome, prepared: Prepared, runs: Mapping[ModelId, Run]) -> None:
        """What the worker holds now, how far passes are that go on in a later cycle, and how fast it was."""
        quanta_stop = {item.planned.request_id: item.planned.quantum_stop for item in prepared.items}
        for op_outcome in outcome.outcomes:
            run = runs[op_outcome.model_id]
            run.tag = op_outcome.tag_after
            if op_outcome.is_partial:
                self._quanta_done[op_outcome.request_id] = quanta_stop[op_outcome.request_id]
            if op_outcome.kind is OpKind.OPTIM_STEP and op_outcome.failure is None:
                run.stepped(op_outcome.seq_id)
        num_tokens = sum(op_outcome.num_tokens for op_outcome in outcome.outcomes)
        self._budget.observe(num_tokens=num_tokens, compute_s=outcome.compute_s)
        self._metrics.cycles.labels(self._pool).inc()
        self._metrics.cycle_seconds.labels(self._pool).observe(outcome.compute_s)
        self._metrics.cycle_tokens.labels(self._pool).observe(num_tokens)
        self._metrics.trained_tokens.labels(self._pool).inc(num_tokens)
        self._metrics.base_forwards.labels(self._pool).inc(outcome.num_forwards)
        log.debug(
            "cycle finished",
            pool=self._pool,
            cycle=outcome.cycle,
            ops=len(outcome.outcomes),
            tokens=num_tokens,
            ms=round(outcome.compute_s * 1000, 1),
        )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


def _is_something_left(queues: Mapping[ModelId, tuple[RequestRecord, ...]], ledger: CycleLedger) -> bool:
    """False when all that was read is over and there was no more to read: the next read can wait for an event."""
    num_rows = sum(len(rows) for rows in queues.values())
    is_cut = num_rows >= MAX_HEAD_ROWS or any(len(rows) >= MAX_HEADS_PER_MODEL for rows in queues.values())
    return is_cut or len(ledger.finished) < num_rows


def _is_settled(rows: tuple[RequestRecord, ...]) -> bool:
    """True when a run's newest queued op is no pass: its step (or save, or load) is there, nothing is to wait for."""
    return phase_of(rows[-1].kind) is not Phase.PASS


def _never_received(run: Run, seq_id: int, pool: PoolName) -> NewRequest:
    """The FAILED row of an id that never came. Its kind is unknown; passes are what clients lose."""
    record = run.record
    return NewRequest(
        request_id=op_request_id(record.model_id, seq_id),
        tenant_id=record.tenant_id,
        pool=pool,
        kind=OpKind.FORWARD_BACKWARD,
        seq_id=seq_id,
        num_tokens=0,
        model_id=record.model_id,
        failure=Failure(
            f"request {seq_id} of run {record.model_id} was never received; later ones went on without it",
            Category.USER,
        ),
    )
