"""Checks of an executor whose worker is a process of this machine, whatever starts it."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from treadle.errors import Fenced
from treadle.executor.channel import Channel
from treadle.executor.local import LocalExecutor
from treadle.executor.ray import RayExecutor
from treadle.testing.builders import sample_op
from treadle.testing.driver import PATIENCE_S, Driver
from treadle.testing.executor_contract import LORA, Run, assert_same

# By then a message to a process that does not read lies in its pipe, also on a busy machine.
WRITTEN_S = 0.3


def pid_of(driver: Driver) -> int:
    assert isinstance(driver.executor, LocalExecutor | RayExecutor)
    assert driver.executor.pid is not None
    return driver.executor.pid


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
    assert isinstance(driver.executor, Channel)
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


PROCESS_CHECKS = (check_a_newer_leader_ends_a_cycle_that_is_on_its_way, check_a_long_sample_is_not_silence)
