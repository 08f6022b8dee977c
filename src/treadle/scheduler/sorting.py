"""Which queues can be planned, and what is settled of them without a worker.

It reads queue heads as the store gives them and sorts out runs that are over, that pause, or whose next op is poison;
ids that never came are given up here. It refuses to know tokens, tenants and cycles; those are policy.py's.
Invariant: a number is consumed only together with the reason that its client gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.domain.ids import ModelId, PoolName, op_request_id
from treadle.domain.limits import MAX_HEAD_ROWS, MAX_HEADS_PER_MODEL
from treadle.domain.ops import OpKind, Phase, phase_of
from treadle.domain.outcome import Failure
from treadle.domain.plan import CyclePlan, ModelQueue, QueuedOp
from treadle.domain.records import NewRequest, RequestRecord
from treadle.domain.states import Category, ModelState, RequestState
from treadle.scheduler.finishing import CycleLedger
from treadle.scheduler.quarantine import Quarantine
from treadle.scheduler.replay import RecoveryWatch, Replayer, replay_queue
from treadle.scheduler.runs import Run, is_over
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# Queue heads by run, by seq_id.
Queues = dict[ModelId, tuple[RequestRecord, ...]]


class QueueSorter:
    """Sorts the queues of one pool's runs, anew for every cycle."""

    def __init__(self, *, pool: PoolName, quarantine: Quarantine, replayer: Replayer, recovery: RecoveryWatch) -> None:
        self._pool = pool
        self._quarantine = quarantine
        self._replayer = replayer
        self._recovery = recovery

    async def sort_out(self, queues: Queues, runs: Mapping[ModelId, Run], ledger: CycleLedger) -> Queues:
        """Queues of which something can run; every op of a run that is over fails with the reason."""
        runnable: Queues = {}
        waiting: set[ModelId] = set()
        for model_id, heads in queues.items():
            run = runs[model_id]
            rows = _refuse_late(run, heads, ledger)
            if not rows:
                continue
            if is_over(run.record.state):
                self._fail_queue(run, rows, ledger)
                continue
            has_a_head = rows[0].seq_id == run.record.next_seq_id
            if run.needs_replay or (run.is_without_state and has_a_head):
                waiting.add(model_id)
            if not await self._replayer.make_ready(run, ledger) or await self._condemn(run, rows, ledger):
                continue
            run.note_refused(rows)
            runnable[model_id] = rows
            # Now, not with the next op: there may never be one, and the line would be read for ever.
            if (newest := run.newest_to_step_over(rows)) is not None:
                ledger.consume(run, newest)
        self._recovery.look(waiting, has_queues=bool(queues))
        return runnable

    def _fail_queue(self, run: Run, rows: tuple[RequestRecord, ...], ledger: CycleLedger) -> None:
        category = Category.SERVER if run.record.state is ModelState.LOST else Category.USER
        message = run.record.state_message or f"run {run.record.model_id} is {run.record.state}; create a new one"
        ledger.set_state(run, run.record.state, message)
        for row in rows:
            if row.state is RequestState.QUEUED:
                ledger.fail(run, row.request_id, row.seq_id, Failure(message=message, category=category))
            else:
                ledger.consume(run, row.seq_id)

    async def _condemn(self, run: Run, rows: Sequence[RequestRecord], ledger: CycleLedger) -> bool:
        """Give up the next op of a run if it is poison; whether it was. Without a committed one no run can go on."""
        if run.log:
            if (verdict := self._quarantine.verdict(run.log[0].request_id)) is None:
                return False
            await self._replayer.lose(run, f"could not be replayed: of request {run.log[0].seq_id}, {verdict}", ledger)
            return True
        head = next((row for row in rows if row.state is RequestState.QUEUED), None)
        if head is None or (verdict := self._quarantine.verdict(head.request_id)) is None:
            return False
        # It was planned, so what was missing in front of it had been given up; that was not committed.
        settled = {row.seq_id for row in rows}
        self._give_up(run, [i for i in range(run.record.next_seq_id, head.seq_id) if i not in settled], ledger)
        ledger.fail(run, head.request_id, head.seq_id, Failure(verdict, Category.SERVER))
        if head.kind is OpKind.FORWARD_BACKWARD:
            run.refused_passes.add(head.seq_id)
        return True

    def give_up_gaps(self, plan: CyclePlan, runs: Mapping[ModelId, Run], ledger: CycleLedger) -> None:
        """What the plan stepped over never came."""
        for gap in plan.gaps:
            self._give_up(runs[gap.model_id], gap.seq_ids, ledger)

    def _give_up(self, run: Run, seq_ids: Sequence[int], ledger: CycleLedger) -> None:
        """Ids that never came become FAILED rows, and the line moves on."""
        if not seq_ids:
            return
        first, last = seq_ids[0], seq_ids[-1]
        log.warning("gap given up", model_id=run.record.model_id, first=first, last=last, num_missing=len(seq_ids))
        for seq_id in seq_ids:
            ledger.never_received.append(_never_received(run, seq_id, self._pool))
            ledger.consume(run, seq_id)
        # Their rows say that they were passes; the next step reports them, whoever reads them.
        run.refused_passes.update(seq_ids)


def _refuse_late(run: Run, rows: tuple[RequestRecord, ...], ledger: CycleLedger) -> tuple[RequestRecord, ...]:
    """The rows whose turn is still to come. Others come again after their first row was swept: they never run twice."""
    late = [row for row in rows if row.seq_id < run.record.next_seq_id]
    for row in late:
        if row.state is RequestState.QUEUED:
            message = f"request {row.seq_id} of run {run.record.model_id} was over long ago; its result is not kept"
            ledger.refuse(row.request_id, Failure(message, Category.USER))
        else:
            ledger.consume(run, row.seq_id)
    return rows[len(late) :]


def model_queue(run: Run, rows: tuple[RequestRecord, ...], now: float) -> ModelQueue:
    """A run's line as planning sees it: the log while something of it is to be replayed, then what is queued."""
    record = run.record
    if run.needs_replay:
        return replay_queue(run)
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
                num_quanta_done=run.num_quanta_done(row.request_id),
                queued_s=max(0.0, now - row.created_at),
            )
            for row in rows
            if row.state is RequestState.QUEUED
        ),
        settled_seq_ids=frozenset(row.seq_id for row in rows if row.state is not RequestState.QUEUED),
    )


def is_something_left(queues: Queues, ledger: CycleLedger) -> bool:
    """False when all that was read is over and there was no more to read: the next read can wait for an event."""
    num_rows = sum(len(rows) for rows in queues.values())
    is_cut = num_rows >= MAX_HEAD_ROWS or any(len(rows) >= MAX_HEADS_PER_MODEL for rows in queues.values())
    return is_cut or len(ledger.finished) < num_rows


def is_settled(rows: tuple[RequestRecord, ...]) -> bool:
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
