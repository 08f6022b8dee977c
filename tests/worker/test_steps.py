"""The step phase: one call of the optimiser for all runs, one outcome per op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_support import Driver, create, datums, item, metrics_of, model_id, passed, step

from treadle.domain.ids import ModelId
from treadle.domain.outcome import Failure
from treadle.domain.plan import StateTag
from treadle.domain.states import Category
from treadle.worker import cycle, parking
from treadle.worker.work import DecodedItem


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs in each call of the optimiser."""
    sizes: list[int] = []
    real = cycle.adamw_steps

    def counted(due: Sequence[Any]) -> Any:
        sizes.append(len(due))
        return real(due)

    monkeypatch.setattr(cycle, "adamw_steps", counted)
    return sizes


def test_all_steps_of_a_cycle_are_one_call_and_those_that_may_not_run_are_left_out(
    driver: Driver, calls: list[int]
) -> None:
    runs = [model_id(index) for index in range(4)]
    driver.run_ops(*(create(run) for run in runs), *(passed(run, 1, datums(1, 8)) for run in (runs[0], runs[2])))
    stale = item(step(runs[3], 1), starts_from=StateTag(runs[3], 9, 0))
    items = [item(step(runs[0], 2)), item(step(runs[1], 1)), item(step(runs[2], 2)), stale]
    outcomes = driver.run(items).outcomes
    assert calls == [3]
    assert [one.failure is None for one in outcomes] == [True, False, True, False]
    no_gradient, refused = outcomes[1].failure, outcomes[3].failure
    assert no_gradient is not None
    assert no_gradient.category is Category.USER
    assert refused is not None
    assert refused.category is Category.SERVER
    assert [one.tag_after for one in outcomes[:3]] == [
        StateTag(run, 1, seq) for run, seq in zip(runs[:3], (2, 1, 2), strict=True)
    ]
    assert outcomes[3].tag_after is None
    for one in (outcomes[0], outcomes[2]):
        assert metrics_of(one).keys() == {"grad_norm", "update_norm", "num_steps", "learning_rate", "skipped_passes"}
        assert metrics_of(one)["grad_norm"] > 0
        assert metrics_of(one)["update_norm"] > 0


def test_two_steps_of_one_run_in_a_cycle_run_one_after_the_other(driver: Driver, calls: list[int]) -> None:
    run, other = model_id(0), model_id(1)
    driver.run_ops(create(run), create(other), passed(run, 1, datums(1, 8)), passed(other, 1, datums(1, 8)))
    first, second, alone = driver.run([item(step(run, 2)), item(step(run, 3)), item(step(other, 2))]).outcomes
    assert calls == [2, 1]
    assert metrics_of(first)["num_steps"] == 1
    assert second.failure is not None
    assert "forward_backward" in second.failure.message
    assert metrics_of(alone)["num_steps"] == 1


def test_a_broken_optimiser_costs_only_runs_that_it_had_written_to(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ranks differ, because runs of one rank share pages, and writes are counted per page.
    runs = [model_id(0), model_id(1)]
    driver.run_ops(
        *(create(run, rank=4 * (index + 1)) for index, run in enumerate(runs)),
        *(passed(run, 1, datums(1, 8)) for run in runs),
    )
    real = cycle.adamw_steps

    def half(due: Sequence[Any]) -> Any:
        if len(due) == 1:
            return real(due)
        due[0][0].exp_avg.mul_(0.9)
        raise RuntimeError("broken amid the first run")

    monkeypatch.setattr(cycle, "adamw_steps", half)
    touched, untouched = driver.run([item(step(run, 2)) for run in runs]).outcomes
    assert touched.failure is not None
    assert touched.failure.category is Category.SERVER
    assert "broken" not in touched.failure.message
    assert touched.tag_after is None, "it must be restored"
    assert untouched.failure is None
    assert untouched.tag_after == StateTag(runs[1], 1, 2)


def test_a_step_that_breaks_the_optimiser_fails_alone_and_its_run_goes_on(
    driver: Driver, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [model_id(index) for index in range(3)]
    driver.run_ops(*(create(run) for run in runs), *(passed(run, 1, datums(1, 8)) for run in runs))
    real, guilty = cycle.adamw_steps, driver.worker._slots.state(runs[1])

    def breaking(due: Sequence[Any]) -> Any:
        if any(state is guilty for state, _ in due):
            raise torch.OutOfMemoryError("no memory for its copies")
        return real(due)

    with monkeypatch.context() as patch:
        patch.setattr(cycle, "adamw_steps", breaking)
        outcomes = driver.run([item(step(run, 2)) for run in runs]).outcomes
    assert [one.failure is None for one in outcomes] == [True, False, True]
    assert [one.tag_after for one in outcomes] == [StateTag(run, 1, 2) for run in runs]
    driver.run_ops(step(runs[1], 3))
    alone = make_driver()
    alone.run_ops(create(runs[1]), passed(runs[1], 1, datums(1, 8)), step(runs[1], 2))
    assert weights_of(driver, runs[0]) == weights_of(driver, runs[1]) == weights_of(alone, runs[1])


@pytest.mark.parametrize("holds", [1, 2])
def test_steps_of_more_runs_than_memory_holds_are_taken_in_turns(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int], holds: int
) -> None:
    """A run that was brought back for its step must not be parked to make room for the next one's."""
    driver, plain = make_driver(parking_dir=tmp_path), make_driver()
    runs = [model_id(index) for index in range(4)]
    for one in (driver, plain):
        one.run_ops(*(create(run, seed=index) for index, run in enumerate(runs)))
        one.run_ops(*(passed(run, 1, datums(1, 8)) for run in runs))
    slots, real = driver.worker._slots, parking.placed_state
    slots.park_all(busy=())

    def crowded(*args: Any, **kwargs: Any) -> Any:
        if len(slots._states) >= holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(parking, "placed_state", crowded)
        driver.run_ops(*(step(run, 2) for run in runs))
    assert calls == [holds] * (4 // holds)
    plain.run_ops(*(step(run, 2) for run in runs))
    assert [weights_of(driver, run) for run in runs] == [weights_of(plain, run) for run in runs]


def weights_of(driver: Driver, run: ModelId) -> bytes:
    return driver.worker._slots.state(run).weights.flat.numpy().tobytes()


def test_passes_that_only_look_are_not_counted_as_skipped(driver: Driver) -> None:
    run = model_id()
    driver.run_ops(create(run), passed(run, 1, datums(1, 8)))
    unreadable = Failure("cannot be read", Category.USER)
    items = [
        item(passed(run, 2, datums(1, 8), forward_only=True)),
        item(passed(run, 3, datums(1, 8))),
        item(step(run, 4)),
    ]
    items[:2] = [DecodedItem(one.item, unreadable) for one in items[:2]]
    *_, stepped = driver.run(items).outcomes
    assert metrics_of(stepped)["skipped_passes"] == 1
