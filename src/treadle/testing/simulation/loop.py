"""The leader's loop for one worker, in virtual time: gather, plan, run, commit; and what a death leaves of it.

What is pure in scheduler/ runs as it is: policy, budget, the book of runs, replay queues, quarantine, snapshot budget.
The rest follows scheduler/cycle_loop.py, which is bound to a store. It knows no clients and no other worker.
Invariant: what it believes a worker to hold is what that worker holds.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from treadle.domain.ids import ModelId, RequestId, TenantId
from treadle.domain.limits import GAP_WAIT_S, MAX_HEAD_ROWS, MAX_HEADS_PER_MODEL, MAX_REPLAY_S
from treadle.domain.ops import OpKind
from treadle.domain.outcome import CycleOutcome, OpOutcome
from treadle.domain.plan import FIRST_INCARNATION, CyclePlan, PolicyInput, PolicyState, RestoreItem, StateTag
from treadle.domain.records import ModelAdvance, RequestRecord, SnapshotRecord
from treadle.domain.states import ModelState
from treadle.scheduler.budget import TokenBudget
from treadle.scheduler.outcomes import REPLAYED_KINDS, seconds_by_op
from treadle.scheduler.policy import plan_cycle
from treadle.scheduler.quarantine import Quarantine
from treadle.scheduler.runs import Run
from treadle.scheduler.snapshots import SnapshotBudget
from treadle.scheduler.sorting import model_queue
from treadle.testing.simulation.checks import Checks
from treadle.testing.simulation.costs import Costs
from treadle.testing.simulation.packing import packs_of
from treadle.testing.simulation.rows import Blobs, Row, RunRow
from treadle.testing.simulation.tally import CycleFacts, Tally
from treadle.testing.simulation.timeline import Timeline
from treadle.testing.simulation.worker import SimWorker

# RL payloads: tokens, targets, logprobs and advantages of a datum.
PAYLOAD_BYTES_PER_TOKEN = 24


@dataclass(frozen=True, slots=True)
class Clock:
    """How the clock beats; the fields of SchedulerSettings, in seconds.

    has_snapshots: False takes none. suspect_after: deaths that a request must have been in flight at before quarantine
    hears of it; the product says 1.
    """

    gather_window_s: float = 0.02
    target_cycle_s: float = 0.5
    budget_tokens: int = 0
    cap_fraction: float = 0.5
    gap_wait_s: float = GAP_WAIT_S
    max_replay_s: float = MAX_REPLAY_S
    has_snapshots: bool = True
    suspect_after: int = 1


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A cycle on its worker. rows: of its ops, in the order of the plan."""

    plan: CyclePlan
    rows: Sequence[Row]
    restores: Mapping[ModelId, RestoreItem]
    compute_s: float
    facts: CycleFacts


