"""The Ray executor on a cluster of its own: the contract, and what ends there: actors, Ray's processes, the server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from process_checks import PROCESS_CHECKS, pid_of

from treadle.config import ExecutorSettings
from treadle.errors import ConfigError, WorkerDied
from treadle.executor.local import SPARE_AFTER_S, LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.executor.ray import RayCluster, RayExecutor
from treadle.testing.driver import Floats, started
from treadle.testing.executor_contract import CHECKS, Run, assert_same
from treadle.testing.recovery_contract import RECOVERY_CHECKS

# Longer than Ray takes to start on busy cores, or to notice an end.
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A cluster of this machine; it starts with its first worker."""
    cluster = RayCluster(ExecutorSettings(kind="ray"))
    yield cluster
    asyncio.run(cluster.stop())


async def logprobs_of_a_run(executor: LocalExecutor | RayExecutor) -> Floats:
    async with started(executor) as driver:
        return await (await Run(driver).trained()).logprobs()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_ray_contract(config: WorkerConfig, cluster: RayCluster) -> None:
    failed = []
    async with started(RayExecutor(config, cluster=cluster)) as driver:
        for check in (*CHECKS, *RECOVERY_CHECKS, *PROCESS_CHECKS):
            try:
                await check(driver)
            except (AssertionError, TimeoutError) as error:
                failed.append(f"{check.__name__}: {error!r}")
        assert not driver.deaths
    assert not failed


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_killed_actor_is_a_death_and_the_next_one_gives_the_same_numbers(
    config: WorkerConfig, cluster: RayCluster
) -> None:
    expected = await logprobs_of_a_run(LocalExecutor(config))
    async with started(RayExecutor(config, cluster=cluster)) as driver:
        run = await Run(driver).trained()
        assert_same(await run.logprobs(), expected)
        await asyncio.sleep(SPARE_AFTER_S + 1)
        # A stopped process cannot answer, so the cycle is certainly in flight when the kill arrives.
        os.kill(pid_of(driver), signal.SIGSTOP)
        cycle = asyncio.create_task(driver.run(run.backward()))
        await asyncio.sleep(0)
        os.kill(pid_of(driver), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            await cycle
        with pytest.raises(WorkerDied):
            driver.executor.submit_samples([])
        assert len(driver.deaths) == 1
    promoted = RayExecutor(config, cluster=cluster)
    assert_same(await logprobs_of_a_run(promoted), expected)
    assert promoted.started is not None
    assert promoted.started.was_spare


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_hung_actor_is_killed(config: WorkerConfig, cluster: RayCluster) -> None:
    async with started(RayExecutor(config, cluster=cluster, hang_after_s=1.0)) as driver:
        run, pid = await Run(driver).trained(), pid_of(driver)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerDied, match="hung: no progress for"):
            await driver.run(run.backward())
        assert len(driver.deaths) == 1
        assert_gone([pid])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["gcs_server", "raylet", "driver"])
async def test_the_end_of_ray_is_the_death_of_workers_and_nothing_else(
    config: WorkerConfig, cluster: RayCluster, victim: str
) -> None:
    async with started(RayExecutor(config, cluster=cluster)) as driver:
        run, pid = await Run(driver).trained(), pid_of(driver)
        expected, processes = await run.logprobs(), processes_of(cluster)
        os.kill(cluster.pid or 0 if victim == "driver" else processes[victim], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(WorkerDied):
                await driver.run(run.backward())
        assert len(driver.deaths) == 1
    assert_same(await logprobs_of_a_run(RayExecutor(config, cluster=cluster)), expected)
    assert_gone([pid, *processes.values()])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_outlives_a_killed_server(config: WorkerConfig, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py"), config.source, config.blobs_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(word) for word in server.stdout.readline().split()]
        assert len(pids) > 3, "the Ray process, its cluster's and the actor"
        server.kill()
    assert_gone(pids)


SERVER = """
import asyncio, sys, psutil
from treadle.config import ExecutorSettings
from treadle.executor.messages import WorkerConfig
from treadle.executor.ray import RayCluster, RayExecutor
from treadle.testing.driver import started

async def serve():
    cluster = RayCluster(ExecutorSettings(kind="ray"))
    config = WorkerConfig("treadle/tiny", sys.argv[1], None, "cpu", "float32", 1, sys.argv[2], 16, 0)
    async with started(RayExecutor(config, cluster=cluster)):
        print(*(one.pid for one in psutil.Process().children(recursive=True)), flush=True)
        await asyncio.Event().wait()

asyncio.run(serve())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_more_than_the_machine_has_is_refused(config: WorkerConfig) -> None:
    cluster = RayCluster(ExecutorSettings(kind="ray", num_cpus=10_000))
    try:
        with pytest.raises(ConfigError, match="need 10000 CPU together, and this machine's Ray cluster has"):
            await RayExecutor(config, cluster=cluster).start(on_samples=lambda _: None, on_death=lambda _: None)
    finally:
        await cluster.stop()


@pytest.mark.slow
async def test_a_head_that_is_away_is_said_and_tried_again(config: WorkerConfig) -> None:
    """By whoever replaces workers: no configuration is wrong while a head restarts."""
    cluster = RayCluster(ExecutorSettings(kind="ray", ray_address="127.0.0.1:1"))
    try:
        for _ in range(2):
            executor = RayExecutor(config, cluster=cluster)
            with pytest.raises(WorkerDied, match=r"Ray cluster at 127\.0\.0\.1:1 cannot be used"):
                await executor.start(on_samples=lambda _: None, on_death=lambda _: None)
            await executor.stop()
    finally:
        await cluster.stop()


@pytest.mark.parametrize(
    ("device", "num_gpus", "reason"),
    [("cuda", 0.0, "reserves none"), ("cpu", 0.5, "one of them must change"), ("cuda:1", 1.0, "Ray chooses the GPU")],
)
def test_a_device_that_is_not_reserved_is_refused(
    config: WorkerConfig, device: str, num_gpus: float, reason: str
) -> None:
    cluster = RayCluster(ExecutorSettings(kind="ray", num_gpus=num_gpus))
    with pytest.raises(ConfigError, match=reason):
        RayExecutor(replace(config, device=device), cluster=cluster)


def processes_of(cluster: RayCluster) -> dict[str, int]:
    """The processes of a cluster of our own, by name."""
    assert cluster.pid is not None
    children = psutil.Process(cluster.pid).children(recursive=True)
    return {one.name(): one.pid for one in children}


def assert_gone(pids: list[int]) -> None:
    """Within a while."""
    deadline = time.monotonic() + PATIENCE_S
    while any(is_alive(pid) for pid in pids):
        left = [psutil.Process(pid).cmdline() for pid in pids if is_alive(pid)]
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
