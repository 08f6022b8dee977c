"""Workers that hang or are replaced by a spare: real processes, stopped and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from treadle.domain.ids import RequestId, TenantId
from treadle.domain.outcome import CycleOutcome
from treadle.domain.plan import CycleWork, SampleWork
from treadle.errors import WorkerDied
from treadle.executor.hangs import Silence
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.executor.spare import WORKER_COMMAND, Spare, StartedProcess
from treadle.testing.builders import sample_op
from treadle.testing.driver import PATIENCE_S, Driver, started
from treadle.testing.executor_contract import Run, assert_same

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))
HANG_AFTER_S = 0.6


def pid_of(driver: Driver) -> int:
    assert isinstance(driver.executor, LocalExecutor)
    assert driver.executor.pid is not None
    return driver.executor.pid


async def test_a_hung_worker_is_killed_and_the_spare_takes_over(config: WorkerConfig, spare: Spare) -> None:
    async with started(LocalExecutor(config, spare=spare, spare_after_s=0.0, hang_after_s=2.0)) as driver:
        run, facts = await Run(driver).trained(), driver.facts
        logprobs = await run.logprobs()
        reserve = waiting_in(spare)
        assert pid_of(driver) != reserve.process.pid
        os.kill(pid_of(driver), signal.SIGSTOP)
        with pytest.raises(WorkerDied, match="hung: no progress for 2 s"):
            await driver.run(run.backward())
        assert ["hung" in reason for reason in driver.deaths] == [True]
    async with started(LocalExecutor(config, spare=spare, spare_after_s=0.0)) as driver:
        assert pid_of(driver) == reserve.process.pid
        await asyncio.sleep(0.05)
        assert waiting_in(spare).process.pid != reserve.process.pid
        assert_same(await (await Run(driver).trained()).logprobs(), logprobs)
        assert driver.facts == facts, "the warm-up of a spare changes nothing, the numerics profile included"
        assert not driver.deaths
    last = waiting_in(spare)
    spare.stop()
    assert last.process.poll() is not None
    spare.prepare(WORKER_COMMAND)
    assert spare.take(WORKER_COMMAND) is None, "it was stopped for good"


@pytest.mark.parametrize("work", ["snapshot", "evict", "sample"])
async def test_silence_with_any_work_at_hand_is_a_hang(config: WorkerConfig, work: str) -> None:
    executor = LocalExecutor(config, command=(*SCRIPTED, "silent"), hang_after_s=0.2)
    died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    await executor.start(on_samples=lambda _: None, on_death=died.set_result)
    match work:
        case "snapshot":
            call = asyncio.ensure_future(executor.snapshot([]))
        case "evict":
            call = asyncio.ensure_future(executor.evict([]))
        case _:
            call = asyncio.ensure_future(asyncio.sleep(0))
            executor.submit_samples([SampleWork(RequestId("lost"), TenantId("tenant"), b"")])
    async with asyncio.timeout(PATIENCE_S):
        assert "hung" in await died
    (end,) = await asyncio.gather(call, return_exceptions=True)
    assert work == "sample" or isinstance(end, WorkerDied)
    await executor.stop()


async def test_a_stopped_worker_without_work_is_left_alone(config: WorkerConfig) -> None:
    async with started(LocalExecutor(config, command=(*SCRIPTED, "silent"), hang_after_s=0.1)) as driver:
        pid = pid_of(driver)
        os.kill(pid, signal.SIGSTOP)
        driver.submit(sample_op(), prefix="given up")
        driver.executor.cancel_samples(["given up:0"])  # type: ignore[list-item]
        await asyncio.sleep(0.5)
        assert not driver.deaths
        os.kill(pid, signal.SIGCONT)


async def cycle_of_scripted(config: WorkerConfig, plan: str, *, predicted_s: float = 0.0) -> CycleOutcome:
    async with started(LocalExecutor(config, command=(*SCRIPTED, plan), hang_after_s=HANG_AFTER_S)) as driver:
        return await driver.executor.run_cycle(CycleWork(1, 1, (), predicted_s=predicted_s))


async def test_progress_keeps_a_slow_cycle_alive(config: WorkerConfig) -> None:
    """It takes more than twice what may pass in silence."""
    assert (await cycle_of_scripted(config, "slow")).cycle == 1


async def test_a_cycle_that_was_predicted_to_take_long_may_be_silent_for_long(config: WorkerConfig) -> None:
    assert (await cycle_of_scripted(config, "late", predicted_s=1.0)).cycle == 1
    with pytest.raises(WorkerDied, match="hung"):
        await cycle_of_scripted(config, "late", predicted_s=0.05)


def test_only_time_in_which_the_server_ran_is_silence() -> None:
    silence = Silence(tick_s=1.0)
    for now in (0.0, 1.0, 2.0):
        silence.tick(now, has_work=True)
    assert silence.seconds == 2.0
    silence.tick(3602.0, has_work=True)
    assert silence.seconds == 4.0, "the server was away for an hour"
    silence.tick(3603.0, has_work=False)
    assert silence.seconds == 0.0
    silence.tick(3604.0, has_work=True)
    silence.heard()
    assert silence.seconds == 0.0


@pytest.fixture
def spare() -> Iterator[Spare]:
    spare = Spare()
    yield spare
    spare.stop()


def waiting_in(spare: Spare) -> StartedProcess:
    assert spare._waiting is not None
    return spare._waiting


async def test_a_dead_spare_is_no_spare(config: WorkerConfig, spare: Spare) -> None:
    spare.prepare(WORKER_COMMAND)
    dead = waiting_in(spare)
    spare.prepare(WORKER_COMMAND)
    assert waiting_in(spare) is dead, "one at most"
    dead.process.kill()
    dead.process.wait()
    assert spare.take(WORKER_COMMAND) is None


def test_a_spare_of_another_program_is_left_alone(spare: Spare) -> None:
    spare.prepare((*SCRIPTED, "silent"))
    assert spare.take(WORKER_COMMAND) is None
    taken = spare.take((*SCRIPTED, "silent"))
    assert taken is not None
    taken.kill()


def test_a_spare_ends_with_the_pipe(spare: Spare) -> None:
    """As when its server is killed: nobody is left to tell it."""
    spare.prepare(WORKER_COMMAND)
    waiting = waiting_in(spare)
    waiting.connection.close()
    assert waiting.process.wait(timeout=PATIENCE_S) == 0