class Loop:
    """Cycles of one worker. on_committed: called for every row that became true."""

    def __init__(
        self,
        *,
        index: int,
        timeline: Timeline,
        clock: Clock,
        costs: Costs,
        blobs: Blobs,
        weights: Mapping[TenantId, float],
        tally: Tally,
        on_committed: Callable[[Row], None],
    ) -> None:
        self.index = index
        self.worker = SimWorker(blobs)
        self.num_cycles = 0
        # Runs with queued rows, and those of them whose newest row is a pass: its step may still come.
        self.waiting: dict[ModelId, RunRow] = {}
        self._unsettled: set[ModelId] = set()
        self._runs: dict[ModelId, RunRow] = {}
        self._timeline = timeline
        self._clock = clock
        self._costs = costs
        self._blobs = blobs
        self._weights = weights
        self._tally = tally
        self._on_committed = on_committed
        # Every death and takeover begins a new epoch; what was under way in an older one is void.
        self._epoch = 0
        self._is_ready = True
        self._in_flight: _InFlight | None = None
        self._gathers_until: float | None = None
        self._deaths: Counter[RequestId] = Counter()
        self._forget()

    def _forget(self) -> None:
        """What a leader has in memory and a new one does not."""
        self._budget = TokenBudget(target_cycle_s=self._clock.target_cycle_s, fixed_tokens=self._clock.budget_tokens)
        self._snapshot_budget = SnapshotBudget(max_replay_s=self._clock.max_replay_s)
        self._policy_state = PolicyState()
        self._quarantine = Quarantine()
        self._checks = Checks()
        self._forget_worker()

    def _forget_worker(self) -> None:
        """What it knows of a worker that is gone."""
        self._book: dict[ModelId, Run] = {}
        # Waiting runs that have to be restored first, or are in the middle of their log: nobody gathers company then.
        self._behind = {model_id for model_id, run in self.waiting.items() if run.next_seq_id}
        self._is_copying = False
        self._landed: list[SnapshotRecord] = []
        self._owed_s = 0.0

    def queued(self, row: Row) -> None:
        """A row of one of its runs was written."""
        run = row.run
        self.waiting[run.model_id] = run
        self._runs[run.model_id] = run
        known = self._book.get(run.model_id)
        if run.next_seq_id and (known is None or known.is_without_state or known.needs_replay):
            self._behind.add(run.model_id)
        if row.record.quantum_tokens:
            self._unsettled.add(run.model_id)
        else:
            self._unsettled.discard(run.model_id)
        self._timeline.after(0.0, self._gather)

    def take_over(self, runs: Sequence[RunRow], suspects: frozenset[RequestId]) -> None:
        """These runs are served here from now on; suspects were in flight where they were before."""
        self._quarantine.suspect(sorted(suspects))
        for run in runs:
            if run.line:
                self.queued(run.line[-1])

    def hand_over(self) -> tuple[list[RunRow], frozenset[RequestId]]:
        """What waits here, to be served elsewhere: this worker does not come back."""
        assert not self._is_ready
        runs, suspects = list(self.waiting.values()), self._quarantine.suspects
        self.waiting.clear()
        self._unsettled.clear()
        self._behind.clear()
        return runs, suspects

    def die(self, *, back_after_s: float | None, is_leader: bool) -> None:
        """The worker dies, or its leader does: what was in flight is void, and no state is known to anybody.

        back_after_s None: for good.
        """
        self._epoch += 1
        self._is_ready = False
        in_flight = [row.record.request_id for row in self._in_flight.rows] if self._in_flight is not None else []
        self._deaths.update(in_flight)
        if is_leader:
            self._forget()
            self._quarantine.suspect(self._announced(in_flight))
        else:
            self._forget_worker()
            self._quarantine.cycle_begins(self._announced(in_flight))
            self._quarantine.worker_died()
        self._in_flight = None
        self._gathers_until = None
        self.worker.drop_all()
        self._tally.died(self._timeline.now, [run.model_id for run in self.waiting.values()])
        if back_after_s is not None:
            self._timeline.after(back_after_s, partial(self._come_back, self._epoch))

    def _announced(self, in_flight: Sequence[RequestId]) -> list[RequestId]:
        return [name for name in in_flight if self._deaths[name] >= self._clock.suspect_after]

    def _come_back(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._is_ready = True
            self._gather()

    def _gather(self) -> None:
        """Start a cycle, or wait a little for company if some run's step may still come."""
        if not self._is_ready or self._in_flight is not None or not self.waiting:
            return
        now = self._timeline.now
        may_wait = bool(self._unsettled) and not self._behind
        if self._gathers_until is None:
            self._gathers_until = now + self._clock.gather_window_s
            if may_wait:
                self._timeline.after(self._clock.gather_window_s, partial(self._gather_is_over, self._epoch))
        if not may_wait or now >= self._gathers_until:
            self._gathers_until = None
            self._start_cycle()

    def _gather_is_over(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._gather()

    def _start_cycle(self) -> None:
        given = self._policy_input()
        plan, self._policy_state = plan_cycle(given)
        self._checks.planned(given, plan, self._policy_state)
        assert plan.ops, "rows wait and nothing may run"
        assert not plan.gaps, "these clients send everything in order"
        rows = [self.waiting[op.model_id].row(op.seq_id) for op in plan.ops]
        created = {op.model_id for op in plan.ops if op.kind is OpKind.CREATE_MODEL}
        restores = {
            model_id: self._book[model_id].restore_item()
            for model_id in dict.fromkeys(op.model_id for op in plan.ops)
            if self._book[model_id].tag is None and model_id not in created
        }
        quanta = [
            tokens
            for op, row in zip(plan.ops, rows, strict=True)
            for tokens in row.record.quantum_tokens[op.quantum_start : op.quantum_stop]
        ]
        packs = packs_of(quanta, packed_tokens=self._costs.packed_tokens)
        compute_s = self._costs.compute_s(packs, num_ops=len(plan.ops), num_restores=len(restores))
        for row in rows:
            if row.begun_s is None:
                row.begun_s = self._timeline.now
        facts = CycleFacts.of(given, plan, packs, self._costs, rows=rows, num_restores=len(restores))
        self._in_flight = _InFlight(plan, rows, restores, compute_s, facts)
        # What a snapshot took of the device since the last cycle delays this one.
        taken_s, self._owed_s = self._owed_s, 0.0
        duration_s = self._costs.between_s(sum(quanta)) + taken_s + compute_s
        self._timeline.after(duration_s, partial(self._finish_cycle, self._epoch))

    def _policy_input(self) -> PolicyInput:
        """The heads of all lines, as the store would give them, or of the one run that quarantine lets run."""
        heads = {
            model_id: [row.record for row in islice(run.line, MAX_HEADS_PER_MODEL)]
            for model_id, run in self.waiting.items()
        }
        if sum(map(len, heads.values())) > MAX_HEAD_ROWS:
            heads = self._cut(heads)
        runs = {model_id: self._run(model_id) for model_id in heads}
        now = self._timeline.now
        queues = {model_id: model_queue(runs[model_id], tuple(head), now) for model_id, head in heads.items()}
        alone = None
        if self._quarantine.suspects:
            alone = self._quarantine.isolated(
                {m: [row.request_id for row in (*runs[m].log, *head)] for m, head in heads.items()},
                {row.request_id for run in runs.values() for row in run.log},
            )
        budget = self._budget.tokens
        num_tenants = len({queue.tenant_id for queue in queues.values()})
        cap = budget if num_tenants <= 1 else max(1, int(budget * self._clock.cap_fraction))
        return PolicyInput(
            models=tuple(queues.values()) if alone is None else (queues[alone],),
            state=self._policy_state,
            budget_tokens=budget,
            tenant_cap_tokens=cap,
            gap_wait_s=self._clock.gap_wait_s,
            weights=self._weights,
            quarantined=self._quarantine.suspects,
        )

    def _run(self, model_id: ModelId) -> Run:
        """The run in the leader's book, with what it has to do again read from its log."""
        run_row = self.waiting[model_id]
        run = self._book.get(model_id)
        if run is None:
            run = self._book[model_id] = Run(run_row.record(), run_row.snapshots)
        if run.needs_replay:
            later = (row.record for row in run_row.log if row.record.seq_id > run.position)
            run.log = tuple(islice(later, MAX_HEADS_PER_MODEL))
        elif run.log:
            run.log = ()
        return run

    def _cut(self, heads: Mapping[ModelId, list[RequestRecord]]) -> dict[ModelId, list[RequestRecord]]:
        """MAX_HEAD_ROWS of them: everybody's first, then everybody's second; older rows first within a place."""
        placed = (
            (place, row.row_id, model_id)
            for model_id in heads
            for place, row in enumerate(islice(self.waiting[model_id].line, MAX_HEADS_PER_MODEL))
        )
        counts = Counter(model_id for _, _, model_id in heapq.nsmallest(MAX_HEAD_ROWS, placed))
        return {model_id: heads[model_id][:count] for model_id, count in counts.items()}

    def _finish_cycle(self, epoch: int) -> None:
        """The outcome is here: commit what is new, and go on."""
        if epoch != self._epoch:
            return
        cycle, self._in_flight = self._in_flight, None
        assert cycle is not None
        self.num_cycles += 1
        self._quarantine.cycle_ended()
        for item in cycle.restores.values():
            self.worker.restore(item)
        outcomes = [self.worker.apply(op, row.record) for op, row in zip(cycle.plan.ops, cycle.rows, strict=True)]
        pairs = list(zip(outcomes, cycle.rows, strict=True))
        committed = [row for one, row in pairs if row.finished_s is None and not one.is_partial]
        self._commit(cycle, committed)
        self._take_states(cycle, outcomes)
        self._quarantine.clear(one.request_id for one in outcomes if not one.is_partial)
        self._checks.committed(self.worker, self._book, cycle.rows)
        self._tally.ran(self._timeline.now, cycle.facts, cycle.compute_s)
        self._budget.observe(num_tokens=cycle.plan.num_tokens, compute_s=cycle.compute_s)
        self._snapshot_budget.earn(cycle.compute_s)
        self._take_snapshot()
        for row in committed:
            self._on_committed(row)
        self._gather()

    def _commit(self, cycle: _InFlight, committed: Sequence[Row]) -> None:
        """What is new becomes true, in the store and in the leader's book."""
        for row in committed:
            row.run.commit(row)
            row.finished_s = self._timeline.now
            self._deaths.pop(row.record.request_id, None)
            if row.record.kind is OpKind.CREATE_MODEL:
                row.run.incarnation = FIRST_INCARNATION
                self._landed.append(SnapshotRecord(row.run.model_id, row.record.seq_id, None))
            if not row.run.line:
                self.waiting.pop(row.run.model_id, None)
                self._unsettled.discard(row.run.model_id)
        for run_row in {row.run.model_id: row.run for row in cycle.rows}.values():
            if (item := cycle.restores.get(run_row.model_id)) is not None:
                run_row.incarnation = item.tag.incarnation
            self._book[run_row.model_id].apply(
                ModelAdvance(
                    run_row.model_id,
                    run_row.next_seq_id,
                    state=ModelState.READY if run_row.next_seq_id else None,
                    incarnation=run_row.incarnation,
                    changed_seq=run_row.changed_seq,
                )
            )
        self._register_landed()

    def _register_landed(self) -> None:
        for snapshot in self._landed:
            self._runs[snapshot.model_id].register(snapshot)
            if (run := self._book.get(snapshot.model_id)) is not None:
                run.register(snapshot)
                run.debt.settle()
        self._landed.clear()

    def _take_states(self, cycle: _InFlight, outcomes: Sequence[OpOutcome]) -> None:
        """What the worker holds of each run now, and what that would cost to make again."""
        for model_id, item in cycle.restores.items():
            self._book[model_id].restored(item.tag)
        seconds = seconds_by_op(CycleOutcome(0, self.num_cycles, tuple(outcomes), cycle.compute_s, 0))
        for planned, one in zip(cycle.plan.ops, outcomes, strict=True):
            run = self._book[one.model_id]
            if one.kind in REPLAYED_KINDS:
                num_bytes = 0 if one.is_partial else PAYLOAD_BYTES_PER_TOKEN * planned.num_tokens
                run.debt.add(seconds[one.request_id], num_bytes)
            run.take_state(one, num_quanta_done=planned.quantum_stop)
            if not run.needs_replay:
                self._behind.discard(one.model_id)

    def _take_snapshot(self) -> None:
        """Copy the run out that would have the most to do again, if that may cost something now; one at a time."""
        if self._is_copying or not self._clock.has_snapshots:
            return
        due = [run for run in self._book.values() if run.tag is not None and run.part is None]
        due = [run for run in due if not run.has_open_gradient]
        run = max(due, key=lambda run: run.debt.seconds, default=None)
        if run is None or not self._snapshot_budget.allows(run.record.model_id, run.debt.seconds):
            return
        held = self.worker.held[run.record.model_id]
        assert run.tag == held.tag, "copied out while something of it is not committed"
        run.debt.cover()
        self._is_copying = True
        self._owed_s += self._costs.snapshot_s
        self._tally.snapshots += 1
        delay_s = self._costs.snapshot_s + self._costs.write_s
        self._timeline.after(delay_s, partial(self._land, self._epoch, held.tag, held.digest))

    def _land(self, epoch: int, tag: StateTag, digest: int) -> None:
        """A snapshot is durable; the next commit registers it, or one of its own when none is under way."""
        if epoch != self._epoch:
            return
        self._is_copying = False
        self._snapshot_budget.spend(tag.model_id, self._costs.snapshot_s)
        self._landed.append(SnapshotRecord(tag.model_id, tag.applied_seq, self._blobs.write(digest)))
        if self._in_flight is None:
            self._register_landed()

    def check_all(self) -> None:
        """Everything that must be true between any two events."""
        self._checks.everything(self.worker, self._book, self.waiting.values())
