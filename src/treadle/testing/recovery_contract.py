"""What every executor does so that nothing is lost: state tags, fencing, snapshots and restores.

The second half of executor_contract.py, to be run in the same way. A run is compared with an undisturbed one, to the
bit, wherever it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from treadle.domain.ops import SaveWeightsOp
from treadle.domain.outcome import BlobResult, OpOutcome, RestoreEnd, RestoreOutcome
from treadle.domain.plan import FIRST_INCARNATION, StateTag
from treadle.errors import Fenced
from treadle.testing.driver import PATIENCE_S, Driver, pass_logprobs
from treadle.testing.executor_contract import LORA, Check, Run, assert_same, quanta_of_datums


def assert_must_restore(*outcomes: OpOutcome) -> None:
    """Nothing of these ops ran, and the worker holds nothing of their run."""
    for outcome in outcomes:
        assert outcome.must_restore, outcome
        assert outcome.result is None
        assert outcome.failure is not None
        assert outcome.failure.message
        assert outcome.tag_after is None


async def check_a_wrong_tag_is_refused(driver: Driver) -> None:
    # Another incarnation; a state behind the one held; the op's own future.
    for incarnation, seqs_behind in ((FIRST_INCARNATION + 1, 1), (FIRST_INCARNATION, 2), (FIRST_INCARNATION, 0)):
        run = await Run(driver).trained()
        op = run.backward()
        tag = StateTag(run.model_id, incarnation, applied_seq=op.seq_id - seqs_behind)
        assert_must_restore(*(await driver.run_items([driver.item(op, tag=tag), driver.item(run.step())])).outcomes)


async def check_a_refused_op_takes_those_before_it_along(driver: Driver) -> None:
    run, neighbour = await Run(driver).trained(), await Run(driver).trained()
    good, stale = run.backward(), run.step()
    items = [driver.item(good), driver.item(neighbour.backward()), driver.item(stale, tag=run.tag(1))]
    passed, beside, refused = (await driver.run_items(items)).outcomes
    assert_must_restore(refused)
    assert beside.failure is None
    if passed.must_restore:
        assert_must_restore(passed)
    else:
        # It had run before the other was looked at: it is applied, on a state that is gone now.
        assert passed.failure is None
    assert_must_restore(*await driver.run(run.forward()))


async def check_an_older_token_is_fenced(driver: Driver) -> None:
    run = await Run(driver).trained()
    before = await run.logprobs()
    driver.token += 1
    await driver.run(run.forward())
    driver.token -= 1
    item = driver.item(run.backward())
    try:
        await driver.run_items([item])
    except Fenced:
        pass
    else:
        raise AssertionError("a plan with an older token was run")
    finally:
        driver.token += 1
    assert_same(await run.logprobs(), before)


async def check_a_newer_token_ends_an_older_cycle(driver: Driver) -> None:
    run, undisturbed = await Run(driver).trained(), await Run(driver).trained()
    key = await driver.snapshot(run.tag(run.last_seq_id))
    assert key is not None
    restore = driver.restore_item(run.tag(run.last_seq_id), LORA, key)
    old = [driver.item(run.backward(seed=seed)) for seed in range(4)]
    old.append(driver.item(run.step()))
    driver.tags[run.model_id] = restore.tag
    new = [replace(item, starts_from=replace(restore.tag, applied_seq=item.planned.seq_id - 1)) for item in old]
    older = asyncio.ensure_future(driver.run_items(old))
    # The older leader's cycle is sent first.
    await asyncio.sleep(0)
    driver.token += 1
    outcome = await driver.run_items(new, restores=[restore])
    # It may have been through before the newer one came.
    with contextlib.suppress(Fenced):
        await older
    assert [one.failure for one in outcome.outcomes] == [None] * len(new)
    driver.tags[run.model_id] = outcome.outcomes[-1].tag_after
    await driver.run(*[undisturbed.backward(seed=seed) for seed in range(4)], undisturbed.step())
    assert_same(await run.logprobs(), await undisturbed.logprobs())


async def check_snapshot_evict_restore_continues_the_run(driver: Driver) -> None:
    run, undisturbed = await Run(driver).trained(), await Run(driver).trained()
    held = run.tag(run.last_seq_id)
    assert await driver.snapshot(replace(held, applied_seq=held.applied_seq - 1)) is None
    assert await driver.snapshot(replace(held, incarnation=held.incarnation + 1)) is None
    key = driver.new_key()
    written = await driver.executor.snapshot([(held, key)])
    assert written.keys() == {run.model_id}
    assert written[run.model_id].num_bytes > 0
    assert written[run.model_id].compute_s >= 0
    await driver.executor.evict([run.model_id])
    restore = driver.restore_item(held, LORA, key)
    # Replayed ops are ordinary ones, in the restore's own cycle.
    outcome = await driver.run_cycle(run.backward(seed=5), run.step(), restores=[restore])
    assert outcome.restores == (RestoreOutcome(run.model_id, RestoreEnd.DONE),)
    assert [one.failure for one in outcome.outcomes] == [None, None]
    assert outcome.outcomes[-1].tag_after == replace(restore.tag, applied_seq=run.last_seq_id)
    await driver.run(undisturbed.backward(seed=5), undisturbed.step())
    assert_same(await run.logprobs(), await undisturbed.logprobs())


async def check_an_open_gradient_is_in_a_snapshot_only_when_asked_for(driver: Driver) -> None:
    run, undisturbed = await Run(driver).trained(), await Run(driver).trained()
    await driver.run(run.backward(seed=5), undisturbed.backward(seed=5))
    held = run.tag(run.last_seq_id)
    assert await driver.snapshot(held) is None
    key = await driver.snapshot(held, with_open_gradient=True)
    restore = driver.restore_item(held, LORA, key)
    (stepped,) = await driver.run(run.step(), restores=[restore])
    assert stepped.failure is None
    assert stepped.tag_after == replace(restore.tag, applied_seq=run.last_seq_id)
    await driver.run(undisturbed.step())
    assert_same(await run.logprobs(), await undisturbed.logprobs())


async def check_a_run_between_two_parts_of_a_pass_is_written_only_when_asked_for(driver: Driver) -> None:
    run, undisturbed = await Run(driver).trained(), await Run(driver).trained()
    held, data = run.tag(run.last_seq_id), quanta_of_datums(driver, 2)
    op = run.backward_on(data)
    (part,) = (await driver.run_items([driver.item(op, quanta=(0, 1))])).outcomes
    assert part.is_partial
    assert await driver.snapshot(held) is None
    key = await driver.snapshot(held, with_open_gradient=True)
    # The file knows nothing of the part, so the pass starts again.
    outcomes = await driver.run(op, run.step(), restores=[driver.restore_item(held, LORA, key)])
    assert [outcome.failure for outcome in outcomes] == [None, None]
    await driver.run(undisturbed.backward_on(data), undisturbed.step())
    assert_same(await run.logprobs(), await undisturbed.logprobs())


async def check_training_goes_on_while_snapshots_are_written(driver: Driver) -> None:
    runs = [await Run(driver).trained() for _ in range(3)]
    before = [await run.logprobs() for run in runs]
    tags = [run.tag(run.last_seq_id) for run in runs]
    keys = [driver.new_key() for _ in runs]
    writing = asyncio.ensure_future(driver.executor.snapshot(list(zip(tags, keys, strict=True))))
    await asyncio.sleep(0)
    await driver.run(*[op for run in runs for op in (run.backward(), run.step())])
    async with asyncio.timeout(PATIENCE_S):
        written = await writing
    # A run that was ahead of its turn is left out; what was written is what was asked for.
    for run, tag, key, logprobs in zip(runs, tags, keys, before, strict=True):
        if run.model_id in written:
            run.last_seq_id = tag.applied_seq
            (passed,) = await driver.run(run.forward(), restores=[driver.restore_item(tag, LORA, key)])
            assert_same(pass_logprobs(passed)[0], logprobs)


async def check_a_restore_may_leave_the_optimizer_behind(driver: Driver) -> None:
    run, loaded = await Run(driver).trained(), Run(driver)
    (saved,) = await driver.run(SaveWeightsOp(run.model_id, run.next_seq_id(), name="one"))
    assert isinstance(saved.result, BlobResult)
    held = run.tag(run.last_seq_id)
    restore = driver.restore_item(held, LORA, saved.result.blob_key, with_optimizer=False)
    await driver.run(run.backward(), run.step(), restores=[restore])
    await driver.run(loaded.create())
    await driver.run(loaded.load(saved.result.blob_key, with_optimizer=False))
    await driver.run(loaded.backward(), loaded.step())
    assert_same(await run.logprobs(), await loaded.logprobs())


async def check_a_new_run_restores_from_its_seed(driver: Driver) -> None:
    run, undisturbed = Run(driver), Run(driver)
    await driver.run(run.create(), undisturbed.create())
    await driver.executor.evict([run.model_id])
    restore = driver.restore_item(run.tag(0), LORA, None)
    await driver.run(run.backward(), run.step(), restores=[restore])
    await driver.run(undisturbed.backward(), undisturbed.step())
    assert_same(await run.logprobs(), await undisturbed.logprobs())


async def check_nothing_runs_behind_a_restore_that_did_not_succeed(driver: Driver) -> None:
    run, neighbour = await Run(driver).trained(), await Run(driver).trained()
    held = run.tag(run.last_seq_id)
    key = await driver.snapshot(held)
    missing = driver.restore_item(held, LORA, driver.new_key())
    outcome = await driver.run_cycle(run.backward(), run.step(), neighbour.forward(), restores=[missing])
    (restored,) = outcome.restores
    assert (restored.model_id, restored.end) == (run.model_id, RestoreEnd.UNREADABLE)
    assert restored.message
    *refused, beside = outcome.outcomes
    assert_must_restore(*refused)
    assert all(one.failure is not None and restored.message in one.failure.message for one in refused)
    assert beside.failure is None
    # Nothing is held, also without ops in the cycle; another blob makes it good.
    run.last_seq_id = held.applied_seq
    outcome = await driver.run_cycle(restores=[missing])
    assert [one.end for one in outcome.restores] == [RestoreEnd.UNREADABLE]
    (passed,) = await driver.run(run.forward(), restores=[driver.restore_item(missing.tag, LORA, key)])
    assert passed.failure is None


async def check_evict_is_idempotent(driver: Driver) -> None:
    run = await Run(driver).trained()
    for _ in range(2):
        await driver.executor.evict([run.model_id, driver.new_model_id()])
    assert await driver.snapshot(run.tag(run.last_seq_id)) is None
    assert_must_restore(*await driver.run(run.backward(), run.step()))


RECOVERY_CHECKS: tuple[Check, ...] = (
    check_a_wrong_tag_is_refused,
    check_a_refused_op_takes_those_before_it_along,
    check_an_older_token_is_fenced,
    check_a_newer_token_ends_an_older_cycle,
    check_snapshot_evict_restore_continues_the_run,
    check_an_open_gradient_is_in_a_snapshot_only_when_asked_for,
    check_a_run_between_two_parts_of_a_pass_is_written_only_when_asked_for,
    check_training_goes_on_while_snapshots_are_written,
    check_a_restore_may_leave_the_optimizer_behind,
    check_a_new_run_restores_from_its_seed,
    check_nothing_runs_behind_a_restore_that_did_not_succeed,
    check_evict_is_idempotent,
)
