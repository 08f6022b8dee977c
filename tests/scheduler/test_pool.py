"""The scheduler's loops over a real store and a fake worker: order, holes, names, deaths, commits."""

from __future__ import annotations

import json
from dataclasses import replace

import pyrage
import pytest
from scheduler_support import TENANT, Cluster

from treadle.domain.ids import CheckpointKind, ModelId, RequestId, SamplingSessionId, TinkerPath
from treadle.domain.limits import HANG_FACTOR
from treadle.domain.ops import LoadWeightsOp, SaveExternalOp, SaveForSamplerOp, SaveWeightsOp, UnloadModelOp
from treadle.domain.outcome import CycleOutcome, Failure, PoolFacts
from treadle.domain.plan import CycleWork
from treadle.domain.states import Category, ModelState
from treadle.errors import ServerError
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.fake import FakeExecutor
from treadle.testing.builders import datum, pass_op, sample_op, step_op

RUN = ModelId("session:train:0")
OTHER = ModelId("session:train:1")


def backward(seq_id: int, *, run: ModelId = RUN):  # type: ignore[no-untyped-def]
    return pass_op(seq_id, model_id=run)


async def forward(cluster: Cluster, seq_id: int, *, run: ModelId = RUN) -> bytes:
    """What the run's present weights give on one fixed datum."""
    (body,) = await cluster.run(pass_op(seq_id, model_id=run, datums=[datum(seed=0)], forward_only=True))
    return body


async def test_a_run_is_created_trained_and_logged(cluster: Cluster) -> None:
    created = await cluster.create(RUN)
    assert json.loads(await cluster.result(created))["model_id"] == RUN
    _, stepped = await cluster.run(backward(1), step_op(2))
    assert json.loads(stepped)["metrics"]["num_steps"] == 1
    record = await cluster.model(RUN)
    assert (record.state, record.next_seq_id, record.changed_seq) == (ModelState.READY, 3, 2)
    entries = await cluster.store.run_log.read(RUN, 10)
    assert [entry.seq_id for entry in entries] == [1, 2]
    assert "loss:sum" in entries[0].metrics


async def test_arrival_order_means_nothing(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.create(OTHER)
    await cluster.run(backward(1, run=OTHER), backward(2, run=OTHER), step_op(3, model_id=OTHER))
    await cluster.submit(step_op(3), backward(2))
    await cluster.run(backward(1))
    assert await forward(cluster, 4) == await forward(cluster, 4, run=OTHER)


async def test_a_hole_is_waited_for_and_then_given_up(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1))
    (stepped,) = await cluster.submit(step_op(4))
    await forward_of_another_run(cluster)
    assert (await cluster.store.requests.future(stepped)).state == "queued"  # type: ignore[union-attr]
    cluster.clock.advance(31.0)
    await cluster.submit(backward(5))
    assert json.loads(await cluster.result(stepped))["metrics"]["num_steps"] == 1
    for seq_id in (2, 3):
        failure = await cluster.failure(RequestId(f"{RUN}:{seq_id}"))
        assert failure.category is Category.USER
        assert "never received" in failure.message


async def forward_of_another_run(cluster: Cluster) -> None:
    """A whole cycle of somebody else, so that anything that could run has had its chance."""
    await cluster.result(await cluster.create(OTHER))
    await cluster.run(backward(1, run=OTHER))


