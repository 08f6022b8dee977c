"""What snapshots may cost, and of which run the next one is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from treadle.blobs import open_blobs
from treadle.domain.ids import ModelId, PoolName, RequestId, SessionId, TenantId
from treadle.domain.ops import LoraSpec
from treadle.domain.outcome import SnapshotWritten
from treadle.domain.plan import StateTag
from treadle.domain.records import ModelRecord
from treadle.domain.states import ModelState
from treadle.executor.fake import FakeExecutor
from treadle.scheduler.runs import Debt, Run
from treadle.scheduler.snapshots import BUDGET_SHARE, FIXED_COST_S, MAX_COST_SHARE, SnapshotBudget, Snapshotter
from treadle.telemetry.metrics import Metrics

RUN = ModelId("run")
POOL = PoolName("pool")


def run_for(budget: SnapshotBudget, worker_s: float, *, device_s: float, num_runs: int = 1) -> tuple[float, float]:
    """Cycles of 0.1 s in turn over some runs, all taking the snapshots that are allowed: their share, largest debt."""
    debts = {ModelId(f"run {index}"): 0.0 for index in range(num_runs)}
    models = list(debts)
    spent = worst = 0.0
    for cycle in range(int(worker_s / 0.1)):
        budget.earn(0.1)
        debts[models[cycle % num_runs]] += 0.1
        due = max(models, key=lambda model_id: debts[model_id])
        worst = max(worst, debts[due])
        if budget.allows(due, debts[due]):
            budget.spend(due, device_s)
            spent += device_s + FIXED_COST_S
            debts[due] = 0.0
    return spent / worker_s, worst


def test_cheap_snapshots_keep_within_the_budget() -> None:
    share, worst = run_for(SnapshotBudget(), 200.0, device_s=0.005)
    assert share <= BUDGET_SHARE + 0.001
    assert worst <= 1.0


@pytest.mark.parametrize("num_runs", [1, 8])
def test_a_replay_stays_within_its_bound_while_that_costs_less_than_three_percent(num_runs: int) -> None:
    share, worst = run_for(SnapshotBudget(max_replay_s=2.0), 400.0, device_s=0.045, num_runs=num_runs)
    assert share <= MAX_COST_SHARE + 0.002
    assert worst <= 2.2


def test_expensive_snapshots_are_rarer_and_not_dearer() -> None:
    share, worst = run_for(SnapshotBudget(max_replay_s=2.0), 2_000.0, device_s=1.0)
    assert share <= MAX_COST_SHARE + 0.002
    assert worst > 20.0


def test_nothing_to_do_again_is_nothing_to_write() -> None:
    budget = SnapshotBudget()
    budget.earn(100.0)
    assert not budget.allows(RUN, 0.0)
    assert budget.allows(RUN, 0.001)


def test_a_long_log_is_written_whatever_it_costs() -> None:
    budget = SnapshotBudget(max_replay_bytes=100)
    assert not budget.is_forced(100)
    assert budget.is_forced(101)


def test_what_a_snapshot_covers_is_settled_when_it_is_registered() -> None:
    debt = Debt()
    debt.add(1.0, 10)
    debt.cover()
    debt.add(0.5, 5)
    debt.settle()
    assert (debt.seconds, debt.num_bytes) == (0.5, 5)
    debt.cover()
    debt.clear()
    debt.add(0.25, 1)
    debt.settle()
    assert (debt.seconds, debt.num_bytes) == (0.25, 1), "a save came in between: the older snapshot covers nothing more"


class Asked(FakeExecutor):
    """Notes of which runs a snapshot is wanted, and whether with the open gradient; writes all of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(open_blobs(str(folder)))
        self.wanted: list[tuple[ModelId, bool]] = []

    async def snapshot(
        self, targets: Sequence[tuple[StateTag, str]], *, with_open_gradient: bool = False
    ) -> dict[ModelId, SnapshotWritten]:
        self.wanted += [(tag.model_id, with_open_gradient) for tag, _ in targets]
        return {tag.model_id: SnapshotWritten(num_bytes=1, compute_s=0.001) for tag, _ in targets}


