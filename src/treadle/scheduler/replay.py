"""From a run that the worker does not hold back to its committed state: restores, the log behind them, and their ends.

Replay is ordinary work: a restore comes in front of a run's ops, and the DONE rows of its log are planned like queued
ones until the worker holds what is committed. What is here decides which snapshot, which rows, what a failed try means
and when a run is given up. It refuses to know how work is planned or run.
Invariants: of one run a cycle holds replayed ops or new ones, never both; a replayed op is never decided again, so a
run that cannot be replayed to its recorded outcomes is LOST and never goes on with other weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, PoolName
from treadle.domain.outcome import CycleOutcome, OpOutcome, RestoreEnd
from treadle.domain.plan import ModelQueue, QueuedOp, RestoreItem
from treadle.domain.records import LeaseRecord, SnapshotRecord
from treadle.domain.states import ModelState
from treadle.scheduler.finishing import CycleLedger
from treadle.scheduler.runs import Run
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# A committed op that so often did not end as it did before is not going to.
MAX_BAD_REPLAYS = 3
# Before a run is tried again: at once, then after this, then twice as long each time, up to the last.
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 30.0


@dataclass(slots=True)
class _Tries:
    """What went wrong with one run since something of it last went right."""

    num_failed: int = 0
    num_bad_replays: int = 0
    paused_until: float = 0.0


class Replayer:
    """The restores and replays of one pool's runs. It outlives its workers, so that failed tries are counted."""

    def __init__(self, *, pool: PoolName, store: Store, blobs: BlobStore, lease: LeaseRecord, metrics: Metrics) -> None:
        self._pool = pool
        self._store = store
        self._blobs = blobs
        self._lease = lease
        self._metrics = metrics
        self._tries: dict[ModelId, _Tries] = {}
        self._unreadable: set[BlobKey] = set()

    async def make_ready(self, run: Run, ledger: CycleLedger) -> bool:
        """Read what planning needs of the run. False: nothing of it can run now, for it pauses or was just lost."""
        if self.paused_s(run.record.model_id) > 0.0:
            return False
        if not (run.is_without_state or run.needs_replay):
            run.log = ()
            return True
        if not run.snapshots:
            await self.lose(run, "could not be read back from its snapshots", ledger)
            return False
        if run.tag is None and not run.knows_refused:
            run.refused_passes = await self._store.requests.failed_passes_since_step(run.record.model_id)
            run.knows_refused = True
        if run.needs_replay and not await self._read_log(run):
            await self.lose(run, f"could not be replayed: its log ends behind request {run.position}", ledger)
            return False
        return True

    async def _read_log(self, run: Run) -> bool:
        """Have the next rows to replay in `run.log`; whether there are any, as there must be."""
        run.log = tuple(row for row in run.log if row.seq_id > run.position)
        if not run.log:
            record = run.record
            run.log = tuple(
                await self._store.requests.log(record.model_id, after=run.position, before=record.next_seq_id)
            )
        return bool(run.log)

    async def book_restores(
        self,
        outcome: CycleOutcome,
        restores: Mapping[ModelId, RestoreItem],
        runs: Mapping[ModelId, Run],
        ledger: CycleLedger,
    ) -> set[ModelId]:
        """Book how the cycle's restores ended; the runs whose state is not there."""
        assert {end.model_id for end in outcome.restores} == restores.keys(), "one end per restore"
        broken: set[ModelId] = set()
        for end in outcome.restores:
            run = runs[end.model_id]
            match end.end:
                case RestoreEnd.DONE:
                    ledger.restored(run, restores[end.model_id].tag.incarnation)
                    self._note_restored(run, ledger.numerics_profile)
                    continue
                case RestoreEnd.UNREADABLE:
                    await self._fall_back(run, end.message, ledger)
                case RestoreEnd.FAILED:
                    self.try_again(run, f"its restore failed: {end.message}")
            broken.add(end.model_id)
        return broken

    def _note_restored(self, run: Run, numerics_profile: str) -> None:
        snapshot = run.snapshots[0]
        self._metrics.restores.labels(self._pool).inc()
        log.info(
            "run restored",
            pool=self._pool,
            model_id=run.record.model_id,
            snapshot_seq=snapshot.seq_id,
            replay_to_seq=run.record.changed_seq,
            ops_to_replay=len(run.log),
        )
        if run.needs_replay and snapshot.numerics_profile not in ("", numerics_profile):
            log.warning(
                "replay is not bit-exact: it runs under another numerics profile",
                model_id=run.record.model_id,
                snapshot_profile=snapshot.numerics_profile,
                worker_profile=numerics_profile,
            )

    async def _fall_back(self, run: Run, reason: str, ledger: CycleLedger) -> None:
        """Forget the newest snapshot, which will never do, and use the one before it, if there is one that can serve.

        The store gives out none in front of a load: what came behind that would be missing from the log.
        """
        model_id, snapshot = run.record.model_id, run.snapshots[0]
        log.error("snapshot unreadable", model_id=model_id, seq_id=snapshot.seq_id, reason=reason)
        self._note_unreadable(snapshot)
        registered = await self._store.snapshots.newest(model_id)
        others = tuple(known for known in registered if known.seq_id != snapshot.seq_id)
        if others:
            await self._store.snapshots.drop(self._lease, model_id, snapshot.seq_id)
            run.snapshots = others
        else:
            # Its row stays: an operator may find the file.
            await self.lose(run, "could not be read back from its snapshot", ledger)

    def _note_unreadable(self, snapshot: SnapshotRecord) -> None:
        if snapshot.blob_key is not None:
            self._unreadable.add(snapshot.blob_key)

    def try_again(self, run: Run, reason: str) -> None:
        """The worker does not hold the run's state: nothing is booked, and it is restored after a pause that grows."""
        tries = self._tries.setdefault(run.record.model_id, _Tries())
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (tries.num_failed - 1)) if tries.num_failed else 0.0
        tries.num_failed += 1
        tries.paused_until = asyncio.get_running_loop().time() + pause_s
        log.warning("run is restored again", model_id=run.record.model_id, reason=reason, pause_s=pause_s)

    async def book_bad_replay(self, run: Run, outcome: OpOutcome, ledger: CycleLedger) -> None:
        """A committed op failed when it ran again: try from the snapshot, a few times."""
        assert outcome.failure is not None
        reason = f"request {outcome.seq_id} succeeded before and failed when it was run again"
        self.try_again(run, f"{reason}: {outcome.failure.message}")
        tries = self._tries[run.record.model_id]
        tries.num_bad_replays += 1
        if tries.num_bad_replays >= MAX_BAD_REPLAYS:
            await self.lose(run, f"could not be replayed: {reason} ({outcome.failure.message})", ledger)

    def note_progress(self, run: Run) -> None:
        """An op of the run ended as it should."""
        tries = self._tries.get(run.record.model_id)
        if tries is None:
            return
        if run.needs_replay:
            # What breaks later in the log must find its count.
            tries.num_failed, tries.paused_until = 0, 0.0
        else:
            del self._tries[run.record.model_id]

    def paused_s(self, model_id: ModelId) -> float:
        """Seconds until the run may be tried again."""
        tries = self._tries.get(model_id)
        return 0.0 if tries is None else max(0.0, tries.paused_until - asyncio.get_running_loop().time())

    def shortest_pause_s(self, default_s: float) -> float:
        """Seconds until the first of the paused runs may be tried again, at most the default."""
        now = asyncio.get_running_loop().time()
        return min((t.paused_until - now for t in self._tries.values() if t.paused_until > now), default=default_s)

    async def lose(self, run: Run, why: str, ledger: CycleLedger) -> None:
        """The run's state cannot be had back: it says so, and names the newest checkpoint that can be loaded."""
        model_id = run.record.model_id
        message = f"the training state of run {model_id} {why}; {await self._hint(model_id)}"
        log.error("run lost", model_id=model_id, reason=message, changed_seq=run.record.changed_seq)
        ledger.set_state(run, ModelState.LOST, message)
        self._tries.pop(model_id, None)

    async def _hint(self, model_id: ModelId) -> str:
        for checkpoint in await self._store.checkpoints.of_model(model_id):
            is_loadable = checkpoint.kind is CheckpointKind.TRAINING and checkpoint.blob_key not in self._unreadable
            if is_loadable and await asyncio.to_thread(self._blobs.exists, checkpoint.blob_key):
                return f"its newest checkpoint is {checkpoint.tinker_path}: create a new training client from it"
        return "it has no checkpoint"