async def test_refused_requests_are_stepped_over_and_counted_by_the_step(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.submit(backward(1))
    await cluster.refuse(RUN, 2)
    await cluster.refuse(RUN, 3)
    stepped, again = (await cluster.run(backward(4), step_op(5), backward(6), step_op(7)))[1::2]
    assert json.loads(stepped)["metrics"]["skipped_passes"] == 2
    assert json.loads(again)["metrics"]["skipped_passes"] == 0


async def test_ops_of_a_run_whose_creation_was_refused_fail_with_its_reason(cluster: Cluster) -> None:
    await cluster.create(RUN, refused=Failure("rank 0 is not allowed", Category.USER))
    (passed,) = await cluster.submit(backward(1))
    failure = await cluster.failure(passed)
    assert failure.category is Category.USER


async def test_a_name_is_taken_once_unless_overwritten(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(SaveWeightsOp(RUN, 1, name="a"))
    (taken,) = await cluster.submit(SaveWeightsOp(RUN, 2, name="a"))
    failure = await cluster.failure(taken)
    assert failure.category is Category.USER
    assert "exists" in failure.message
    twice = await cluster.submit(SaveWeightsOp(RUN, 3, name="b"), SaveWeightsOp(RUN, 4, name="b"))
    await cluster.result(twice[0])
    await cluster.failure(twice[1])
    path = str(TinkerPath(RUN, CheckpointKind.TRAINING, "a"))
    before = await cluster.store.checkpoints.find(path)
    await cluster.run(SaveWeightsOp(RUN, 5, name="a", overwrite=True))
    after = await cluster.store.checkpoints.find(path)
    assert before is not None
    assert after is not None
    assert before.blob_key != after.blob_key
    # A sampler checkpoint of the same name is another thing.
    await cluster.run(SaveForSamplerOp(RUN, 6, name="a"))


@pytest.mark.parametrize("is_inflight", [False, True])
async def test_an_ephemeral_save_makes_its_sampling_session(cluster: Cluster, is_inflight: bool) -> None:
    await cluster.create(RUN)
    session_id = SamplingSessionId("session:sample:1")
    (body,) = await cluster.run(SaveForSamplerOp(RUN, 1, sampling_session_id=session_id, is_inflight=is_inflight))
    assert json.loads(body)["sampling_session_id"] == session_id
    session = await cluster.store.sampling.get(session_id)
    assert session is not None
    assert session.blob_key is not None
    assert (session.tenant_id, session.model_id) == (TENANT, RUN)
    assert (session.seq_id, session.is_inflight) == (1, is_inflight)


async def test_create_from_a_checkpoint_and_unload(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2), SaveWeightsOp(RUN, 3, name="a"))
    checkpoint = await cluster.store.checkpoints.find(str(TinkerPath(RUN, CheckpointKind.TRAINING, "a")))
    assert checkpoint is not None
    load = LoadWeightsOp(
        OTHER, 0, checkpoint.tinker_path, checkpoint.blob_key, checkpoint.lora, with_optimizer=True, creates_model=True
    )
    body = json.loads(await cluster.result(await cluster.load(load)))
    assert body["model_id"] == OTHER
    assert await forward(cluster, 1, run=OTHER) == await forward(cluster, 4)
    await cluster.run(UnloadModelOp(OTHER, 2))
    (late,) = await cluster.submit(backward(3, run=OTHER))
    assert (await cluster.failure(late)).category is Category.USER


async def test_a_drained_pool_goes_on_exactly_where_it_was(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2), backward(3))
    expected = await forward(cluster, 4)
    await cluster.drain()
    (queued,) = await cluster.submit(step_op(5))
    cluster.start()
    assert json.loads(await cluster.result(queued))["metrics"]["num_steps"] == 2
    assert len(cluster.executors) == 2
    assert (await cluster.model(RUN)).incarnation == 2
    assert expected != await forward(cluster, 6)


async def test_a_crash_costs_a_run_nothing_but_time(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.create(OTHER)
    await cluster.run(backward(1), step_op(2), SaveWeightsOp(RUN, 3, name="safe"), backward(4), step_op(5))
    expected = await forward(cluster, 6)
    await cluster.crash()
    changed, fresh = await cluster.submit(step_op(8), backward(1, run=OTHER))
    await cluster.submit(backward(7))
    cluster.start()
    assert json.loads(await cluster.result(changed))["metrics"]["num_steps"] == 3
    await cluster.result(fresh)  # nothing had changed this one, so its seed is its state
    record = await cluster.model(RUN)
    assert (record.state, record.incarnation) == (ModelState.READY, 2)
    await cluster.restart()
    assert await forward(cluster, 9) != expected


async def test_a_save_makes_a_crash_harmless(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2), backward(3), SaveWeightsOp(RUN, 4, name="open"))
    expected = await forward(cluster, 5)
    await cluster.crash()
    cluster.start()
    assert await forward(cluster, 6) == expected
    (stepped,) = await cluster.run(step_op(7))
    assert json.loads(stepped)["metrics"]["num_steps"] == 2


class Poisoned(FakeExecutor):
    """A worker that dies of one request."""

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        if any(item.planned.request_id == f"{RUN}:1" for item in work.items):
            self.die("poison")
        return await super().run_cycle(work)


