"""The Ray executor on a cluster of several nodes, which is joined: nodes of one machine, lost one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from treadle.config import ExecutorSettings
from treadle.errors import WorkerDied
from treadle.executor.messages import WorkerConfig
from treadle.executor.ray import RayCluster, RayExecutor
from treadle.testing.driver import Driver, started
from treadle.testing.executor_contract import LORA, Run, assert_same

# Longer than Ray's health checks take.
PATIENCE_S = 90.0
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head that offers nothing."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_lost_node_is_a_death_and_a_worker_waits_for_room(config: WorkerConfig, nodes: Any) -> None:
    """The run goes on from its snapshot on the node that joins later, with the same numbers."""
    cluster = RayCluster(ExecutorSettings(kind="ray", ray_address=nodes.address))
    try:
        first = nodes.add_node(**NODE)
        async with started(RayExecutor(config, cluster=cluster)) as driver:
            run, undisturbed = await Run(driver).trained(), await Run(driver).trained()
            key = await driver.snapshot(run.tag(2))
            restore = driver.restore_item(run.tag(2), LORA, key)
            await driver.run(undisturbed.backward(), undisturbed.step())
            expected = await undisturbed.logprobs()
            await asyncio.to_thread(nodes.remove_node, first, allow_graceful=False)
            # The actor notices the end of its node, or Ray does.
            with pytest.raises(WorkerDied):
                await call_forever(driver)
            assert len(driver.deaths) == 1
        waiting = RayExecutor(config, cluster=cluster)
        adding = asyncio.create_task(add_node_soon(nodes))
        async with started(waiting) as driver:
            await adding
            run.driver = driver
            await driver.run_cycle(run.backward(), run.step(), restores=[restore])
            assert_same(await run.logprobs(), expected)
    finally:
        await cluster.stop()


async def add_node_soon(nodes: Any) -> None:
    await asyncio.sleep(3)
    # In the main thread: Ray's test cluster sets signal handlers, which no other thread may.
    nodes.add_node(**NODE)


async def call_forever(driver: Driver) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await driver.executor.evict([])
