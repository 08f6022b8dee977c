"""Snapshots beside the cycles: of which run the next one is, what it may cost, and what became of it.

After a commit the run with the largest debt (seconds of its ops behind its newest snapshot) is written if the budget
allows. The worker writes while cycles go on; what is durable waits in `landed` until a commit registers it. One is on
its way at a time: its bytes are the memory that this costs. It knows no plans and writes nothing to the store.
Invariant (R3 of the log): a snapshot is asked for only of a state whose every op is committed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from treadle.domain.ids import ModelId, PoolName
from treadle.domain.limits import MAX_REPLAY_BYTES, MAX_REPLAY_S
from treadle.domain.outcome import SnapshotWritten
from treadle.domain.records import SnapshotRecord
from treadle.domain.states import ModelState
from treadle.errors import TreadleError, WorkerDied
from treadle.executor.base import Executor
from treadle.scheduler.runs import Run, RunBook, snapshot_key
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# Of the worker's time, for snapshots of whatever run is due.
BUDGET_SHARE = 0.02
# Of a run's own time, for the snapshot that keeps its replay within bounds; together below 3 %.
MAX_COST_SHARE = 0.03
# Credit that is not used up: more would be spent in a row, and a client would notice.
MAX_CREDIT_S = 0.5
# Beside the device's time: the file, its flush, its row, and what is deleted for it. Some milliseconds on any machine.
FIXED_COST_S = 0.005
# After one that came to nothing (a full disk, a run that had moved on).
PAUSE_S = 1.0
# Runs that a drain writes together: what is registered stays, should the rest take too long.
RUNS_PER_CALL = 8


class SnapshotBudget:
    """How much snapshots may cost. Pure: seconds in, decisions out.

    What a run's next snapshot costs is what its last one did; a first one's cost is that of the last of any run.
    """

    def __init__(self, *, max_replay_s: float = MAX_REPLAY_S, max_replay_bytes: int = MAX_REPLAY_BYTES) -> None:
        self._max_replay_s = max_replay_s
        self._max_replay_bytes = max_replay_bytes
        self._credit_s = 0.0
        self._cost_s: dict[ModelId, float] = {}
        self._last_cost_s = FIXED_COST_S

    def earn(self, worker_s: float) -> None:
        """The worker computed for so long."""
        self._credit_s = min(MAX_CREDIT_S, self._credit_s + BUDGET_SHARE * worker_s)

    def spend(self, model_id: ModelId, device_s: float) -> None:
        """A snapshot of this run took so long on the device's thread."""
        self._last_cost_s = device_s + FIXED_COST_S
        self._cost_s[model_id] = self._last_cost_s
        # A debt is paid off from what is earned, but no single expensive snapshot rules out the next ones for long.
        self._credit_s = max(-MAX_CREDIT_S, self._credit_s - self._last_cost_s)

    def forget(self, model_id: ModelId) -> None:
        """The run is gone."""
        self._cost_s.pop(model_id, None)

    def is_forced(self, debt_bytes: int) -> bool:
        """Whatever it costs, and even with an open gradient: the log has become too long."""
        return debt_bytes > self._max_replay_bytes

    def allows(self, model_id: ModelId, debt_s: float) -> bool:
        """Whether this run, with this much to do again, may be written now."""
        cost_s = self._cost_s.get(model_id, self._last_cost_s)
        if debt_s <= 0.0:
            return False
        return self._credit_s >= cost_s or (debt_s >= self._max_replay_s and cost_s <= MAX_COST_SHARE * debt_s)


@dataclass(frozen=True, slots=True)
class _Wanted:
    run: Run
    is_forced: bool


