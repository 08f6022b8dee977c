"""Several workers under everything at once: deaths, scaling, drains, restarts, pauses and outages in random order.

Training and samples end as they do on one worker in peace, and no run is ever with two workers (`watched`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
import scheduler_support
import test_several_workers as workers
from scheduler_support import Cluster
from test_several_workers import NUM_TENANTS, expected, run_of, scaled, tenant, train, watched

from treadle.domain.roles import Scale
from treadle.errors import StoreUnavailable, WorkerDied
from treadle.scheduler import committing, cycle_loop, placement, quarantine, sampling_loop, slot, tenancy
from treadle.testing.builders import sample_op

__all__ = ["expected", "watched"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NUM_STEPS = 12
# So that much happens in a second, and no death or end counts as somebody's fault.
QUICK = {
    scheduler_support: {"PATIENCE_S": 100.0},
    workers: {"NUM_STEPS": NUM_STEPS},
    slot: {"RESTART_PAUSES_S": (0.0,)},
    quarantine: {"MAX_DEATHS": 10**6, "MAX_LEADER_ENDS": 10**6},
    sampling_loop: {"MAX_DEATHS": 10**6, "ERROR_PAUSE_S": 0.01},
    cycle_loop: {"ERROR_PAUSE_S": 0.01},
    committing: {"COMMIT_PATIENCE_S": 0.02, "COMMIT_PAUSE_S": 0.005},
    tenancy: {"FORGET_EVERY_S": 0.02},
    placement: {
        "AWAY_S": 0.1,
        "UNEVEN_FOR_S": 0.1,
        "STAY_S": 0.1,
        "WATCH_EVERY_S": 0.02,
        "GATHER_S": 0.05,
        "MIN_GAP": 0.3,
        "MIN_GAIN": 0.1,
        "FORGET_AFTER_S": 0.1,
    },
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in QUICK.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


class Trouble:
    """What happens to a cluster, one thing after another."""

    def __init__(self, cluster: Cluster, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        self._cluster = cluster
        self._rng = rng
        self._is_away = False
        store = cluster.store
        for part, name in (
            (store.cycles, "finish"),
            (store.cycles, "begin"),
            (store.cycles, "finish_samples"),
            (store.requests, "heads"),
            (store.requests, "queued_samples"),
            (store.models, "get"),
        ):
            monkeypatch.setattr(part, name, self._unreliable(getattr(part, name)))

    def _unreliable(self, real: Any) -> Any:
        """Fails now and then in an outage: before it did anything, or behind it."""

        async def call(*args: Any, **kwargs: Any) -> Any:
            dice = self._rng.random()
            if self._is_away and dice < 0.3:
                raise StoreUnavailable("the database is away")
            result = await real(*args, **kwargs)
            if self._is_away and dice < 0.5:
                raise StoreUnavailable("the database went away")
            return result

        return call

    async def strike(self) -> None:
        things = [self._scale, self._die, self._restart, self._drain, self._pause, self._outage]
        await self._rng.choices(things, [8, 10, 1, 2, 2, 3])[0]()

    def _any_scale(self) -> Scale:
        return Scale(self._rng.randint(1, 4), self._rng.randint(0, 2))

    async def _scale(self) -> None:
        self._cluster.runner.set_scale(self._any_scale())

    async def _die(self) -> None:
        alive = [one for one in self._cluster.executors if one._end_reason is None and one._on_death is not None]
        for executor in self._rng.sample(alive, min(len(alive), self._rng.choice((1, 1, 2, 9)))):
            executor.die("killed")

    async def _restart(self) -> None:
        self._cluster.scale = self._any_scale()
        for executor in self._cluster.executors:
            executor.die("killed with its server")
        await self._cluster.restart()

    async def _drain(self) -> None:
        if self._rng.random() < 0.5:
            await self._scale()
        for _ in range(self._rng.randint(0, 3)):
            await asyncio.sleep(0)
        self._cluster.scale = self._any_scale()
        # Where nothing was persisted, it says so.
        with contextlib.suppress(WorkerDied, StoreUnavailable):
            await self._cluster.drain()
        self._cluster.start()

    async def _pause(self) -> None:
        self._cluster.runner.set_paused(True)
        await self._scale()
        await asyncio.sleep(self._rng.random() / 10)
        self._cluster.runner.set_paused(False)

    async def _outage(self) -> None:
        self._is_away = True
        await asyncio.sleep(self._rng.random() / 20)
        self._is_away = False


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_in_whatever_order_every_request_counts_once(
    cluster: Cluster,
    watched: None,
    expected: list[list[bytes]],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(seed)
    async with scaled(cluster, 2):
        trouble = Trouble(cluster, rng, monkeypatch)
        training = asyncio.gather(
            *(train(cluster, index, pause=lambda: rng.random() / 4) for index in range(NUM_TENANTS))
        )

        async def sample() -> None:
            answer = await cluster.result(await cluster.submit_sample(sample_op(1, seed=3)))
            seq_id = 2
            while not training.done():
                ids = [await cluster.submit_sample(sample_op(seq_id + n, seed=3)) for n in range(5)]
                assert [await cluster.result(request_id) for request_id in ids] == [answer] * 5
                seq_id += 5
                await asyncio.sleep(0.01)

        sampling = asyncio.create_task(sample())
        while not training.done():
            await asyncio.sleep(rng.random() * rng.choice((0.01, 0.1)))
            await trouble.strike()
        assert await training == expected
        await sampling
        for index in range(NUM_TENANTS):
            assert await cluster.store.cycles.trained_tokens(tenant(index)) == NUM_STEPS * 16
        assert any([(await cluster.model(run_of(index))).incarnation > 1 for index in range(NUM_TENANTS)])
