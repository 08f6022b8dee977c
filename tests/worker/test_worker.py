"""Cycles on a real worker with the bundled model: one pass for all, whole ops, exact states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from worker_support import (
    Driver,
    MemoryBlobs,
    create,
    datums,
    item,
    metrics_of,
    model_id,
    passed,
    publish,
    save,
    step,
)

from treadle.domain.ids import BlobKey
from treadle.domain.ops import LoraSpec, UnloadModelOp
from treadle.domain.outcome import Failure, PassResult
from treadle.domain.plan import RestoreItem, StateTag
from treadle.domain.states import Category
from treadle.errors import Fenced


def count_forwards(driver: Driver) -> list[int]:
    """Rows of every forward of the base model from now on."""
    rows: list[int] = []
    base = driver.worker._base
    base.transformer.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[0]))
    return rows


def logprobs(driver: Driver, run_index: int, seq_id: int, *, incarnation: int = 1) -> list[list[float]]:
    run = model_id(run_index)
    starts = StateTag(run, incarnation, seq_id - 1)
    (outcome,) = driver.run([item(passed(run, seq_id, datums(2, 9), forward_only=True), starts_from=starts)]).outcomes
    assert isinstance(outcome.result, PassResult), outcome.failure
    return [array.tolist() for array in outcome.result.logprobs]


def test_eight_tenants_of_mixed_ranks_and_losses_make_exactly_one_forward(driver: Driver) -> None:
    runs = [model_id(index) for index in range(8)]
    driver.run_ops(*(create(run, rank=2 + 3 * index, seed=index) for index, run in enumerate(runs)))
    rows = count_forwards(driver)
    ops = []
    for index, run in enumerate(runs):
        data = datums(1, 32, seed=index)
        if index % 2:
            extra = {"logprobs": np.full(32, -3.0, np.float32), "advantages": np.ones(32, np.float32)}
            data = tuple(type(one)(one.tokens, {**one.inputs, **extra}) for one in data)
        ops.append(passed(run, 1, data, loss="ppo" if index % 2 else "cross_entropy"))
    outcome = driver.run([item(op) for op in [*ops, *(step(run, 2) for run in runs)]])
    assert rows == [8 * 32]
    assert outcome.num_forwards == 1
    assert [one.failure for one in outcome.outcomes] == [None] * 16


def test_an_op_that_starts_from_another_state_is_refused_and_the_state_is_dropped(driver: Driver) -> None:
    run = model_id()
    driver.run_ops(create(run), passed(run, 1, datums(1, 8)))
    for wrong in (StateTag(run, 2, 1), StateTag(run, 1, 0)):
        (outcome,) = driver.run([item(step(run, 2), starts_from=wrong)]).outcomes
        assert outcome.failure is not None
        assert outcome.failure.category is Category.SERVER
        assert outcome.tag_after is None


def test_numbers_that_were_refused_or_given_up_are_stepped_over(driver: Driver) -> None:
    run = model_id()
    driver.run_ops(create(run), passed(run, 1, datums(1, 8)))
    (outcome,) = driver.run([item(step(run, 5), starts_from=StateTag(run, 1, 4))]).outcomes
    assert outcome.failure is None
    assert outcome.tag_after == StateTag(run, 1, 5)


def test_an_older_leader_is_fenced(driver: Driver) -> None:
    driver.token = 7
    driver.run_ops(create(model_id()))
    driver.token = 6
    with pytest.raises(Fenced):
        driver.run([item(create(model_id(1)))])


def test_a_pass_spread_over_cycles_equals_one_run_at_once(make_driver: Callable[..., Driver]) -> None:
    """Five datums of 1,000 tokens are three quanta; however they are split, bits are the same."""
    run = model_id()
    op = passed(run, 1, datums(5, 1000))
    whole = make_driver()
    whole.run_ops(create(run), op, step(run, 2))
    parts = make_driver(micro_batch_tokens=2048)
    parts.run_ops(create(run))
    for quanta in ((0, 1), (1, 2)):
        (outcome,) = parts.run([item(op, quanta=quanta)]).outcomes
        assert outcome.is_partial
        assert outcome.result is None
        assert outcome.tag_after == StateTag(run, 1, 0), "the tag moves by whole ops only"
    last, _ = parts.run([item(op, quanta=(2, 3)), item(step(run, 2))]).outcomes
    assert isinstance(last.result, PassResult)
    assert len(last.result.logprobs) == 5
    assert logprobs(parts, 0, 3) == logprobs(whole, 0, 3)


def test_a_new_leader_starts_a_half_done_pass_again(driver: Driver, make_driver: Callable[..., Driver]) -> None:
    run = model_id()
    op = passed(run, 1, datums(5, 1000))
    driver.run_ops(create(run))
    driver.run([item(op, quanta=(0, 2))])
    driver.token = 2
    driver.run([item(op), item(step(run, 2))])
    undisturbed = make_driver()
    undisturbed.run_ops(create(run), op, step(run, 2))
    assert logprobs(driver, 0, 3) == logprobs(undisturbed, 0, 3)


def test_a_pass_that_breaks_the_engine_fails_alone(
    driver: Driver, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch that raises is run again op by op: neighbours get the bits they would have had without it."""
    import treadle.worker.micro_batches as micro_batches

    good, bad = model_id(0), model_id(1)
    real = micro_batches.run_micro_batch

    def breaking(base, quanta, *, recompute):  # type: ignore[no-untyped-def]
        results = real(base, quanta, recompute=recompute)
        if any(len(quantum.datums) == 3 for quantum in quanta):
            raise RuntimeError("some details")  # after the backward has written its gradients
        return results

    driver.run_ops(create(good), create(bad))
    monkeypatch.setattr(micro_batches, "run_micro_batch", breaking)
    outcome = driver.run(
        [
            item(passed(good, 1, datums(2, 8))),
            item(passed(bad, 1, datums(3, 8))),
            item(step(good, 2)),
            item(step(bad, 2)),
        ]
    ).outcomes
    assert [one.failure is None for one in outcome] == [True, False, True, False]
    assert outcome[1].failure is not None
    assert outcome[1].failure.category is Category.SERVER
    assert "some details" not in outcome[1].failure.message, "they stay in the log"
    monkeypatch.setattr(micro_batches, "run_micro_batch", real)
    alone = make_driver()
    alone.run_ops(create(good), passed(good, 1, datums(2, 8)), step(good, 2))
    assert logprobs(driver, 0, 3) == logprobs(alone, 0, 3)


