"""Writing runs' states when something other than the budget wants it: a drain, an operator, an eviction, a move.

It refuses to know who wants it. Invariant: a run is forgotten only behind a registered snapshot of all that is
committed, or is left to a replay of its log, which gives the same state.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from treadle.domain.ids import ModelId, PoolName
from treadle.domain.records import SnapshotRecord
from treadle.executor.base import Executor
from treadle.scheduler.runs import Run, RunBook
from treadle.scheduler.snapshots import RUNS_PER_CALL, Snapshotter, write_snapshots
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


class Persister:
    """Of one worker's runs. register: commit these snapshots, and those that landed before."""

    def __init__(
        self,
        *,
        pool: PoolName,
        snapshotter: Snapshotter,
        register: Callable[[Sequence[SnapshotRecord]], Awaitable[None]],
    ) -> None:
        self._pool = pool
        self._snapshotter = snapshotter
        self._register = register
        self.numerics_profile = ""

    async def settle(self) -> None:
        """Have nothing on its way: what is durable is registered."""
        await self._snapshotter.settle()
        await self._register(())

    async def write_all(self, executor: Executor, book: RunBook) -> None:
        """Write every resident run whose newest snapshot is older than its state, so that a restart needs no replay.

        What cannot be written is replayed from its log instead. Raises WorkerDied.
        """
        await self.settle()
        stale = [run for run in book.resident() if not run.is_covered]
        num_written = await self.write(executor, stale)
        log.info("runs persisted", pool=self._pool, num_runs=num_written)
        if num_written < len(stale):
            log.warning("runs are left to a replay", pool=self._pool, num_runs=len(stale) - num_written)

    async def write(self, executor: Executor, runs: Sequence[Run]) -> int:
        """Write and register the states of these runs, some at a time; how many could be."""
        num_written = 0
        for start in range(0, len(runs), RUNS_PER_CALL):
            written = await write_snapshots(
                executor,
                runs[start : start + RUNS_PER_CALL],
                numerics_profile=self.numerics_profile,
                with_open_gradient=True,
            )
            await self._register([record for record, _ in written.values()])
            num_written += len(written)
        return num_written

    async def write_one(self, executor: Executor, run: Run) -> None:
        """Have a registered snapshot of the run's committed state, if it can be written."""
        await self.settle()
        if not run.is_covered:
            await self.write(executor, [run])

    async def put_away(self, executor: Executor, book: RunBook, model_ids: Collection[ModelId]) -> None:
        """Write those of these runs that the worker holds and forget them, but not one between parts of a pass."""
        known = [run for model_id in model_ids if (run := book.known(model_id)) is not None]
        idle = [run for run in known if run.tag is not None and run.part is None]
        await self.settle()
        await self.write(executor, [run for run in idle if not run.is_covered])
        await self._forget(executor, book, idle)
        log.info("runs put away", pool=self._pool, num_runs=len(idle))

    async def let_go(self, executor: Executor, book: RunBook, runs: Sequence[Run]) -> None:
        """Write and forget these runs whole: another worker is to have them. One that is being replayed is not written.

        Raises WorkerDied, Fenced and StoreUnavailable; nothing is given up before all of it is done.
        """
        await self.settle()
        stale = [run for run in runs if run.tag is not None and not run.is_covered and not run.needs_replay]
        if await self.write(executor, stale) < len(stale):
            log.warning("runs are left to a replay", pool=self._pool, num_runs=len(stale))
        for run in runs:
            self._snapshotter.forget(run.record.model_id)
        await self._forget(executor, book, runs)

    async def _forget(self, executor: Executor, book: RunBook, runs: Sequence[Run]) -> None:
        """Neither the worker nor the book has them any more."""
        model_ids = [run.record.model_id for run in runs]
        held = [run.record.model_id for run in runs if run.tag is not None]
        book.forget(model_ids)
        if held:
            await executor.evict(held)
