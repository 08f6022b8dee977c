"""How soon a dead worker is replaced: at once when it had worked, after a pause that grows when it only ever starts."""

from __future__ import annotations

import asyncio

import pytest
from scheduler_support import Cluster

from treadle.domain.ids import ModelId
from treadle.domain.outcome import PoolFacts
from treadle.errors import WorkerDied
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.fake import FakeExecutor
from treadle.scheduler import slot
from treadle.testing.builders import pass_op

RUN = ModelId("session:train:0")


async def test_workers_that_ran_a_cycle_are_replaced_at_once_however_often_they_die(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (0.0, 1000.0))
    await cluster.result(await cluster.create(RUN))
    for seq_id in range(1, 4):
        await cluster.run(pass_op(seq_id, model_id=RUN))
        cluster.worker.die("killed")
    await cluster.run(pass_op(4, model_id=RUN))


async def test_workers_that_die_of_starting_are_given_pauses(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    num_started = 0
    pauses: list[float] = []
    has_paused = asyncio.Event()

    class StillBorn(FakeExecutor):
        async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
            nonlocal num_started
            num_started += 1
            raise WorkerDied("killed while loading")

    async def pause(_: slot.Slot, pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            has_paused.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(slot.Slot, "_pause", pause)
    cluster.new_worker = StillBorn
    await cluster.restart()
    await has_paused.wait()
    assert num_started == 3
    assert pauses == list(slot.RESTART_PAUSES_S[:3])
