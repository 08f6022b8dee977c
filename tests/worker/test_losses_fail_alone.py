"""Custom and named losses that fail or take too long: they end their own request, and neighbours get the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from worker_support import Driver, create, datums, item, metrics_of, model_id, passed, step

from treadle.domain.custom_loss import CUSTOM, CustomLoss, LossInput, Node, NodeOp, Ref, check_custom_loss
from treadle.domain.losses import Loss
from treadle.domain.ops import PassOp
from treadle.domain.outcome import CycleOutcome, PassResult
from treadle.domain.plan import StateTag
from treadle.domain.states import Category
from treadle.engine import custom_loss

GOOD, MINE, SLOW, BROKEN = (model_id(index) for index in range(4))


def chain(name: str, *targets: str) -> CustomLoss:
    """The sum over tokens of these functions of logprobs, one behind the other."""
    nodes = [Node(NodeOp.PLACEHOLDER, "logprobs", "logprobs")]
    for index, target in enumerate((*targets, "torch.sum")):
        nodes.append(Node(NodeOp.CALL_FUNCTION, f"node_{index}", target, (Ref(nodes[-1].name),)))
    nodes.append(Node(NodeOp.OUTPUT, "output", "output", ((Ref(nodes[-1].name), {}),)))
    loss = CustomLoss(name, (LossInput("logprobs", 1),), tuple(nodes))
    check_custom_loss(loss)
    return loss


def with_loss(op: PassOp, loss: CustomLoss) -> PassOp:
    return PassOp(op.model_id, op.seq_id, op.datums, Loss(CUSTOM, custom=loss), op.forward_only)


def run_all(driver: Driver, *, with_offenders: bool) -> CycleOutcome:
    """One cycle of everybody's pass and step."""
    passes = [passed(GOOD, 1, datums(2, 24)), with_loss(passed(MINE, 1, datums(2, 16)), chain("fine", "torch.neg"))]
    runs = [GOOD, MINE]
    if with_offenders:
        slow = chain("slow", *["torch.exp", "torch.neg"] * 8)
        broken = chain("broken", "torch.neg", "torch.log")
        passes.insert(0, with_loss(passed(SLOW, 1, datums(3, 20)), slow))
        passes.insert(2, with_loss(passed(BROKEN, 1, datums(2, 12)), with_index(broken)))
        runs = [SLOW, GOOD, BROKEN, MINE]
    return driver.run([item(op) for op in [*passes, *(step(run, 2) for run in runs)]])


def with_index(loss: CustomLoss) -> CustomLoss:
    """The loss, of a token that no datum has."""
    first, *others = loss.nodes
    index = Node(NodeOp.CALL_FUNCTION, "far", "operator.getitem", (Ref(first.name), 5_000))
    moved = [Node(one.op, one.name, one.target, (Ref("far"), *one.args[1:])) for one in others[:1]]
    return CustomLoss(loss.name, loss.inputs, (first, index, *moved, *others[1:]))


def probe(driver: Driver, index: int) -> list[list[float]]:
    run = model_id(index)
    op = passed(run, 3, datums(2, 9), forward_only=True)
    (outcome,) = driver.run([item(op, starts_from=StateTag(run, 1, 2))]).outcomes
    assert isinstance(outcome.result, PassResult), outcome.failure
    return [array.tolist() for array in outcome.result.logprobs]


def test_slow_and_broken_losses_end_their_own_requests(
    driver: Driver, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every look at the clock is a second later than the one before: eight operations are too many.
    seconds = itertools.count()
    monkeypatch.setattr(custom_loss, "time", SimpleNamespace(thread_time=lambda: float(next(seconds))))
    driver.run_ops(*(create(run, seed=index) for index, run in enumerate((GOOD, MINE, SLOW, BROKEN))))
    outcome = run_all(driver, with_offenders=True)
    assert outcome.num_forwards == 1, "nobody's forward is run again for them"
    by_run = {(one.model_id, one.seq_id): one for one in outcome.outcomes}
    too_slow, too_far = by_run[SLOW, 1].failure, by_run[BROKEN, 1].failure
    assert too_slow is not None
    assert too_far is not None
    assert too_slow.category is too_far.category is Category.USER
    assert "custom loss 'slow': " in too_slow.message
    assert "was reached after 5 s" in too_slow.message
    assert (
        "datum 0: custom loss 'broken': operator.getitem (node 'far'): index 5000 is out of bounds" in too_far.message
    )
    for run in (GOOD, MINE):
        assert by_run[run, 1].failure is None
        assert metrics_of(by_run[run, 2])["skipped_passes"] == 0
    for run in (SLOW, BROKEN):
        assert by_run[run, 2].failure is not None, "a step without a gradient"
    alone = make_driver()
    alone.run_ops(*(create(run, seed=index) for index, run in enumerate((GOOD, MINE))))
    run_all(alone, with_offenders=False)
    for index in (0, 1):
        assert probe(driver, index) == probe(alone, index)
    # The offenders' runs go on too, as if nothing had been.
    driver.run_ops(passed(SLOW, 3, datums(1, 9)), step(SLOW, 4))
    assert np.isfinite(metrics_of(driver.run_ops(passed(SLOW, 5, datums(1, 9)))[0])["loss:sum"])
