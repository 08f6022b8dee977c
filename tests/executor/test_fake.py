"""The fake executor keeps the executor's contract; what is special to it is tested below."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from treadle.blobs import BlobStore
from treadle.domain.outcome import RestoreEnd
from treadle.errors import WorkerDied
from treadle.executor.fake import DEFAULT_FACTS, FakeExecutor
from treadle.executor.faults import Fault, Faults, Moment, PlannedFault
from treadle.testing.builders import sample_op
from treadle.testing.driver import PATIENCE_S, Driver, read_sample, started
from treadle.testing.executor_contract import CHECKS, LORA, Check, Run
from treadle.testing.recovery_contract import RECOVERY_CHECKS, assert_must_restore


@pytest.fixture
async def driver(blobs: BlobStore) -> AsyncIterator[Driver]:
    async with started(FakeExecutor(blobs)) as driver:
        yield driver


@pytest.mark.parametrize("check", [*CHECKS, *RECOVERY_CHECKS], ids=lambda check: check.__name__)
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


DURING_A_CYCLE = [Moment.CYCLE_TAKEN, Moment.RESTORE_TAKEN, Moment.OP_DONE, Moment.CYCLE_DONE]


@pytest.mark.parametrize("moment", DURING_A_CYCLE)
async def test_a_planned_death_ends_the_cycle_and_the_next_worker_lives(blobs: BlobStore, moment: Moment) -> None:
    faults = Faults(PlannedFault(moment, Fault.DEATH))
    async with started(FakeExecutor(blobs, faults=faults)) as driver:
        run = Run(driver)
        restore = driver.restore_item(run.tag(0), LORA, None)
        with pytest.raises(WorkerDied, match=f"planned death: {moment}"):
            await driver.run(run.backward(), run.step(), restores=[restore])
        assert len(driver.deaths) == 1
        assert faults.num_left == 0
    async with started(FakeExecutor(blobs, faults=faults)) as driver:
        await Run(driver).trained()


@pytest.mark.parametrize("moment", [*DURING_A_CYCLE, Moment.SNAPSHOT_TAKEN, Moment.SNAPSHOT_DURABLE])
async def test_a_planned_hang_ends_only_when_the_worker_is_ended(blobs: BlobStore, moment: Moment) -> None:
    async with started(FakeExecutor(blobs, faults=Faults(PlannedFault(moment, Fault.HANG, skip=0)))) as driver:
        run = Run(driver)
        executor = driver.executor
        assert isinstance(executor, FakeExecutor)
        if moment in DURING_A_CYCLE:
            call = asyncio.ensure_future(
                driver.run_cycle(run.backward(), restores=[driver.restore_item(run.tag(0), LORA, None)])
            )
        else:
            await run.trained()
            call = asyncio.ensure_future(executor.snapshot([(run.tag(2), driver.new_key())]))
        waits_behind = asyncio.ensure_future(executor.evict([]))
        done, _ = await asyncio.wait([call, waits_behind], timeout=0.05)
        assert not done
        executor.die("hung")
        for one in (call, waits_behind):
            with pytest.raises(WorkerDied, match="hung"):
                async with asyncio.timeout(PATIENCE_S):
                    await one
        assert driver.deaths == ["hung"]


@pytest.mark.parametrize(
    ("fault", "end"), [(Fault.UNREADABLE, RestoreEnd.UNREADABLE), (Fault.FAILED, RestoreEnd.FAILED)]
)
async def test_a_planned_restore_fault_strikes_its_run_only(blobs: BlobStore, fault: Fault, end: RestoreEnd) -> None:
    faults = Faults()
    async with started(FakeExecutor(blobs, faults=faults)) as driver:
        struck, spared = Run(driver), Run(driver)
        faults.plan(PlannedFault(Moment.RESTORE_TAKEN, fault, model_id=struck.model_id, skip=1, times=2))
        ends = []
        for _ in range(4):
            restores = [driver.restore_item(run.tag(0), LORA, None) for run in (struck, spared)]
            struck.last_seq_id = 0
            outcome = await driver.run_cycle(struck.forward(), restores=restores)
            ends.append([restored.end for restored in outcome.restores])
            if outcome.restores[0].end is not RestoreEnd.DONE:
                assert_must_restore(*outcome.outcomes)
        done = RestoreEnd.DONE
        assert ends == [[done, done], [end, done], [end, done], [done, done]]


async def test_a_planned_snapshot_failure_leaves_its_run_out(blobs: BlobStore) -> None:
    faults = Faults(PlannedFault(Moment.SNAPSHOT_TAKEN, Fault.FAILED))
    async with started(FakeExecutor(blobs, faults=faults)) as driver:
        run = await Run(driver).trained()
        assert await driver.snapshot(run.tag(2)) is None
        assert await driver.snapshot(run.tag(2)) is not None


@pytest.mark.parametrize("moment", [Moment.SNAPSHOT_TAKEN, Moment.SNAPSHOT_DURABLE])
async def test_a_death_beside_a_snapshot_leaves_its_blob_or_not(blobs: BlobStore, moment: Moment) -> None:
    async with started(FakeExecutor(blobs, faults=Faults(PlannedFault(moment, Fault.DEATH)))) as driver:
        run, key = await Run(driver).trained(), driver.new_key()
        with pytest.raises(WorkerDied):
            await driver.executor.snapshot([(run.tag(2), key)])
        assert blobs.exists(key) is (moment is Moment.SNAPSHOT_DURABLE)


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
