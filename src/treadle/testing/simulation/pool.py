"""A pool in virtual time: its rows, one loop per worker, where tenants live, and what dies.

Invariant: every request that was acknowledged is in its run's line until it is committed, whatever dies meanwhile.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from treadle.domain.ids import TenantId, op_request_id
from treadle.domain.ops import OpKind
from treadle.domain.records import RequestRecord
from treadle.domain.states import RequestState
from treadle.testing.simulation.costs import Costs
from treadle.testing.simulation.loop import Clock, Loop
from treadle.testing.simulation.placement import choose_worker
from treadle.testing.simulation.rows import POOL, Blobs, Row, RunRow
from treadle.testing.simulation.scenario import Faults
from treadle.testing.simulation.tally import Tally
from treadle.testing.simulation.timeline import Timeline


class SimPool:
    """One base model on `num_workers` workers under one leader."""

    def __init__(
        self,
        *,
        num_workers: int,
        timeline: Timeline,
        clock: Clock,
        costs: Costs,
        weights: Mapping[TenantId, float],
        groups: Mapping[TenantId, str],
        tally: Tally,
    ) -> None:
        self._timeline = timeline
        self._costs = costs
        self._tally = tally
        self._groups = groups
        self._num_rows = 0
        self._home: dict[TenantId, Loop] = {}
        self._num_tenants: Counter[int] = Counter()
        self._queued_tokens: Counter[int] = Counter()
        blobs = Blobs()
        self.loops = [
            Loop(
                index=index,
                timeline=timeline,
                clock=clock,
                costs=costs,
                blobs=blobs,
                weights=weights,
                tally=tally,
                on_committed=self._committed,
            )
            for index in range(num_workers)
        ]
        self._alive = set(range(num_workers))
        self._has_ceased = False

    def submit(self, run: RunRow, kind: OpKind, quantum_tokens: Sequence[int]) -> Row:
        """A request becomes a row; from here on it may not be lost."""
        loop = self._home_of(run.tenant_id)
        record = RequestRecord(
            request_id=op_request_id(run.model_id, run.num_submitted),
            tenant_id=run.tenant_id,
            pool=POOL,
            kind=kind,
            state=RequestState.QUEUED,
            seq_id=run.num_submitted,
            num_tokens=sum(quantum_tokens),
            created_at=self._timeline.now,
            quantum_tokens=tuple(quantum_tokens),
            model_id=run.model_id,
        )
        row = Row(self._num_rows, record, run, created_cycle=loop.num_cycles)
        self._num_rows += 1
        run.num_submitted += 1
        run.line.append(row)
        self._queued_tokens[loop.index] += record.num_tokens
        loop.queued(row)
        return row

    def cycles_since(self, row: Row) -> int:
        """Cycles that the row's worker has run since the row was written, the one that ends now included."""
        return self._home[row.run.tenant_id].num_cycles - row.created_cycle

    def kill_worker(self, index: int) -> None:
        """SIGKILL; another one comes up in its place."""
        if index in self._alive:
            self.loops[index].die(back_after_s=self._costs.respawn_s, is_leader=False)

    def lose_workers(self, indexes: Sequence[int]) -> None:
        """These are gone for good; their tenants move to the others."""
        self._alive -= set(indexes)
        for index in indexes:
            self.loops[index].die(back_after_s=None, is_leader=False)
            runs, suspects = self.loops[index].hand_over()
            for tenant_id in [t for t, loop in self._home.items() if loop.index == index]:
                del self._home[tenant_id]
            self._queued_tokens.pop(index, None)
            by_tenant: dict[TenantId, list[RunRow]] = {}
            for run in runs:
                by_tenant.setdefault(run.tenant_id, []).append(run)
            for tenant_id, its_runs in by_tenant.items():
                loop = self._home_of(tenant_id)
                for run in its_runs:
                    self._queued_tokens[loop.index] += sum(row.record.num_tokens for row in run.line)
                    for row in run.line:
                        row.created_cycle = loop.num_cycles
                loop.take_over(its_runs, suspects)

    def kill_leader(self) -> None:
        """The next leader adopts nothing: all workers are fenced and drop what they hold."""
        for index in sorted(self._alive):
            self.loops[index].die(back_after_s=self._costs.takeover_s, is_leader=True)

    def schedule(self, faults: Faults, rng: random.Random) -> None:
        """Have things die, from now on."""

        def repeat(gap_s: float, kill: Callable[[], None]) -> None:
            def strike() -> None:
                if self._has_ceased:
                    return
                kill()
                self._timeline.after(rng.expovariate(1 / gap_s), strike)

            self._timeline.after(rng.expovariate(1 / gap_s), strike)

        if faults.worker_gap_s:
            repeat(faults.worker_gap_s, lambda: self.kill_worker(rng.randrange(len(self.loops))))
        if faults.leader_gap_s:
            repeat(faults.leader_gap_s, self.kill_leader)
        if faults.lost_workers:
            assert faults.lost_workers < len(self.loops), "somebody has to be left"
            self._timeline.after(faults.lost_at_s, lambda: self.lose_workers(range(faults.lost_workers)))

    def cease(self) -> None:
        """Nothing dies from now on."""
        self._has_ceased = True

    def check_all(self) -> None:
        """Everything that must be true between any two events."""
        for loop in self.loops:
            loop.check_all()

    def _home_of(self, tenant_id: TenantId) -> Loop:
        loop = self._home.get(tenant_id)
        if loop is None:
            num_tenants = {index: self._num_tenants[index] for index in sorted(self._alive)}
            loop = self._home[tenant_id] = self.loops[choose_worker(num_tenants, self._queued_tokens)]
            self._num_tenants[loop.index] += 1
        return loop

    def _committed(self, row: Row) -> None:
        self._queued_tokens[self._home[row.run.tenant_id].index] -= row.record.num_tokens
        self._tally.committed(row, self._groups[row.run.tenant_id])
        row.run.on_finished(row)