class Buggy(Asked):
    async def snapshot(
        self, targets: Sequence[tuple[StateTag, str]], *, with_open_gradient: bool = False
    ) -> dict[ModelId, SnapshotWritten]:
        await super().snapshot(targets, with_open_gradient=with_open_gradient)
        raise RuntimeError("a bug")


def indebted(name: str, seconds: float) -> Run:
    """A run that the worker holds behind request 4, with so much to do again."""
    model_id = ModelId(name)
    record = ModelRecord(
        model_id=model_id,
        session_id=SessionId("session"),
        tenant_id=TenantId("tenant"),
        pool=POOL,
        base_model=POOL,
        revision="",
        lora=LoraSpec(rank=8, seed=0),
        state=ModelState.READY,
        next_seq_id=5,
        created_at=0.0,
        last_request_at=0.0,
        incarnation=1,
        changed_seq=4,
    )
    run = Run(record, tag=StateTag(model_id, incarnation=1, applied_seq=4))
    run.debt.add(seconds, 1)
    return run


async def chosen(folder: Path, *runs: Run, max_replay_bytes: int = 1_000) -> tuple[ModelId, bool] | None:
    """The run of which a snapshot is taken, with everything paid for."""
    budget = SnapshotBudget(max_replay_bytes=max_replay_bytes)
    budget.earn(1_000.0)
    landed = asyncio.Event()
    snapshotter = Snapshotter(
        pool=POOL, slot="0", budget=budget, metrics=Metrics(CollectorRegistry()), on_landed=landed.set
    )
    executor = Asked(folder)
    snapshotter.consider(executor, runs, numerics_profile="")
    await snapshotter.settle()
    assert landed.is_set() == bool(executor.wanted) == bool(snapshotter.landed)
    assert all(record.seq_id == 4 for record in snapshotter.landed)
    return executor.wanted[0] if executor.wanted else None


async def test_the_run_with_the_largest_debt_is_written(tmp_path: Path) -> None:
    assert await chosen(tmp_path, indebted("a", 1.0), indebted("b", 2.0)) == ("b", False)
    assert await chosen(tmp_path) is None


async def test_runs_between_two_steps_parts_or_snapshots_are_left_alone(tmp_path: Path) -> None:
    open_run, split, on_its_way, over = (indebted(name, 9.0) for name in ("open", "split", "on its way", "over"))
    open_run.has_open_gradient = True
    split.part = (RequestId("split:5"), 1)
    on_its_way.debt.cover()
    over.record = replace(over.record, state=ModelState.UNLOADED)
    others = (open_run, split, on_its_way, over)
    assert await chosen(tmp_path, *others) is None
    assert await chosen(tmp_path, *others, indebted("a", 0.1)) == ("a", False)


async def test_a_log_that_is_too_long_is_written_first_and_with_its_gradient(tmp_path: Path) -> None:
    long = indebted("long", 0.1)
    long.has_open_gradient = True
    long.debt.num_bytes = 1_001
    assert await chosen(tmp_path, indebted("a", 5.0), long) == ("long", True)


async def test_what_breaks_one_snapshot_shows_once_and_breaks_no_other(tmp_path: Path) -> None:
    budget = SnapshotBudget()
    budget.earn(1_000.0)
    snapshotter = Snapshotter(
        pool=POOL, slot="0", budget=budget, metrics=Metrics(CollectorRegistry()), on_landed=lambda: None
    )
    executor = Buggy(tmp_path)
    runs = [indebted("a", 1.0), indebted("b", 0.9)]
    snapshotter.consider(executor, runs, numerics_profile="")
    await snapshotter.settle()
    with pytest.raises(RuntimeError, match="a bug"):
        snapshotter.consider(executor, runs, numerics_profile="")
    snapshotter.consider(executor, runs, numerics_profile="")
    await snapshotter.settle()
    assert [model_id for model_id, _ in executor.wanted] == ["a", "b"]