def test_failed_passes_are_counted_by_the_step_and_leave_nothing(
    driver: Driver, make_driver: Callable[..., Driver]
) -> None:
    run = model_id()
    huge = datums(1, 8)[0]
    poisoned = type(huge)(
        huge.tokens,
        {**huge.inputs, "logprobs": np.full(8, -1e30, np.float32), "advantages": np.ones(8, np.float32)},
    )
    driver.run_ops(create(run))
    bad, good, stepped = driver.run(
        [
            item(passed(run, 1, (poisoned,), loss="importance_sampling")),
            item(passed(run, 2, datums(2, 8))),
            item(step(run, 3)),
        ]
    ).outcomes
    assert bad.failure is not None
    assert bad.failure.category is Category.USER
    assert "datum 0" in bad.failure.message
    assert good.failure is None
    assert metrics_of(stepped)["skipped_passes"] == 1
    clean = make_driver()
    clean.run_ops(create(run), passed(run, 1, datums(2, 8)), step(run, 2))
    assert logprobs(driver, 0, 4) == logprobs(clean, 0, 3)


def test_a_step_without_a_pass_is_a_user_error(driver: Driver) -> None:
    run = model_id()
    driver.run_ops(create(run))
    (outcome,) = driver.run([item(step(run, 1))]).outcomes
    assert outcome.failure is not None
    assert outcome.failure.category is Category.USER


