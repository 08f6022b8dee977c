"""A hole at the head of a long line is given up even where no step can be seen behind it."""

from __future__ import annotations

import pytest

from treadle.domain.limits import MAX_HEADS_PER_MODEL
from treadle.domain.ops import OpKind
from treadle.scheduler.policy import plan_cycle
from treadle.testing.builders import model_queue, policy_input, queued


@pytest.mark.parametrize(("queued_s", "is_given_up"), [(31.0, True), (1.0, False)])
def test_a_full_head_behind_a_hole_ends_the_wait(queued_s: float, is_given_up: bool) -> None:
    ops = [queued(OpKind.FORWARD_BACKWARD, 6 + i, 8, queued_s=queued_s) for i in range(MAX_HEADS_PER_MODEL)]
    plan, _ = plan_cycle(policy_input(model_queue(*ops, next_seq_id=5)))
    assert bool(plan.ops) is is_given_up
    assert [gap.seq_ids for gap in plan.gaps] == ([(5,)] if is_given_up else [])


def test_a_few_passes_behind_a_hole_wait_on() -> None:
    ops = [queued(OpKind.FORWARD_BACKWARD, 6 + i, 8, queued_s=1000.0) for i in range(3)]
    plan, _ = plan_cycle(policy_input(model_queue(*ops, next_seq_id=5)))
    assert plan.is_empty