async def test_a_request_that_kills_its_worker_three_times_is_given_up(cluster: Cluster) -> None:
    cluster.new_worker = Poisoned
    await cluster.restart()
    await cluster.create(RUN)
    (poison, behind) = await cluster.submit(backward(1), backward(2))
    failure = await cluster.failure(poison)
    assert failure.category is Category.SERVER
    assert "3 times" in failure.message
    await cluster.result(behind)
    assert len(cluster.executors) >= 4


async def test_a_commit_that_fails_is_void_in_the_worker_too(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step ran, its commit did not: it is run once more, from the state before it."""
    await cluster.create(RUN)
    await cluster.create(OTHER)
    await cluster.run(backward(1), SaveWeightsOp(RUN, 2, name="a"), backward(1, run=OTHER), step_op(2, model_id=OTHER))
    real = cluster.store.cycles.finish
    failures = [ServerError("the database refused a statement")]

    async def failing(*args: object, **kwargs: object) -> None:
        if failures:
            raise failures.pop()
        await real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(cluster.store.cycles, "finish", failing)
    (stepped,) = await cluster.run(step_op(3))
    assert not failures
    assert json.loads(stepped)["metrics"]["num_steps"] == 1
    assert await forward(cluster, 4) == await forward(cluster, 3, run=OTHER)


async def test_samples_survive_their_worker(cluster: Cluster) -> None:
    first = await cluster.submit_sample(sample_op(1, seed=3))
    expected = await cluster.result(first)
    second = await cluster.submit_sample(sample_op(2, seed=3))
    cluster.worker.die("killed")
    assert await cluster.result(second) == expected


async def test_tokens_of_a_pass_spread_over_cycles_are_counted_whole(cluster: Cluster) -> None:
    await cluster.drain()
    cluster.settings = replace(cluster.settings, budget_tokens=2048)
    cluster.start()
    await cluster.create(RUN)
    await cluster.run(pass_op(1, model_id=RUN, datums=[datum(1500, seed=seed) for seed in range(3)]), step_op(2))
    assert await cluster.store.cycles.trained_tokens(TENANT) == 4500
    (entry, _) = await cluster.store.run_log.read(RUN, 10)
    assert entry.metrics["num_tokens"] == 4500


class Predicted(FakeExecutor):
    """Says that it is a large model, and notes how long its first cycle with tokens was predicted to take."""

    predicted_s: float = 0.0

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        facts = await super().start(on_samples=on_samples, on_death=on_death)
        return replace(facts, num_parameters=500_000_000)

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        if not self.predicted_s and any(item.planned.num_tokens for item in work.items):
            self.predicted_s = work.predicted_s
        return await super().run_cycle(work)


async def test_the_first_cycle_of_a_large_model_is_not_expected_to_be_quick(cluster: Cluster) -> None:
    """Else its worker would count as hung, again and again, and its request as poison."""
    cluster.new_worker = Predicted
    await cluster.restart()
    await cluster.result(await cluster.create(RUN))
    await cluster.run(pass_op(1, model_id=RUN, datums=[datum(num_tokens=2_000)]))
    assert isinstance(cluster.worker, Predicted)
    assert 60 < cluster.worker.predicted_s * HANG_FACTOR < 3_600


async def test_an_export_is_a_checkpoint_of_its_own_kind(cluster: Cluster) -> None:
    await cluster.create(RUN)
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    plain, closed = await cluster.run(
        SaveExternalOp(RUN, 1, name="a", ttl_s=3600), SaveExternalOp(RUN, 2, name="b", recipients=(recipient,))
    )
    body = json.loads(plain)
    record = await cluster.store.checkpoints.find(body["path"])
    assert record is not None
    assert (record.kind, record.is_encrypted) == (CheckpointKind.EXTERNAL, False)
    assert record.expires_at == cluster.clock.now() + 3600
    assert body["size_bytes"] == record.size_bytes == cluster.blobs.size(record.blob_key)
    encrypted = await cluster.store.checkpoints.find(json.loads(closed)["path"])
    assert encrypted is not None
    assert encrypted.is_encrypted
    (taken,) = await cluster.submit(SaveExternalOp(RUN, 3, name="a"))
    assert "exists" in (await cluster.failure(taken)).message
    # A training checkpoint of the same name is another thing, and training goes on.
    await cluster.run(backward(4), step_op(5), SaveWeightsOp(RUN, 6, name="a"))
