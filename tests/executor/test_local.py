"""The local executor: the contract against a real worker process, and what a process adds to it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from process_checks import PROCESS_CHECKS

from treadle.errors import ConfigError, WorkerDied
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.testing.builders import sample_op
from treadle.testing.driver import started
from treadle.testing.executor_contract import CHECKS, Run
from treadle.testing.recovery_contract import RECOVERY_CHECKS


async def test_contract(config: WorkerConfig) -> None:
    """All checks on one process: starting it is what takes time."""
    failed = []
    async with started(LocalExecutor(config)) as driver:
        for check in (*CHECKS, *RECOVERY_CHECKS, *PROCESS_CHECKS):
            try:
                await check(driver)
            except (AssertionError, TimeoutError) as error:
                failed.append(f"{check.__name__}: {error!r}")
        assert not driver.deaths
    assert not failed


async def test_a_killed_process_is_reported_once_and_fails_what_waits(config: WorkerConfig) -> None:
    async with started(LocalExecutor(config)) as driver:
        executor = driver.executor
        assert isinstance(executor, LocalExecutor)
        assert executor.pid is not None
        run = await Run(driver).trained()
        # A stopped process cannot answer, so the cycle is certainly in flight when the kill arrives.
        os.kill(executor.pid, signal.SIGSTOP)
        cycle = asyncio.create_task(driver.run(run.backward()))
        await asyncio.sleep(0)
        os.kill(executor.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            await cycle
        with pytest.raises(WorkerDied):
            executor.submit_samples([])
        with pytest.raises(WorkerDied):
            await executor.snapshot([])
        assert len(driver.deaths) == 1


async def test_stop_is_quiet_and_idempotent(config: WorkerConfig) -> None:
    async with started(LocalExecutor(config)) as driver:
        driver.submit(sample_op(max_tokens=500), prefix="unfinished")
        await driver.executor.stop()
        await driver.executor.stop()
        assert driver.deaths == []


async def test_a_worker_that_nobody_waits_for_any_more_is_killed_while_it_loads(config: WorkerConfig) -> None:
    """A drain during the load: the wait is cancelled, then the worker is stopped."""
    executor = LocalExecutor(config)
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
    starting = asyncio.create_task(executor.start(on_samples=lambda _: None, on_death=lambda _: None))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    threads_before_stop = threading.enumerate()
    await executor.stop()
    assert executor._process.process.returncode == -signal.SIGKILL
    # Its end is told to the loop by a thread; the thread is gone once it has done so.
    receiving = next(thread for thread in threads_before_stop if thread.name == "treadle-worker-receive")
    await asyncio.to_thread(receiving.join)
    await asyncio.sleep(0)
    assert unhandled == []


async def test_a_model_that_cannot_load_is_a_config_error(config: WorkerConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    executor = LocalExecutor(replace(config, source=str(tmp_path)))
    with pytest.raises(ConfigError, match="GPT2"):
        await executor.start(on_samples=lambda _: None, on_death=lambda _: None)
    await executor.stop()