def replay_queue(run: Run) -> ModelQueue:
    """The run's log as planning sees it. Numbers between its rows are settled: they need no replay."""
    assert run.needs_replay
    assert run.log, "a log that was read"
    next_seq_id = run.position + 1
    replayed = {row.seq_id for row in run.log}
    return ModelQueue(
        model_id=run.record.model_id,
        tenant_id=run.record.tenant_id,
        next_seq_id=next_seq_id,
        ops=tuple(
            QueuedOp(
                request_id=row.request_id,
                seq_id=row.seq_id,
                kind=row.kind,
                quantum_tokens=row.quantum_tokens,
                num_quanta_done=run.num_quanta_done(row.request_id),
            )
            for row in run.log
        ),
        settled_seq_ids=frozenset(range(next_seq_id, run.log[-1].seq_id)) - replayed,
    )


class RecoveryWatch:
    """Tells an operator when a recovery begins and when every run that waited for it goes on."""

    def __init__(self, *, pool: PoolName, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._reason = ""
        self._began_at: float | None = None
        self._is_told = False
        self._is_waiting = False

    def begin(self, reason: str) -> None:
        """A worker ended, or a leader begins: what runs now waits for is a recovery. One that is on goes on."""
        self._reason = reason
        if self._began_at is None:
            self._began_at = asyncio.get_running_loop().time()

    @property
    def is_on(self) -> bool:
        """Runs wait for their state: nobody should wait for company."""
        return self._is_waiting

    def look(self, waiting: Collection[ModelId], *, has_queues: bool) -> None:
        """Called every round. waiting: runs with ops that need a restore or a replay first."""
        self._is_waiting = bool(waiting)
        if self._began_at is None or not has_queues:
            return
        if waiting and not self._is_told:
            self._is_told = True
            log.info("recovery started", pool=self._pool, reason=self._reason, runs=len(waiting))
        if waiting:
            return
        if self._is_told:
            seconds = asyncio.get_running_loop().time() - self._began_at
            self._metrics.recovery_seconds.labels(self._pool).observe(seconds)
            log.info("recovery finished", pool=self._pool, seconds=round(seconds, 3))
        self._began_at, self._is_told = None, False
