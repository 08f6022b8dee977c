"""What a worker does with a run that it is told to rebuild, or that it does not hold as the plan thinks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_support import Driver, MemoryBlobs, create, datums, item, metrics_of, model_id, passed, save, step

from treadle.domain.ids import BlobKey
from treadle.domain.ops import LoraSpec
from treadle.domain.outcome import OpOutcome, RestoreEnd, RestoreOutcome
from treadle.domain.plan import RestoreItem, StateTag
from treadle.errors import StoreUnavailable
from treadle.worker import parking, restoring

RUN, OTHER = model_id(0), model_id(1)
SPEC = LoraSpec(rank=8, seed=1)
RESTORED = StateTag(RUN, 2, 2)


@pytest.fixture
def saved(driver: Driver, blobs: MemoryBlobs) -> bytes:
    """The file of a run one step in, which is still there."""
    driver.run_ops(create(RUN), passed(RUN, 1, datums(1, 8)), step(RUN, 2), save(RUN, 3))
    return blobs.blobs["states/session_train_0/3"]


def restore(driver: Driver, key: str = "file", tag: StateTag = RESTORED) -> tuple[RestoreOutcome, list[OpOutcome]]:
    """A cycle with a restore, a pass and a step behind it, and a new neighbour's pass."""
    driver.worker.evict([OTHER])
    driver.run_ops(create(OTHER))
    items = [
        item(passed(RUN, 3, datums(1, 8)), starts_from=tag),
        item(step(RUN, 4), starts_from=StateTag(RUN, 2, 3)),
        item(passed(OTHER, 1, datums(1, 8))),
    ]
    outcome = driver.run(items, restores=[RestoreItem(RUN, SPEC, BlobKey(key), tag)])
    (restored,) = outcome.restores
    assert outcome.outcomes[2].failure is None
    return restored, list(outcome.outcomes[:2])


def assert_nothing_ran(driver: Driver, outcomes: list[OpOutcome]) -> None:
    assert [(one.must_restore, one.result, one.tag_after) for one in outcomes] == [(True, None, None)] * len(outcomes)
    assert all(one.failure is not None for one in outcomes)
    assert RUN not in driver.worker._slots


@pytest.mark.parametrize("damage", ["gone", "empty", "cut short", "a bit", "another run's tensors"])
def test_a_blob_that_is_gone_or_damaged_is_unreadable(
    driver: Driver, blobs: MemoryBlobs, saved: bytes, damage: str
) -> None:
    flipped = bytearray(saved)
    flipped[-1] ^= 1
    files = {
        "empty": b"",
        "cut short": saved[: len(saved) // 2],
        "a bit": bytes(flipped),
        "another run's tensors": saved[:-4] + b"\0\0\0\0",
    }
    if damage in files:
        blobs.write("file", files[damage])
    restored, outcomes = restore(driver)
    assert restored.end is RestoreEnd.UNREADABLE
    assert restored.message
    assert_nothing_ran(driver, outcomes)
    assert all(one.failure is not None and restored.message in one.failure.message for one in outcomes)


@pytest.mark.parametrize(
    "error", [StoreUnavailable("the blob store could not read"), torch.OutOfMemoryError("no"), RuntimeError("a bug")]
)
def test_what_may_pass_is_no_verdict_on_the_blob(
    driver: Driver, blobs: MemoryBlobs, saved: bytes, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    blobs.write("file", saved)

    def failing(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "decode_state", failing)
        restored, outcomes = restore(driver)
    assert restored.end is RestoreEnd.FAILED
    assert "a bug" not in restored.message, "the details are in the log"
    assert_nothing_ran(driver, outcomes)
    restored, outcomes = restore(driver)
    assert restored == RestoreOutcome(RUN, RestoreEnd.DONE)
    assert [one.failure for one in outcomes] == [None, None]


def test_memory_that_runs_out_once_is_made(
    driver: Driver, blobs: MemoryBlobs, saved: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.write("file", saved)
    real, errors = restoring.decode_state, [torch.OutOfMemoryError("CUDA out of memory")]

    def crowded(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(restoring, "decode_state", crowded)
    assert restore(driver)[0].end is RestoreEnd.DONE
    assert not errors


def test_without_its_optimizer_a_run_starts_moments_and_gradient_afresh(driver: Driver, blobs: MemoryBlobs) -> None:
    driver.run_ops(create(RUN), passed(RUN, 1, datums(1, 8)), step(RUN, 2))
    driver.run_ops(passed(RUN, 3, datums(1, 8)))
    assert driver.snapshot(StateTag(RUN, 1, 3), "file") is not None
    tag = StateTag(RUN, 2, 3)
    restore = RestoreItem(RUN, SPEC, BlobKey("file"), tag, with_optimizer=False)
    (refused,) = driver.run([item(step(RUN, 4), starts_from=tag)], restores=[restore]).outcomes
    assert refused.failure is not None
    assert not refused.must_restore, "there is no gradient, and that is the client's affair"
    _, stepped = driver.run(
        [
            item(passed(RUN, 5, datums(1, 8)), starts_from=StateTag(RUN, 2, 4)),
            item(step(RUN, 6), starts_from=StateTag(RUN, 2, 5)),
        ]
    ).outcomes
    assert metrics_of(stepped)["num_steps"] == 1


def test_an_op_from_another_state_takes_the_pass_before_it_along(driver: Driver) -> None:
    driver.run_ops(create(RUN), create(OTHER))
    first, second, beside = driver.run(
        [
            item(passed(RUN, 1, datums(1, 8))),
            item(passed(RUN, 2, datums(1, 8)), starts_from=StateTag(RUN, 7, 1)),
            item(passed(OTHER, 1, datums(1, 8))),
        ]
    ).outcomes
    assert_nothing_ran(driver, [first, second])
    assert beside.failure is None


def test_a_creation_of_a_run_that_is_held_runs_the_next_time(driver: Driver) -> None:
    driver.run_ops(create(RUN))
    again = [create(RUN), passed(RUN, 1, datums(1, 8))]
    assert_nothing_ran(driver, list(driver.run([item(op) for op in again]).outcomes))
    driver.run_ops(*again)


def test_a_run_that_cannot_be_brought_back_is_restored_and_no_op_fails(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(parking_dir=tmp_path)
    driver.run_ops(create(RUN), passed(RUN, 1, datums(1, 8)))
    for ops in ([step(RUN, 2), save(RUN, 3)], [passed(RUN, 2, datums(1, 8)), step(RUN, 3)], [save(RUN, 2)]):
        driver.worker._slots.park_all(busy=())
        with monkeypatch.context() as patch:
            patch.setattr(parking.FileShelf, "read", _unreadable)
            outcomes = driver.run([item(op) for op in ops]).outcomes
        assert_nothing_ran(driver, list(outcomes))
        driver.run_ops(create(RUN), passed(RUN, 1, datums(1, 8)))


def _unreadable(*_args: Any) -> Any:
    raise OSError(5, "Input/output error")
