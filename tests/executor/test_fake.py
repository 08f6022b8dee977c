"""The fake executor keeps the executor's contract; what is special to it is tested below."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from treadle.blobs import BlobStore
from treadle.blobs.local import LocalBlobs
from treadle.errors import WorkerDied
from treadle.executor.fake import DEFAULT_FACTS, FakeExecutor
from treadle.testing.builders import sample_op
from treadle.testing.driver import Driver, read_sample, started
from treadle.testing.executor_contract import CHECKS, Check, Run


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return LocalBlobs(tmp_path)


@pytest.fixture
async def driver(blobs: BlobStore) -> AsyncIterator[Driver]:
    async with started(FakeExecutor(blobs)) as driver:
        yield driver


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check: Check, driver: Driver) -> None:
    await check(driver)


async def test_facts_are_the_callers(blobs: BlobStore) -> None:
    facts = replace(DEFAULT_FACTS, base_model="acme/other", vocab_size=100)
    async with started(FakeExecutor(blobs, facts=facts)) as driver:
        assert driver.facts is facts
        (outcome,) = await driver.sample(sample_op(prompt=[100]))
        assert outcome.failure is not None
        assert "vocabulary of 100" in outcome.failure.message


async def test_death_is_told_once_and_takes_everything(driver: Driver) -> None:
    run = await Run(driver).trained()
    executor = driver.executor
    assert isinstance(executor, FakeExecutor)
    driver.submit(sample_op(), prefix="lost")
    cycle = asyncio.create_task(driver.run(run.backward()))
    await asyncio.sleep(0)
    executor.die("killed")
    executor.die("killed again")
    with pytest.raises(WorkerDied, match=r"^killed$"):
        await cycle
    for call in (driver.run(run.step()), executor.snapshot([]), executor.evict([])):
        with pytest.raises(WorkerDied, match=r"^killed$"):
            await call
    with pytest.raises(WorkerDied):
        executor.submit_samples([])
    await executor.stop()
    assert driver.deaths == ["killed"]
    assert driver.sample_outcomes == []


async def test_stop_is_no_death(driver: Driver) -> None:
    for _ in range(2):
        await driver.executor.stop()
    assert driver.deaths == []


async def test_a_sample_stops_at_the_end_of_sequence_only_when_asked(blobs: BlobStore) -> None:
    async with started(FakeExecutor(blobs, eos_token_ids=frozenset(range(64)))) as driver:
        never = sample_op(prompt=[1], max_tokens=8, temperature=0.0)
        at_eos = replace(never, params=replace(never.params, use_eos=True))
        at_id = replace(never, params=replace(never.params, stop_token_ids=(1,)))
        lengths = [len(read_sample(outcome).sequences[0][0]) for outcome in await driver.sample(never, at_eos, at_id)]
    assert lengths == [8, 1, 1]


async def test_refused_string_stops_say_why(driver: Driver) -> None:
    op = sample_op()
    (outcome,) = await driver.sample(replace(op, params=replace(op.params, stop_strings=("\n",))))
    assert outcome.failure is not None
    assert "send token ids" in outcome.failure.message


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, treadle.executor.fake; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