def test_restore_from_a_save_goes_on_bit_for_bit(make_driver: Callable[..., Driver]) -> None:
    run = model_id()
    first = make_driver()
    first.run_ops(create(run), passed(run, 1, datums(2, 8)), step(run, 2))
    # Saved with an open gradient: the state is everything that the next step depends on.
    saved = first.run_ops(passed(run, 3, datums(2, 8, seed=1)), save(run, 4))[1]
    second = make_driver()
    tag = StateTag(run, 2, 4)
    restore = RestoreItem(run, LoraSpec(8, 1), BlobKey(str(saved.result.blob_key)), tag)  # type: ignore[union-attr]
    second.run([item(step(run, 5), starts_from=tag)], restores=[restore])
    first.run_ops(step(run, 5))
    assert logprobs(second, 0, 6, incarnation=2) == logprobs(first, 0, 6)


def test_an_untouched_run_is_restored_from_its_seed(make_driver: Callable[..., Driver]) -> None:
    run = model_id()
    first, second = make_driver(), make_driver()
    first.run_ops(create(run, rank=4, seed=9))
    tag = StateTag(run, 2, 0)
    second.run([], restores=[RestoreItem(run, LoraSpec(4, 9), None, tag)])
    assert logprobs(second, 0, 1, incarnation=2) == logprobs(first, 0, 1)


def test_a_published_version_does_not_follow_training(driver: Driver) -> None:
    run = model_id()
    driver.run_ops(create(run), passed(run, 1, datums(1, 8)), step(run, 2))
    (published,) = driver.run_ops(publish(run, 3))
    key = published.result.blob_key  # type: ignore[union-attr]
    version = driver.worker._versions.get(key)
    before = version.flat.clone()
    driver.run_ops(passed(run, 4, datums(1, 8)), step(run, 5))
    assert (version.flat == before).all()
    assert (driver.worker._slots.state(run).weights.flat != before).any()


def test_unload_and_evict_forget_the_run(driver: Driver) -> None:
    run, other = model_id(0), model_id(1)
    driver.run_ops(create(run), create(other))
    (outcome,) = driver.run_ops(UnloadModelOp(run, 1))
    assert outcome.tag_after is None
    driver.worker.evict([other, other, model_id(9)])
    assert driver.worker._slots.tag(other) is None


def test_ops_behind_a_failed_creation_name_it(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    import treadle.worker.cycle as cycle

    def broken(*_args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(cycle, "new_training_state", broken)
    run = model_id()
    created, stepped = driver.run([item(create(run)), item(step(run, 1), starts_from=StateTag(run, 1, 0))]).outcomes
    assert isinstance(created.failure, Failure)
    assert stepped.failure is not None
    assert "creation failed" in stepped.failure.message


def test_a_full_disk_fails_the_save_and_the_run_goes_on(
    driver: Driver, blobs: MemoryBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = model_id()
    driver.run_ops(create(run), passed(run, 1, datums(1, 8)))

    def write(key: str, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(blobs, "write", write)
        named, published = driver.run([item(save(run, 2)), item(publish(run, 3))]).outcomes
    for outcome in (named, published):
        assert outcome.failure is not None
        assert outcome.failure.category is Category.SERVER
    stepped, _ = driver.run_ops(step(run, 4), save(run, 5))
    assert metrics_of(stepped)["num_steps"] == 1


def test_a_restored_run_forgets_the_parts_of_a_pass_on_its_old_state(driver: Driver) -> None:
    run = model_id()
    driver.run_ops(create(run), save(run, 1))
    two_quanta = passed(run, 2, datums(2, 1500))
    (part,) = driver.run([item(two_quanta, quanta=(0, 1))]).outcomes
    assert part.is_partial
    restore = RestoreItem(run, LoraSpec(rank=8, seed=1), None, StateTag(run, 2, 1))
    driver.run([], restores=[restore])
    assert not driver.worker._runner._open_passes
