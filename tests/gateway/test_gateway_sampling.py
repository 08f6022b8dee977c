"""Sampling sessions and samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gateway_support import (
    DRAWN_SEED,
    MAX_CONTEXT,
    OTHER_KEY,
    OTHER_POOL,
    POOL,
    VOCAB_SIZE,
    Harness,
    failed,
    ok,
    prompt,
    refused,
    sample_body,
)

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, SamplingSessionId
from treadle.domain.ops import OpKind, SampleOp
from treadle.domain.records import SamplingSessionRecord
from treadle.domain.states import RequestState
from treadle.gateway.admission import INLINE_DECODE_BYTES


@pytest.fixture
async def session_id(gateway: Harness) -> str:
    return await gateway.new_session()


@pytest.fixture
async def sampler_id(gateway: Harness, session_id: str) -> str:
    return await gateway.new_sampler(session_id)


def session_body(session_id: str, seq_id: int = 0, **weights: object) -> dict[str, object]:
    return {"session_id": session_id, "sampling_session_seq_id": seq_id, **weights}


async def test_a_session_over_a_base_model(gateway: Harness, session_id: str) -> None:
    answer = ok(await gateway.post("create_sampling_session", session_body(session_id, 4, base_model=POOL)))

    assert answer["sampling_session_id"] == f"{session_id}:sample:4"
    shown = ok(await gateway.get(f"samplers/{session_id}:sample:4"))
    assert shown == {"sampler_id": f"{session_id}:sample:4", "base_model": POOL}


@pytest.mark.parametrize("kind", [CheckpointKind.SAMPLER, CheckpointKind.TRAINING])
@pytest.mark.parametrize("base_model", [None, POOL, "/models/base"])
async def test_a_session_over_a_checkpoint(
    gateway: Harness, session_id: str, kind: CheckpointKind, base_model: str | None
) -> None:
    model_id = await gateway.new_model(session_id)
    checkpoint = await gateway.publish(model_id, "a", kind=kind)
    body = session_body(session_id, base_model=base_model, model_path=checkpoint.tinker_path)

    sampler_id = ok(await gateway.post("create_sampling_session", body))["sampling_session_id"]

    shown = ok(await gateway.get(f"samplers/{sampler_id}"))
    assert (shown["base_model"], shown["model_path"]) == (POOL, checkpoint.tinker_path)
    record = await gateway.store.sampling.get(SamplingSessionId(sampler_id))
    assert record is not None
    assert record.blob_key == checkpoint.blob_key
    op = await gateway.op(ok(await gateway.post("asample", sample_body(sampler_id)))["request_id"])
    assert isinstance(op, SampleOp)
    assert op.blob_key == checkpoint.blob_key


async def test_a_retried_session_is_the_first_one(gateway: Harness, session_id: str) -> None:
    first = ok(await gateway.post("create_sampling_session", session_body(session_id, base_model=POOL)))
    again = ok(await gateway.post("create_sampling_session", session_body(session_id, base_model=OTHER_POOL)))

    assert again == first
    assert ok(await gateway.get(f"samplers/{first['sampling_session_id']}"))["base_model"] == POOL


@pytest.mark.parametrize(
    ("weights", "status", "words"),
    [
        ({}, 400, "base_model or model_path"),
        ({"base_model": "no/such"}, 404, "served: fake/base"),
        ({"model_path": "nonsense"}, 400, "tinker://"),
        ({"model_path": "tinker://a/weights/b"}, 404, "does not exist"),
        ({"model_path": "tinker://a/external_weights/b"}, 400, "external_weights"),
    ],
)
async def test_weights_that_are_not_there_are_refused_at_once(
    gateway: Harness, session_id: str, weights: dict[str, object], status: int, words: str
) -> None:
    assert words in refused(await gateway.post("create_sampling_session", session_body(session_id, **weights)), status)


async def test_base_model_and_checkpoint_must_agree(gateway: Harness, session_id: str) -> None:
    model_id = await gateway.new_model(session_id)
    checkpoint = await gateway.publish(model_id, "a")
    body = session_body(session_id, base_model=OTHER_POOL, model_path=checkpoint.tinker_path)

    assert "belongs to base model" in refused(await gateway.post("create_sampling_session", body), 400)


async def test_somebody_elses_checkpoint_can_be_sampled_only_when_public(gateway: Harness, session_id: str) -> None:
    foreign = await gateway.new_model(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
    private = await gateway.publish(foreign, "private", key=OTHER_KEY)
    public = await gateway.publish(foreign, "public", key=OTHER_KEY, public=True)

    body = session_body(session_id, 1, model_path=private.tinker_path)
    refused(await gateway.post("create_sampling_session", body), 404)
    ok(await gateway.post("create_sampling_session", session_body(session_id, 2, model_path=public.tinker_path)))


async def test_each_client_that_joins_gets_a_number_of_its_own(gateway: Harness, sampler_id: str) -> None:
    body = {"sampling_session_id": sampler_id}
    counters = [ok(await gateway.post("join_sampling_session", body))["client_counter"] for _ in range(3)]

    assert counters == [1, 2, 3]
    refused(await gateway.post("join_sampling_session", body, key=OTHER_KEY), 404)


async def test_a_sample_knows_its_sequence_ids_at_once(gateway: Harness, sampler_id: str) -> None:
    answer = ok(await gateway.post("asample", sample_body(sampler_id, 9, num_samples=3)))

    assert answer["request_id"] == f"{sampler_id}:9"
    assert len(set(answer["sample_sequence_ids"])) == 3
    row = await gateway.row(answer["request_id"])
    assert (row.kind, row.seq_id, row.sampling_session_id) == (OpKind.SAMPLE, 9, sampler_id)
    assert row.num_tokens == 3 + 3 * 4
    op = await gateway.op(answer["request_id"])
    assert isinstance(op, SampleOp)
    assert np.array_equal(op.prompt, [1, 2, 3])
    assert (op.num_samples, op.params.seed, op.params.max_tokens, op.blob_key) == (3, DRAWN_SEED, 4, None)


async def test_without_max_tokens_a_sample_may_run_to_the_end_of_the_context(gateway: Harness, sampler_id: str) -> None:
    answer = ok(await gateway.post("asample", sample_body(sampler_id, sampling_params={}, num_samples=2)))

    assert (await gateway.row(answer["request_id"])).num_tokens == 3 + 2 * (MAX_CONTEXT - 3)


async def test_a_retried_sample_gets_the_same_ids(gateway: Harness, sampler_id: str) -> None:
    first = ok(await gateway.post("asample", sample_body(sampler_id)))
    await gateway.finish(first["request_id"], b"x", content_type="application/x-protobuf")

    assert ok(await gateway.post("asample", sample_body(sampler_id))) == first


async def test_clones_count_from_far_away(gateway: Harness, sampler_id: str) -> None:
    seq_id = 999_999_999 * 10**9 + 1
    answer = ok(await gateway.post("asample", sample_body(sampler_id, seq_id)))

    assert (await gateway.row(answer["request_id"])).seq_id == seq_id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": prompt([])}, "no tokens"),
        ({"prompt": prompt([VOCAB_SIZE])}, "vocabulary"),
        ({"prompt": prompt([1] * MAX_CONTEXT)}, "context window"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "image"),
        ({"prompt": None}, "prompt"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"presence_penalty": 1}}, "presence_penalty"),
        ({"sampling_params": {"stop": [1, "a"]}}, "stop"),
        ({"prompt_alt_tokens_k": 129}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}}, "target_prompt_logprobs"),
        ({"topk_sample_logprobs": VOCAB_SIZE + 1}, "topk_sample_logprobs"),
        ({"base_model": OTHER_POOL}, f"{OTHER_POOL}' is not what"),
        ({"base_model": "no/such"}, "no/such"),
        ({"model_path": "tinker://a/weights/b"}, "tinker://a/weights/b' is not what"),
    ],
)
async def test_a_sample_that_cannot_be_honoured_has_sequence_ids_all_the_same(
    gateway: Harness, sampler_id: str, changes: dict[str, object], words: str
) -> None:
    answer = ok(await gateway.post("asample", sample_body(sampler_id, **changes)))

    assert len(answer["sample_sequence_ids"]) == 2
    assert words in failed(await gateway.future(answer["request_id"]))
    assert (await gateway.row(answer["request_id"])).state is RequestState.FAILED


async def test_every_field_of_a_sample_is_stored_with_it(gateway: Harness, sampler_id: str) -> None:
    fields = {
        "prompt_logprobs": True,
        "prompt_logprobs_last_n": 1,
        "topk_sample_logprobs": 4,
        "prompt_alt_tokens_k": 2,
        "record_stability_info": True,
        "target_prompt_logprobs": {"data": [5, -1], "dtype": "int64", "shape": [2, 1]},
        "base_model": POOL,
    }

    op = await gateway.op(ok(await gateway.post("asample", sample_body(sampler_id, **fields)))["request_id"])

    assert isinstance(op, SampleOp)
    assert (op.prompt_logprobs_last_n, op.topk_sample_logprobs, op.prompt_alt_tokens_k) == (1, 4, 2)
    assert op.record_stability_info
    assert op.target_prompt_logprobs is not None
    assert op.target_prompt_logprobs.token_ids.tolist() == [5, -1]


async def test_a_sample_without_a_sampling_session_is_told_how_to_get_one(gateway: Harness) -> None:
    body = sample_body("x", base_model=POOL)
    del body["sampling_session_id"]

    assert "create_sampling_session" in refused(await gateway.post("asample", body), 400)


async def inflight_version(gateway: Harness, model_id: str, seq_id: int, *, is_inflight: bool = True) -> str:
    """A sampling session as a save of the run makes it."""
    model = await gateway.store.models.get(ModelId(model_id))
    assert model is not None
    record = SamplingSessionRecord(
        sampling_session_id=SamplingSessionId(f"{model.session_id}:sample:{seq_id}"),
        session_id=model.session_id,
        tenant_id=model.tenant_id,
        pool=model.pool,
        base_model=model.base_model,
        created_at=gateway.clock.now(),
        blob_key=BlobKey(f"states/{seq_id}"),
        model_id=model.model_id,
        seq_id=seq_id,
        is_inflight=is_inflight,
    )
    return (await gateway.store.sampling.create(record)).sampling_session_id


async def test_inflight_clients_take_the_newest_weights_and_a_sample_keeps_its_own(
    gateway: Harness, session_id: str
) -> None:
    model_id = await gateway.new_model(session_id)

    async def weights_of(sampler_id: str, seq_id: int) -> str | None:
        op = await gateway.op(ok(await gateway.post("asample", sample_body(sampler_id, seq_id)))["request_id"])
        assert isinstance(op, SampleOp)
        return op.blob_key

    first = await inflight_version(gateway, model_id, 2)
    assert await weights_of(first, 1) == "states/2"
    second = await inflight_version(gateway, model_id, 4)
    snapshot = await inflight_version(gateway, model_id, 6, is_inflight=False)
    assert await weights_of(first, 2) == "states/4"
    assert await weights_of(second, 1) == "states/4"
    assert await weights_of(snapshot, 1) == "states/6"
    newest = await inflight_version(gateway, model_id, 8)
    assert await weights_of(first, 3) == "states/8"
    assert await weights_of(newest, 1) == "states/8"
    assert await weights_of(snapshot, 2) == "states/6"
    # What was admitted before keeps its weights, however often it is sent again.
    assert await weights_of(first, 1) == "states/2"
    assert await weights_of(first, 2) == "states/4"


async def test_an_inflight_client_outlives_the_weights_of_its_own_save(gateway: Harness, session_id: str) -> None:
    model_id = await gateway.new_model(session_id)
    first = await inflight_version(gateway, model_id, 2)
    for seq_id in (3, 4, 5, 6, 7):
        await inflight_version(gateway, model_id, seq_id)
    gateway.clock.advance(10.0)

    count, _ = await gateway.store.retention.drop_versions(
        keep=4, unused_since=gateway.clock.now(), finished_before=0.0
    )

    assert count == 2
    answer = ok(await gateway.post("asample", sample_body(first)))
    op = await gateway.op(answer["request_id"])
    assert isinstance(op, SampleOp)
    assert op.blob_key == "states/7"


@pytest.mark.parametrize("num_samples", [0, -1, 10**9, "3", None, True])
async def test_a_number_of_samples_that_is_none_gets_one_id(
    gateway: Harness, sampler_id: str, num_samples: object
) -> None:
    answer = ok(await gateway.post("asample", sample_body(sampler_id, num_samples=num_samples)))

    assert len(answer["sample_sequence_ids"]) == 1


async def test_a_sample_over_a_megabyte_is_decoded_off_the_event_loop(gateway: Harness, sampler_id: str) -> None:
    tokens = [1] * INLINE_DECODE_BYTES

    answer = ok(await gateway.post("asample", sample_body(sampler_id, prompt=prompt(tokens))))

    assert "context window" in failed(await gateway.future(answer["request_id"]))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"{}", b'{"seq_id": 1}'])
async def test_a_sample_without_an_address_is_unreadable(gateway: Harness, body: bytes) -> None:
    refused(await gateway.post("asample", content=body), 400)


async def test_unknown_and_foreign_samplers_look_alike(gateway: Harness, sampler_id: str) -> None:
    unknown = refused(await gateway.post("asample", sample_body("nothing")), 404)
    foreign = refused(await gateway.post("asample", sample_body(sampler_id), key=OTHER_KEY), 404)

    assert foreign.replace(sampler_id, "nothing") == unknown
    refused(await gateway.get(f"samplers/{sampler_id}", key=OTHER_KEY), 404)


async def test_while_the_base_model_loads_samples_are_to_be_sent_again(gateway: Harness, sampler_id: str) -> None:
    gateway.pools[0] = replace(gateway.pools[0], facts=None, is_ready=False)

    refused(await gateway.post("asample", sample_body(sampler_id)), 503)


async def test_a_base_model_that_left_the_server_is_a_failure_with_a_name(gateway: Harness, sampler_id: str) -> None:
    del gateway.pools[0]

    answer = ok(await gateway.post("asample", sample_body(sampler_id)))

    assert POOL in failed(await gateway.future(answer["request_id"]))
