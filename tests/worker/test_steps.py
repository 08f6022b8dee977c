"""The step phase: one call of the optimiser for all runs, one outcome per op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from worker_support import Driver, create, datums, item, metrics_of, model_id, passed, step

from treadle.domain.outcome import Failure
from treadle.domain.plan import StateTag
from treadle.domain.states import Category
from treadle.worker import cycle
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
        assert metrics_of(one).keys() == {"grad_norm", "update_norm", "step", "learning_rate", "skipped_passes"}
        assert metrics_of(one)["grad_norm"] > 0
        assert metrics_of(one)["update_norm"] > 0


def test_two_steps_of_one_run_in_a_cycle_run_one_after_the_other(driver: Driver, calls: list[int]) -> None:
    run, other = model_id(0), model_id(1)
    driver.run_ops(create(run), create(other), passed(run, 1, datums(1, 8)), passed(other, 1, datums(1, 8)))
    first, second, alone = driver.run([item(step(run, 2)), item(step(run, 3)), item(step(other, 2))]).outcomes
    assert calls == [2, 1]
    assert metrics_of(first)["step"] == 1
    assert second.failure is not None
    assert "forward_backward" in second.failure.message
    assert metrics_of(alone)["step"] == 1


def test_a_broken_optimiser_costs_only_runs_that_it_had_written_to(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ranks differ, because runs of one rank share pages, and writes are counted per page.
    runs = [model_id(0), model_id(1)]
    driver.run_ops(
        *(create(run, rank=4 * (index + 1)) for index, run in enumerate(runs)),
        *(passed(run, 1, datums(1, 8)) for run in runs),
    )

    def half(due: Sequence[Any]) -> Any:
        due[0][0].exp_avg.mul_(0.9)
        raise RuntimeError("broken amid the first run")

    with monkeypatch.context() as patch:
        patch.setattr(cycle, "adamw_steps", half)
        touched, untouched = driver.run([item(step(run, 2)) for run in runs]).outcomes
    for one in (touched, untouched):
        assert one.failure is not None
        assert one.failure.category is Category.SERVER
        assert "broken" not in one.failure.message
    assert touched.tag_after is None, "it must be restored"
    assert untouched.tag_after == StateTag(runs[1], 1, 2)
    (stepped,) = driver.run_ops(step(runs[1], 3))
    assert metrics_of(stepped)["step"] == 1


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
