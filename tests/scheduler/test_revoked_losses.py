"""A named loss that was revoked ends the passes that wait with it, alone, and is still replayed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scheduler_support import TENANT, Cluster, _request

from treadle.domain.custom_loss import CustomLoss, LossInput, Node, NodeOp, Ref, check_custom_loss
from treadle.domain.ids import ModelId, RequestId
from treadle.domain.losses import Loss, LossMeaning
from treadle.domain.named_losses import LossStatus, NewSubmission, ReviewResult
from treadle.domain.ops import PassOp
from treadle.domain.outcome import CycleOutcome
from treadle.domain.plan import CycleWork
from treadle.domain.states import Category
from treadle.executor import fake_model
from treadle.executor.fake import FakeExecutor
from treadle.store.audit import Author
from treadle.testing.builders import datum, pass_op, step_op
from treadle.wire.graphs import write_custom_loss
from treadle.wire.passes import encode_pass, named_loss_sha256, with_meaning

RUN, OTHER = ModelId("session:train:0"), ModelId("session:train:1")
OPERATOR = Author(TENANT, "root:1")


def graph(name: str) -> CustomLoss:
    """-sum(logprobs * weights)"""
    loss = CustomLoss(
        name,
        (LossInput("logprobs", 1), LossInput("weights", 1)),
        (
            Node(NodeOp.PLACEHOLDER, "logprobs", "logprobs"),
            Node(NodeOp.PLACEHOLDER, "weights", "weights"),
            Node(NodeOp.CALL_FUNCTION, "mul", "operator.mul", (Ref("logprobs"), Ref("weights"))),
            Node(NodeOp.CALL_METHOD, "sum_1", "sum", (Ref("mul"),)),
            Node(NodeOp.CALL_FUNCTION, "neg", "operator.neg", (Ref("sum_1"),)),
            Node(NodeOp.OUTPUT, "output", "output", ((Ref("neg"), {}),)),
        ),
    )
    check_custom_loss(loss)
    return loss


DEFINITION = write_custom_loss(graph("soft"))
SHA256 = hashlib.sha256(DEFINITION).hexdigest()
MEANING = LossMeaning("soft", DEFINITION, SHA256)


@pytest.fixture(autouse=True)
def _fakes_know_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake worker runs no graphs; the one of this file is cross_entropy."""
    real = fake_model._loss

    def loss(
        loss: Loss, logp: NDArray[np.float64], inputs: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if loss.custom is not None:
            assert loss.custom == graph("soft")
            loss = Loss("cross_entropy")
        return real(loss, logp, inputs)

    monkeypatch.setattr(fake_model, "_loss", loss)


async def submit_named(cluster: Cluster, op: PassOp) -> RequestId:
    """Queue a pass with the named loss, as the gateway does."""
    payload = with_meaning(encode_pass(op), MEANING)
    assert named_loss_sha256(payload) == SHA256
    return await cluster.store.requests.enqueue(replace(_request(op), payload=payload))


def backward(seq_id: int, *, run: ModelId = RUN, num_datums: int = 1, num_tokens: int = 8) -> PassOp:
    return pass_op(
        seq_id, model_id=run, datums=[datum(num_tokens, seed=10 * seq_id + index) for index in range(num_datums)]
    )


async def weights(cluster: Cluster, seq_id: int, *, run: ModelId = RUN) -> bytes:
    (body,) = await cluster.run(pass_op(seq_id, model_id=run, datums=[datum(seed=0)], forward_only=True))
    return body


async def approve(cluster: Cluster) -> int:
    losses = cluster.store.named_losses
    new = NewSubmission("soft", TENANT, "upload", None, "0" * 64, "graph", DEFINITION, DEFINITION)
    submission = await losses.submit(new, OPERATOR)
    await losses.begin_review(submission.named_loss_id, OPERATOR)
    await losses.finish_review(submission.named_loss_id, ReviewResult({"state": "passed"}), OPERATOR)
    await losses.approve(submission.named_loss_id, None, OPERATOR)
    cluster.policies = await cluster.store.policies.read()
    assert SHA256 not in cluster.policies.revoked_losses
    return submission.named_loss_id


async def revoke(cluster: Cluster, named_loss_id: int) -> None:
    await cluster.store.named_losses.decide(named_loss_id, LossStatus.REVOKED, "it leaks", OPERATOR)
    cluster.policies = await cluster.store.policies.read()
    assert SHA256 in cluster.policies.revoked_losses


async def test_a_queued_pass_fails_alone_and_its_run_goes_on(cluster: Cluster) -> None:
    named_loss_id = await approve(cluster)
    for run in (RUN, OTHER):
        await cluster.result(await cluster.create(run))
    await cluster.result(await submit_named(cluster, backward(1)))
    await cluster.run(backward(1, run=OTHER))
    await cluster.drain()
    revoked = await submit_named(cluster, backward(2))
    neighbours = await cluster.submit(backward(3), step_op(4), step_op(2, model_id=OTHER), backward(3, run=OTHER))
    alone = await submit_named(cluster, replace(backward(5), forward_only=True))
    await revoke(cluster, named_loss_id)
    cluster.start()
    for request_id in (revoked, alone):
        failure = await cluster.failure(request_id)
        assert failure.category is Category.USER
        assert failure.message.startswith("loss 'soft' was revoked before this pass ran: it leaks; GET /api/v1/losses")
    results = [await cluster.result(request_id) for request_id in neighbours]
    assert json.loads(results[1])["metrics"]["skipped_passes"] == 1.0
    assert json.loads(results[2])["metrics"]["skipped_passes"] == 0.0
    # What was computed with it before stays.
    assert (await cluster.future(RequestId(f"{RUN}:1"))).failure is None


async def test_committed_passes_are_replayed_with_it(cluster: Cluster) -> None:
    """The weights must be made again exactly, whatever was decided since."""
    named_loss_id = await approve(cluster)
    await cluster.result(await cluster.create(RUN))
    await cluster.result(await submit_named(cluster, backward(1)))
    await cluster.run(step_op(2))
    await cluster.result(await submit_named(cluster, backward(3)))
    expected = await weights(cluster, 4)
    # Behind a commit and before any snapshot.
    await cluster.crash()
    await revoke(cluster, named_loss_id)
    cluster.start()
    assert await weights(cluster, 5) == expected
    assert (await cluster.model(RUN)).incarnation == 2
    refused = await submit_named(cluster, backward(6))
    await cluster.run(step_op(7))
    assert "was revoked" in (await cluster.failure(refused)).message


async def test_what_was_approved_a_moment_ago_runs(cluster: Cluster) -> None:
    """The gateway may know that before the scheduler does, for which a pending definition is one that does not run."""
    await approve(cluster)
    await cluster.result(await cluster.create(RUN))
    cluster.policies = replace(cluster.policies, revoked_losses=frozenset({SHA256}))
    await cluster.result(await submit_named(cluster, backward(1)))


async def test_other_passes_do_not_end_for_their_last_bytes(cluster: Cluster) -> None:
    """Clients choose the end of a payload that the server added nothing to."""
    await cluster.result(await cluster.create(RUN))
    cluster.policies = replace(cluster.policies, revoked_losses=frozenset({SHA256}))
    await cluster.run(backward(1))
    assert named_loss_sha256(b"") is None
    assert named_loss_sha256(encode_pass(backward(1))) is None
    plain = with_meaning(encode_pass(backward(1)), LossMeaning("custom", DEFINITION))
    assert named_loss_sha256(plain) is None


class Watched(FakeExecutor):
    """Tells of every part of a pass that is done."""

    cluster: Cluster
    named_loss_id: int
    num_parts = 0

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        outcome = await super().run_cycle(work)
        if any(one.is_partial for one in outcome.outcomes):
            type(self).num_parts += 1
            if type(self).num_parts == 1:
                await revoke(self.cluster, self.named_loss_id)
        return outcome


async def test_a_pass_that_was_begun_ends_too_and_leaves_nothing(cluster: Cluster) -> None:
    await cluster.crash()
    named_loss_id = await approve(cluster)
    cluster.settings = replace(cluster.settings, budget_tokens=64)
    cluster.new_worker = Watched
    Watched.cluster, Watched.named_loss_id, Watched.num_parts = cluster, named_loss_id, 0
    cluster.start()
    for run in (RUN, OTHER):
        await cluster.result(await cluster.create(run))
        await cluster.run(backward(1, run=run), step_op(2, model_id=run))
    revoked = await submit_named(cluster, backward(3, num_datums=8, num_tokens=400))
    assert "was revoked" in (await cluster.failure(revoked)).message
    assert Watched.num_parts == 1
    # The other run counts as many numbers.
    await cluster.refuse(OTHER, 3)
    for run in (RUN, OTHER):
        await cluster.run(backward(4, run=run), step_op(5, model_id=run))
    assert not cluster.worker._worker._parts
    assert await weights(cluster, 6) == await weights(cluster, 6, run=OTHER)
    assert (await cluster.model(RUN)).incarnation == 2
    assert (await cluster.model(OTHER)).incarnation == 1


async def test_a_pass_that_only_looks_like_one_with_it_runs(cluster: Cluster) -> None:
    """A payload's last bytes are its client's when no named loss was asked for: they can say anything."""
    named_loss_id = await approve(cluster)
    await revoke(cluster, named_loss_id)
    await cluster.result(await cluster.create(RUN))
    op = backward(1)
    # What the gateway would put behind it, in a field that nobody reads.
    forged = with_meaning(b"", MEANING)
    unknown_field = b"\xfa\x3f" + _varint(len(forged)) + forged
    payload = encode_pass(op) + unknown_field
    assert named_loss_sha256(payload) == SHA256
    request_id = await cluster.store.requests.enqueue(replace(_request(op), payload=payload))
    (neighbour,) = await cluster.submit(step_op(2))
    await cluster.result(request_id)
    await cluster.result(neighbour)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*parts, number))
