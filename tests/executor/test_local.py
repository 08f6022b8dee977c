"""The local executor: the contract against a real worker process, and what a process adds to it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from treadle.errors import ConfigError, Fenced, WorkerDied
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.testing.builders import sample_op
from treadle.testing.driver import PATIENCE_S, Driver, started
from treadle.testing.executor_contract import CHECKS, LORA, Run, assert_same
from treadle.testing.recovery_contract import RECOVERY_CHECKS

# By then a message to a process that does not read lies in its pipe, also on a busy machine.
WRITTEN_S = 0.3


async def check_a_newer_leader_ends_a_cycle_that_is_on_its_way(driver: Driver) -> None:
    run, undisturbed = await Run(driver).trained(), await Run(driver).trained()
    key = await driver.snapshot(run.tag(2))
    restore = driver.restore_item(run.tag(2), LORA, key)
    old = [driver.item(run.backward()), driver.item(run.step())]
    new = [replace(one, starts_from=replace(restore.tag, applied_seq=one.planned.seq_id - 1)) for one in old]
    # Stopped, it finds both cycles when it goes on, so the first has certainly not ended.
    os.kill(pid_of(driver), signal.SIGSTOP)
    older = asyncio.ensure_future(driver.run_items(old))
    await asyncio.sleep(WRITTEN_S)
    driver.token += 1
    newer = asyncio.ensure_future(driver.run_items(new, restores=[restore]))
    await asyncio.sleep(WRITTEN_S)
    os.kill(pid_of(driver), signal.SIGCONT)
    outcome = await newer
    with pytest.raises(Fenced):
        await older
    assert [one.failure for one in outcome.outcomes] == [None, None]
    driver.tags[run.model_id] = outcome.outcomes[-1].tag_after
    await driver.run(undisturbed.backward(), undisturbed.step())
    assert_same(await run.logprobs(), await undisturbed.logprobs())


async def check_a_long_sample_is_not_silence(driver: Driver) -> None:
    assert isinstance(driver.executor, LocalExecutor)
    heard = asyncio.Event()
    silence = driver.executor._silence
    # 30,000 tokens take longer than a second, so the worker speaks before it is through.
    (request_id,) = driver.submit(sample_op(num_samples=16, max_tokens=1_900), prefix=driver.new_key())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(silence, "heard", heard.set)
        async with asyncio.timeout(PATIENCE_S):
            await heard.wait()
    assert request_id not in {outcome.request_id for outcome in driver.sample_outcomes}
    driver.executor.cancel_samples([request_id])


LOCAL_CHECKS = (check_a_newer_leader_ends_a_cycle_that_is_on_its_way, check_a_long_sample_is_not_silence)


def pid_of(driver: Driver) -> int:
    assert isinstance(driver.executor, LocalExecutor)
    assert driver.executor.pid is not None
    return driver.executor.pid


async def test_contract(config: WorkerConfig) -> None:
    """All checks on one process: starting it is what takes time."""
    failed = []
    async with started(LocalExecutor(config)) as driver:
        for check in (*CHECKS, *RECOVERY_CHECKS, *LOCAL_CHECKS):
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
