"""What a sample asks to be recorded is on record from the moment that its result is there, and swept a day later."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from prometheus_client import CollectorRegistry
from scheduler_support import SESSION, Cluster

from treadle.config.tree import RetentionSettings
from treadle.domain.limits import STABILITY_RECORD_KEPT_S
from treadle.scheduler.sweeps import Sweeper
from treadle.telemetry.metrics import Metrics
from treadle.testing.builders import sample_op
from treadle.wire import treadle_pb2 as pb


def sweeper(cluster: Cluster) -> Sweeper:
    return Sweeper(
        store=cluster.store,
        blobs=cluster.blobs,
        pools=(),
        settings=RetentionSettings(session_silence_s=1e9),
        clock=cluster.clock.now,
        metrics=Metrics(CollectorRegistry()),
    )


async def test_a_sample_and_its_record_come_together_and_the_record_goes_after_a_day(cluster: Cluster) -> None:
    op = sample_op(1, seed=3, num_samples=2)
    kept = await cluster.submit_sample(replace(op, record_stability_info=True))
    message = pb.SampleOutput.FromString(await cluster.result(kept))
    ids = [f"{kept}:0", f"{kept}:1"]
    records = await cluster.store.stability.use(SESSION, ids)
    for id_, sequence in zip(ids, message.sequences, strict=True):
        assert records[id_].token_ids().tolist() == np.frombuffer(sequence.tokens, "<i4").tolist()
        assert records[id_].logprobs == sequence.logprobs
        assert records[id_].num_prompt_tokens == len(op.prompt)

    cluster.clock.advance(STABILITY_RECORD_KEPT_S - 1)
    assert "stability_records" not in {name for name, count in (await sweeper(cluster).sweep()).items() if count}
    cluster.clock.advance(2)
    assert (await sweeper(cluster).sweep())["stability_records"] == 2
    assert await cluster.store.stability.use(SESSION, ids) == {}


async def test_a_sample_that_does_not_ask_for_it_is_not_recorded(cluster: Cluster) -> None:
    plain = await cluster.submit_sample(sample_op(1))
    await cluster.result(plain)
    assert await cluster.store.stability.use(SESSION, [f"{plain}:0"]) == {}


async def test_a_sample_that_outlives_its_worker_records_what_its_client_gets(cluster: Cluster) -> None:
    await cluster.crash()
    request_id = await cluster.submit_sample(replace(sample_op(1, seed=9), record_stability_info=True))
    cluster.start()
    message = pb.SampleOutput.FromString(await cluster.result(request_id))
    (record,) = (await cluster.store.stability.use(SESSION, [f"{request_id}:0"])).values()
    assert record.tokens == message.sequences[0].tokens