class Snapshotter:
    """Takes the snapshots of one pool's runs. `landed`: durable ones that no commit has registered yet."""

    def __init__(
        self, *, pool: PoolName, slot: str, budget: SnapshotBudget, metrics: Metrics, on_landed: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._budget = budget
        self._slot = slot
        self._metrics = metrics
        self._on_landed = on_landed
        self._task: asyncio.Task[None] | None = None
        self._paused_until = 0.0
        self.landed: list[SnapshotRecord] = []

    def earn(self, worker_s: float) -> None:
        """See SnapshotBudget."""
        self._budget.earn(worker_s)

    def forget(self, model_id: ModelId) -> None:
        """The run is gone."""
        self._budget.forget(model_id)

    def consider(self, executor: Executor, resident: Iterable[Run], *, numerics_profile: str) -> None:
        """Have the run that needs it most written, if one may be. Called behind a commit, when all tags are."""
        wanted = self._choose(resident)
        if self._task is not None:
            if not self._task.done():
                return
            ended, self._task = self._task, None
            # What it did not expect is a bug, and shows here, once.
            ended.result()
        if asyncio.get_running_loop().time() < self._paused_until:
            return
        if wanted is None:
            return
        wanted.run.debt.cover()
        self._task = asyncio.create_task(self._take(executor, wanted, numerics_profile), name=f"snapshot {self._pool}")

    def _choose(self, resident: Iterable[Run]) -> _Wanted | None:
        best: _Wanted | None = None
        worst_debt_s = 0.0
        for run in resident:
            debt = run.debt
            worst_debt_s = max(worst_debt_s, debt.seconds)
            is_on_its_way = debt.covered_s > 0.0
            if is_on_its_way or run.part is not None or run.record.state is not ModelState.READY:
                continue
            is_forced = self._budget.is_forced(debt.num_bytes)
            if run.has_open_gradient and not is_forced:
                continue
            rank = (is_forced, debt.seconds)
            if best is None or rank > (best.is_forced, best.run.debt.seconds):
                best = _Wanted(run, is_forced)
        self._metrics.replay_debt_seconds.labels(self._pool, self._slot).set(worst_debt_s)
        if best is None or best.is_forced:
            return best
        return best if self._budget.allows(best.run.record.model_id, best.run.debt.seconds) else None

    async def _take(self, executor: Executor, wanted: _Wanted, numerics_profile: str) -> None:
        run = wanted.run
        model_id = run.record.model_id
        try:
            written = await write_snapshots(
                executor, [run], numerics_profile=numerics_profile, with_open_gradient=wanted.is_forced
            )
        except WorkerDied:
            # The next worker restores from an older one.
            return
        except TreadleError as error:
            log.warning("snapshot not taken", model_id=model_id, reason=error.message)
            written = {}
        if model_id not in written:
            run.debt.uncover()
            self._budget.spend(model_id, 0.0)
            self._paused_until = asyncio.get_running_loop().time() + PAUSE_S
            return
        record, facts = written[model_id]
        self._budget.spend(model_id, facts.compute_s)
        self._metrics.snapshots.labels(self._pool).inc()
        self._metrics.snapshot_seconds.labels(self._pool).observe(facts.compute_s)
        self.landed.append(record)
        self._on_landed()

    def note_registered(self, book: RunBook, committed: Collection[SnapshotRecord]) -> None:
        """Some of these are ours: what they hold need not be run again."""
        registered = [record for record in self.landed if record in committed]
        self.landed = [record for record in self.landed if record not in registered]
        for record in registered:
            if (run := book.known(record.model_id)) is not None:
                run.debt.settle()

    async def settle(self) -> None:
        """Return when nothing is on its way."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


async def write_snapshots(
    executor: Executor, runs: Sequence[Run], *, numerics_profile: str, with_open_gradient: bool
) -> Mapping[ModelId, tuple[SnapshotRecord, SnapshotWritten]]:
    """Have the worker write these runs' states under keys of their own; those that are durable, to be registered."""
    targets = {run.tag: snapshot_key(run.record.model_id, uuid.uuid4().hex) for run in runs if run.tag is not None}
    written = await executor.snapshot(list(targets.items()), with_open_gradient=with_open_gradient)
    return {
        tag.model_id: (
            SnapshotRecord(
                model_id=tag.model_id,
                seq_id=tag.applied_seq,
                blob_key=key,
                num_bytes=written[tag.model_id].num_bytes,
                numerics_profile=numerics_profile,
            ),
            written[tag.model_id],
        )
        for tag, key in targets.items()
        if tag.model_id in written
    }
