"""Training ops: what becomes a row, what its row says, and what a retry gets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
import zstandard
from gateway_support import MAX_CONTEXT, OTHER_KEY, VOCAB_SIZE, Harness, failed, ok, refused

from treadle.domain.ids import ModelId, SamplingSessionId
from treadle.domain.limits import MAX_INLINE_PAYLOAD_BYTES, MAX_SEQ_ID_LEAD, QUANTUM_TOKENS
from treadle.domain.ops import AdamParams, OpKind, OptimStepOp, PassOp, SaveForSamplerOp, SaveWeightsOp
from treadle.domain.records import FinishedCycle, ModelAdvance
from treadle.domain.states import RequestState
from treadle.errors import UserError
from treadle.gateway import GatewaySettings, admission
from treadle.gateway.admission import INLINE_DECODE_BYTES
from treadle.gateway.intake import op_place
from treadle.telemetry.phases import EVENT
from treadle.testing.builders import datum, pass_op
from treadle.wire.passes import encode_pass

PROTOBUF = {"Content-Type": "application/x-protobuf"}


@pytest.fixture
async def model_id(gateway: Harness) -> ModelId:
    return ModelId(await gateway.new_model(await gateway.new_session()))


async def send_pass(gateway: Harness, op: PassOp, **options: str) -> httpx.Response:
    return await send_bytes(gateway, encode_pass(op), **options)


async def send_bytes(gateway: Harness, body: bytes, *, encoding: str = "", key: str = "tml-one") -> httpx.Response:
    headers = PROTOBUF | ({"Content-Encoding": encoding} if encoding else {})
    return await gateway.post("forward_backward", content=body, headers=headers, key=key)


async def test_a_pass_is_stored_as_the_client_sent_it(gateway: Harness, model_id: ModelId) -> None:
    body = encode_pass(pass_op(1, model_id=model_id, datums=[datum(5), datum(7, seed=1)]))
    answer = ok(await send_bytes(gateway, body))

    assert answer == {"request_id": f"{model_id}:1", "model_id": model_id}
    row = await gateway.row(answer["request_id"])
    assert (row.kind, row.seq_id, row.state) == (OpKind.FORWARD_BACKWARD, 1, RequestState.QUEUED)
    assert (row.num_tokens, row.quantum_tokens, row.model_id) == (12, (12,), model_id)
    assert await gateway.store.requests.payload(row.request_id) == (body, None)


async def test_a_forward_only_pass_is_a_forward(gateway: Harness, model_id: ModelId) -> None:
    answer = ok(await send_pass(gateway, pass_op(1, model_id=model_id, forward_only=True)))

    assert (await gateway.row(answer["request_id"])).kind is OpKind.FORWARD


async def test_a_pass_is_cut_into_quanta_of_whole_datums(gateway: Harness, model_id: ModelId) -> None:
    num_datums = QUANTUM_TOKENS // MAX_CONTEXT + 1
    datums = [datum(MAX_CONTEXT, seed=seed) for seed in range(num_datums)]
    answer = ok(await send_pass(gateway, pass_op(1, model_id=model_id, datums=datums)))

    row = await gateway.row(answer["request_id"])
    assert row.quantum_tokens == (QUANTUM_TOKENS, MAX_CONTEXT)
    assert row.num_tokens == QUANTUM_TOKENS + MAX_CONTEXT


@pytest.mark.parametrize("num_datums", [1, 200])
async def test_a_compressed_pass_is_stored_plain(gateway: Harness, model_id: ModelId, num_datums: int) -> None:
    body = encode_pass(pass_op(1, model_id=model_id, datums=[datum(MAX_CONTEXT)] * num_datums))
    assert (len(body) > INLINE_DECODE_BYTES) == (num_datums == 200)

    answer = ok(await send_bytes(gateway, zstandard.ZstdCompressor().compress(body), encoding="zstd"))

    payload, key = await gateway.store.requests.payload(answer["request_id"])
    assert (gateway.blobs.read(key) if key else payload) == body


async def test_a_large_payload_is_a_blob_that_is_there_before_its_row(gateway: Harness, model_id: ModelId) -> None:
    datums = [datum(MAX_CONTEXT, seed=seed) for seed in range(60)]
    body = encode_pass(pass_op(1, model_id=model_id, datums=datums))
    assert len(body) > MAX_INLINE_PAYLOAD_BYTES

    answer = ok(await send_bytes(gateway, body))

    row = await gateway.row(answer["request_id"])
    assert row.payload_key is not None
    assert row.payload_key.startswith("payloads/")
    assert gateway.blobs.read(row.payload_key) == body


async def test_a_retry_of_a_large_pass_leaves_no_blob_behind(gateway: Harness, model_id: ModelId) -> None:
    op = pass_op(1, model_id=model_id, datums=[datum(MAX_CONTEXT, seed=seed) for seed in range(60)])
    answers = await asyncio.gather(*(send_pass(gateway, op) for _ in range(4)))

    row = await gateway.row(f"{model_id}:1")
    assert {ok(answer)["request_id"] for answer in answers} == {row.request_id}
    assert list(gateway.blobs.iter_keys()) == [row.payload_key]


async def test_chunks_may_arrive_in_any_order(gateway: Harness, model_id: ModelId) -> None:
    for seq_id in (2, 3, 1):
        ok(await send_pass(gateway, pass_op(seq_id, model_id=model_id)))

    [line] = await gateway.store.requests.heads((await gateway.row(f"{model_id}:1")).pool)
    assert [row.seq_id for row in line] == [1, 2, 3]


async def test_a_retried_pass_gets_the_first_request(gateway: Harness, model_id: ModelId) -> None:
    first = ok(await send_pass(gateway, pass_op(1, model_id=model_id, datums=[datum(5)])))
    again = ok(await send_pass(gateway, pass_op(1, model_id=model_id, datums=[datum(9)])))

    assert again == first
    assert (await gateway.row(first["request_id"])).num_tokens == 5


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (pass_op(2, datums=[datum(MAX_CONTEXT + 1)]), str(MAX_CONTEXT)),
        (pass_op(2, datums=[datum(4, weights=[1, 1, float("nan"), 1])]), "weights"),
        (pass_op(2, datums=[]), "data"),
    ],
)
async def test_a_pass_that_cannot_be_honoured_is_a_failed_row(
    gateway: Harness, model_id: ModelId, op: PassOp, words: str
) -> None:
    bad = PassOp(model_id, op.seq_id, op.datums, op.loss, op.forward_only)

    answer = ok(await send_pass(gateway, bad))

    assert words in failed(await gateway.future(answer["request_id"]))
    assert (await gateway.row(answer["request_id"])).state is RequestState.FAILED
    # No hole is left, and the next good request works.
    assert await gateway.store.requests.known_seq_ids(model_id, 1, 9) == {2}
    ok(await send_pass(gateway, pass_op(3, model_id=model_id)))


async def test_an_unknown_loss_and_a_foreign_token_fail_through_the_future(gateway: Harness, model_id: ModelId) -> None:
    body = encode_pass(pass_op(1, model_id=model_id)).replace(b"cross_entropy", b"cross_entropi")
    assert "cross_entropi" in failed(await gateway.future(ok(await send_bytes(gateway, body))["request_id"]))

    op = pass_op(2, model_id=model_id)
    op.datums[0].tokens[0] = VOCAB_SIZE
    answer = ok(await send_pass(gateway, op))
    assert str(VOCAB_SIZE) in failed(await gateway.future(answer["request_id"]))


async def test_a_refusal_quotes_nothing_that_no_database_can_hold(gateway: Harness, model_id: ModelId) -> None:
    """PostgreSQL has no NUL in texts, and nobody encodes half of a surrogate pair."""
    body = encode_pass(pass_op(1, model_id=model_id)).replace(b"cross_entropy", b"cross\0entropy")
    message = failed(await gateway.future(ok(await send_bytes(gateway, body))["request_id"]))
    assert "\0" not in message
    assert "cross" in message

    model = await gateway.store.models.get(model_id)
    assert model is not None
    place = op_place(model, OpKind.OPTIM_STEP, 2)
    failure = admission.refused(place, UserError("a\0b \ud800 \u00fc")).failure
    assert failure is not None
    assert failure.message == "a\\0b \\ud800 \u00fc"


async def test_the_moment_of_the_commit_can_be_waited_for(
    gateway: Harness, model_id: ModelId, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="treadle"):
        ok(await send_pass(gateway, pass_op(1, model_id=model_id)))
    said = [record.treadle_fields for record in caplog.records if record.getMessage() == EVENT]
    assert ("queued", f"{model_id}:1") in [(fields["phase"], fields["request_id"]) for fields in said]


@pytest.mark.parametrize("body", [b"", b"garbage", b"\xff" * 100, b'{"model_id": "x"}'])
async def test_garbage_is_unreadable_at_once(gateway: Harness, body: bytes) -> None:
    refused(await send_bytes(gateway, body), 400)


async def test_seq_id_zero_is_unreadable(gateway: Harness, model_id: ModelId) -> None:
    assert "seq_id" in refused(await send_pass(gateway, pass_op(0, model_id=model_id)), 400)
    assert "seq_id" in refused(await gateway.post("optim_step", {"model_id": model_id, "adam_params": {}}), 400)


async def test_unknown_and_foreign_runs_look_alike(gateway: Harness, model_id: ModelId) -> None:
    unknown = refused(await send_pass(gateway, pass_op(1, model_id=ModelId("nothing"))), 404)
    foreign = refused(await send_pass(gateway, pass_op(1, model_id=model_id), key=OTHER_KEY), 404)

    assert foreign.replace(model_id, "nothing") == unknown


async def test_a_damaged_or_unknown_compression_is_refused(gateway: Harness, model_id: ModelId) -> None:
    body = encode_pass(pass_op(1, model_id=model_id))

    refused(await send_bytes(gateway, body, encoding="zstd"), 400)
    assert "br" in refused(await send_bytes(gateway, body, encoding="br"), 400)


class TestWithSmallLimits:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(
            is_loopback=True,
            hold_s=0.05,
            max_body_bytes=100_000,
            max_decompressed_bytes=1_000_000,
            max_datums_per_request=3,
        )

    async def test_a_zstd_bomb_is_refused(self, gateway: Harness) -> None:
        bomb = zstandard.ZstdCompressor().compress(bytes(50_000_000))
        assert len(bomb) < 100_000

        refused(await send_bytes(gateway, bomb, encoding="zstd"), 413)

    async def test_a_bomb_that_hides_its_size_is_refused(self, gateway: Harness) -> None:
        compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        bomb = compressor.compress(bytes(50_000_000)) + compressor.flush()

        refused(await send_bytes(gateway, bomb, encoding="zstd"), 413)

    async def test_a_body_that_announces_too_much_is_not_read(self, gateway: Harness) -> None:
        refused(await send_bytes(gateway, bytes(100_001)), 413)

    async def test_a_body_that_announces_nothing_is_cut_off_while_it_comes(self, gateway: Harness) -> None:
        num_sent = 0

        async def endless() -> object:
            nonlocal num_sent
            while True:
                num_sent += 1
                yield bytes(10_000)

        answer = await gateway.post("forward_backward", content=endless(), headers=PROTOBUF)

        refused(answer, 413)
        assert num_sent <= 12

    async def test_the_operators_limit_on_datums_holds(self, gateway: Harness) -> None:
        model_id = ModelId(await gateway.new_model(await gateway.new_session()))
        answer = ok(await send_pass(gateway, pass_op(1, model_id=model_id, datums=[datum(3)] * 4)))

        assert "takes 3" in failed(await gateway.future(answer["request_id"]))
        assert ok(await gateway.post("client/config"))["fwdbwd_max_chunk_len"] == 3


async def test_a_step_gets_the_sdks_defaults(gateway: Harness, model_id: ModelId) -> None:
    body = {"model_id": model_id, "seq_id": 4, "adam_params": {"learning_rate": 0.5}, "new_field": 1}
    answer = ok(await gateway.post("optim_step", body))

    assert await gateway.op(answer["request_id"]) == OptimStepOp(model_id, 4, AdamParams(learning_rate=0.5))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "adam_params"),
        ({"adam_params": {"learning_rate": -1}}, "learning_rate"),
        ({"adam_params": {"momentum": 0.9}}, "momentum"),
        ({"adam_params": {"learning_rate": None}}, "learning_rate"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 1}}, "dimuon"),
    ],
)
async def test_a_step_that_cannot_be_honoured_fails_through_its_future(
    gateway: Harness, model_id: ModelId, fields: dict[str, object], words: str
) -> None:
    answer = ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, **fields}))

    assert words in failed(await gateway.future(answer["request_id"]))


async def test_nan_as_a_learning_rate_fails_through_its_future(gateway: Harness, model_id: ModelId) -> None:
    body = f'{{"model_id": "{model_id}", "seq_id": 1, "adam_params": {{"learning_rate": NaN}}}}'.encode()

    answer = ok(await gateway.post("optim_step", content=body))

    assert "learning_rate" in failed(await gateway.future(answer["request_id"]))


async def test_a_save_keeps_name_time_to_live_and_metadata(gateway: Harness, model_id: ModelId) -> None:
    body = {
        "model_id": model_id,
        "seq_id": 1,
        "path": "0001",
        "ttl_seconds": 3600,
        "overwrite": True,
        "user_metadata": {"a": "b"},
    }
    answer = ok(await gateway.post("save_weights", body))

    assert await gateway.op(answer["request_id"]) == SaveWeightsOp(
        model_id, 1, name="0001", overwrite=True, ttl_s=3600, user_metadata={"a": "b"}
    )


@pytest.mark.parametrize("path", ["save_weights", "save_weights_for_sampler"])
@pytest.mark.parametrize("name", ["../../x", "a/b", "", "x" * 200, "tinker://a/weights/b"])
async def test_a_name_that_is_not_one_fails_through_the_future(
    gateway: Harness, model_id: ModelId, path: str, name: str
) -> None:
    answer = ok(await gateway.post(path, {"model_id": model_id, "seq_id": 1, "path": name}))

    failed(await gateway.future(answer["request_id"]))


async def test_a_time_to_live_out_of_range_fails_through_the_future(gateway: Harness, model_id: ModelId) -> None:
    body = {"model_id": model_id, "seq_id": 1, "path": "a", "ttl_seconds": 60}
    answer = ok(await gateway.post("save_weights", body))

    assert "ttl_seconds" in failed(await gateway.future(answer["request_id"]))


async def test_an_ephemeral_save_names_its_sampling_session(gateway: Harness, model_id: ModelId) -> None:
    body = {"model_id": model_id, "seq_id": 1, "sampling_session_seq_id": 7, "kind": "inflight"}
    first = ok(await gateway.post("save_weights_for_sampler", body))
    # A retry of the SDK counts the sampling session up; it is the same save.
    again = ok(await gateway.post("save_weights_for_sampler", {**body, "sampling_session_seq_id": 8}))

    assert again == first
    session_id = model_id.partition(":")[0]
    assert await gateway.op(first["request_id"]) == SaveForSamplerOp(
        model_id, 1, sampling_session_id=SamplingSessionId(f"{session_id}:sample:7"), is_inflight=True
    )


async def test_a_sampler_save_needs_a_name_or_a_session(gateway: Harness, model_id: ModelId) -> None:
    answer = ok(await gateway.post("save_weights_for_sampler", {"model_id": model_id, "seq_id": 1}))

    assert "sampling_session_seq_id" in failed(await gateway.future(answer["request_id"]))


async def test_an_ephemeral_save_under_a_taken_id_fails(gateway: Harness, model_id: ModelId) -> None:
    await gateway.new_sampler(model_id.partition(":")[0], 7)
    body = {"model_id": model_id, "seq_id": 1, "sampling_session_seq_id": 7}

    answer = ok(await gateway.post("save_weights_for_sampler", body))

    assert "sampling_session_seq_id=7" in failed(await gateway.future(answer["request_id"]))


async def test_while_the_base_model_loads_passes_wait_and_steps_are_queued(gateway: Harness, model_id: ModelId) -> None:
    gateway.pools[0] = replace(gateway.pools[0], facts=None, is_ready=False, reason="reading weights")

    refused(await send_pass(gateway, pass_op(1, model_id=model_id)), 503)
    ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {}}))


async def test_a_stopping_server_takes_no_ops(gateway: Harness, model_id: ModelId) -> None:
    gateway.is_draining = True

    refused(await send_pass(gateway, pass_op(1, model_id=model_id)), 503)
    refused(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}}), 503)


async def test_an_op_far_ahead_of_its_run_is_refused(gateway: Harness, model_id: ModelId) -> None:
    """Each id of a hole costs a row when it is given up, so that one request must not make two thousand million."""
    far = 2**31 - 1
    step = ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": far, "adam_params": {}}))
    assert str(far) in failed(await gateway.future(step["request_id"]))

    passed = ok(await send_pass(gateway, pass_op(far - 1, model_id=model_id)))
    assert str(far - 1) in failed(await gateway.future(passed["request_id"]))

    unload = ok(await gateway.post("unload_model", {"model_id": model_id, "seq_id": far - 2}))
    assert str(far - 2) in failed(await gateway.future(unload["request_id"]))


async def test_how_far_ahead_an_op_is_counts_from_where_its_run_is_now(gateway: Harness, model_id: ModelId) -> None:
    ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}}))
    advance = ModelAdvance(model_id, next_seq_id=50_000)
    await gateway.store.cycles.finish(await gateway.lease(), FinishedCycle(advances=(advance,)))

    step = {"model_id": model_id, "seq_id": 50_000 + MAX_SEQ_ID_LEAD, "adam_params": {}}

    assert (await gateway.row(ok(await gateway.post("optim_step", step))["request_id"])).state is RequestState.QUEUED
