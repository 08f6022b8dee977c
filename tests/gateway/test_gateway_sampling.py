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

from treadle.domain.ids import CheckpointKind, SamplingSessionId
from treadle.domain.ops import OpKind, SampleOp
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
        ({"prompt_alt_tokens_k": 3}, "prompt_alt_tokens_k"),
    ],
)
async def test_a_sample_that_cannot_be_honoured_has_sequence_ids_all_the_same(
    gateway: Harness, sampler_id: str, changes: dict[str, object], words: str
) -> None:
    answer = ok(await gateway.post("asample", sample_body(sampler_id, **changes)))

    assert len(answer["sample_sequence_ids"]) == 2
    assert words in failed(await gateway.future(answer["request_id"]))
    assert (await gateway.row(answer["request_id"])).state is RequestState.FAILED


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
