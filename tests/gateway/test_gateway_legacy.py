"""What SDKs before 0.25 send and read: JSON passes, /forward, JSON results, lists without what they do not know."""

from __future__ import annotations

import threading

import httpx
import numpy as np
import pytest
from gateway_support import KEY, MAX_CONTEXT, OTHER_KEY, VOCAB_SIZE, Harness, failed, ok, refused, sample_body

from treadle.domain.ids import CheckpointKind, ModelId
from treadle.domain.limits import MAX_INLINE_PAYLOAD_BYTES
from treadle.domain.ops import OpKind, PassOp
from treadle.domain.outcome import PassResult, SampledSequence, SampleResult
from treadle.domain.states import RequestState, StopReason
from treadle.gateway.admission import INLINE_DECODE_BYTES
from treadle.gateway.routes import training
from treadle.gateway.sdk_versions import parsed_version
from treadle.testing.builders import datum, pass_op
from treadle.wire.passes import encode_pass
from treadle.wire.results import encode_pass_result, encode_sample_result

OLD = {"Accept": "application/json", "X-Stainless-Package-Version": "0.16.1"}


@pytest.fixture
async def model_id(gateway: Harness) -> ModelId:
    return ModelId(await gateway.new_model(await gateway.new_session()))


def json_pass(op: PassOp, *, field: str = "forward_backward_input") -> dict[str, object]:
    """The body of SDK 0.16.1."""
    data = [
        {
            "loss_fn_inputs": {
                name: {
                    "data": values.tolist(),
                    "dtype": "int64" if values.dtype.kind == "i" else "float32",
                    "shape": list(values.shape),
                }
                for name, values in datum.inputs.items()
            },
            "model_input": {"chunks": [{"tokens": datum.tokens.tolist()}]},
        }
        for datum in op.datums
    ]
    return {field: {"data": data, "loss_fn": op.loss.name}, "model_id": op.model_id, "seq_id": op.seq_id}


async def stored(gateway: Harness, request_id: str) -> bytes:
    payload, key = await gateway.store.requests.payload((await gateway.row(request_id)).request_id)
    return gateway.blobs.read(key) if key else payload


async def test_a_json_pass_is_stored_as_the_protobuf_of_a_newer_sdk(gateway: Harness, model_id: ModelId) -> None:
    op = pass_op(1, model_id=model_id, datums=[datum(5), datum(7, seed=1, weights=[0.1] * 7)])

    answer = ok(await gateway.post("forward_backward", json_pass(op), headers=OLD))

    assert answer == {"request_id": f"{model_id}:1", "model_id": model_id}
    row = await gateway.row(answer["request_id"])
    assert (row.kind, row.state, row.num_tokens) == (OpKind.FORWARD_BACKWARD, RequestState.QUEUED, 12)
    assert await stored(gateway, answer["request_id"]) == encode_pass(op)
    # A retry, be it as JSON or as protobuf, is the same request.
    assert ok(await gateway.post("forward_backward", json_pass(op), headers=OLD)) == answer
    protobuf = {"Content-Type": "application/x-protobuf"}
    assert ok(await gateway.post("forward_backward", content=encode_pass(op), headers=protobuf)) == answer


async def test_forward_has_an_endpoint_of_its_own(gateway: Harness, model_id: ModelId) -> None:
    op = pass_op(1, model_id=model_id, forward_only=True)
    answer = ok(await gateway.post("forward", json_pass(op, field="forward_input"), headers=OLD))
    assert (await gateway.row(answer["request_id"])).kind is OpKind.FORWARD
    assert await stored(gateway, answer["request_id"]) == encode_pass(op)


@pytest.mark.parametrize("path", ["forward", "forward_backward"])
async def test_mistakes_come_through_the_future(gateway: Harness, model_id: ModelId, path: str) -> None:
    field = "forward_input" if path == "forward" else "forward_backward_input"
    too_high = datum(3)
    too_high.tokens[1] = VOCAB_SIZE
    bodies = [
        ({field: {"data": "none", "loss_fn": "cross_entropy"}}, "list of datums"),
        (json_pass(pass_op(2, model_id=model_id, datums=[too_high]), field=field), "vocabulary"),
        (json_pass(pass_op(3, model_id=model_id, datums=[datum(MAX_CONTEXT + 1)]), field=field), "context length"),
        ({"something_else": 1}, field),
    ]
    for seq_id, (body, word) in enumerate(bodies, start=1):
        answer = ok(await gateway.post(path, {**body, "model_id": model_id, "seq_id": seq_id}, headers=OLD))
        assert word in failed(await gateway.future(answer["request_id"]))
        row = await gateway.row(answer["request_id"])
        assert row.kind in (OpKind.FORWARD, OpKind.FORWARD_BACKWARD)
        assert (row.kind is OpKind.FORWARD) == (path == "forward")


async def test_whose_run_it_is_is_decided_first(gateway: Harness, model_id: ModelId) -> None:
    body = json_pass(pass_op(1, model_id=model_id))
    unknown = refused(await gateway.post("forward_backward", {**body, "model_id": "nothing"}, headers=OLD), 404)
    foreign = refused(await gateway.post("forward_backward", body, headers=OLD, key=OTHER_KEY), 404)
    assert foreign.replace(model_id, "nothing") == unknown
    assert "seq_id" in refused(await gateway.post("forward", {"model_id": model_id}, headers=OLD), 400)


async def test_a_large_body_is_read_off_the_event_loop(
    gateway: Harness, model_id: ModelId, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def read(raw: bytes) -> object:
        threads.append(threading.current_thread())
        return whole(raw)

    whole = training._read_json
    monkeypatch.setattr(training, "_read_json", read)
    small = pass_op(1, model_id=model_id)
    large = pass_op(2, model_id=model_id, datums=[datum(MAX_CONTEXT, seed=seed) for seed in range(100)])
    for op in (small, large):
        answer = ok(await gateway.post("forward_backward", json_pass(op), headers=OLD))
        assert await stored(gateway, answer["request_id"]) == encode_pass(op)
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()
    assert len(encode_pass(large)) > MAX_INLINE_PAYLOAD_BYTES


async def result_of(gateway: Harness, request_id: str, headers: dict[str, str]) -> httpx.Response:
    return await gateway.post("retrieve_future", {"request_id": request_id}, headers=headers)


@pytest.mark.parametrize("num_tokens", [3, INLINE_DECODE_BYTES // 4])
async def test_a_pass_is_answered_as_it_is_asked_for(gateway: Harness, model_id: ModelId, num_tokens: int) -> None:
    encoded = encode_pass_result(PassResult((np.full(num_tokens, -0.1, np.float32),), {"loss:sum": 0.5}))
    request_id = ok(await gateway.post("forward_backward", json_pass(pass_op(1, model_id=model_id))))["request_id"]
    await gateway.finish(request_id, encoded.body, content_type=encoded.content_type)

    old = await result_of(gateway, request_id, OLD)
    assert old.headers["content-type"] == "application/json"
    body = ok(old)
    assert body["metrics"] == {"loss:sum": 0.5}
    [fields] = body["loss_fn_outputs"]
    assert fields["logprobs"]["data"] == [float(np.float32(-0.1))] * num_tokens

    both = {"Accept": "application/x-protobuf, application/json"}
    assert (await result_of(gateway, request_id, both)).content == encoded.body


async def test_a_second_accept_header_counts_too(gateway: Harness, model_id: ModelId) -> None:
    """SDKs add theirs to the usual one."""
    encoded = encode_pass_result(PassResult((np.zeros(3, np.float32),), {"loss:sum": 0.5}))
    request_id = ok(await gateway.post("forward_backward", json_pass(pass_op(1, model_id=model_id))))["request_id"]
    await gateway.finish(request_id, encoded.body, content_type=encoded.content_type)
    headers = [("X-API-Key", KEY), ("Accept", "application/json"), ("accept", "application/x-protobuf")]
    answer = await gateway.client.post("/api/v1/retrieve_future", json={"request_id": request_id}, headers=headers)
    assert answer.content == encoded.body


async def test_a_sample_is_answered_in_json(gateway: Harness) -> None:
    sampler_id = await gateway.new_sampler(await gateway.new_session())
    request_id = ok(await gateway.post("asample", sample_body(sampler_id), headers=OLD))["request_id"]
    sequence = SampledSequence(np.array([5], np.int32), np.array([-0.5], np.float32), StopReason.LENGTH)
    prompt_logprobs = np.array([np.nan, -1.0, -2.0], np.float32)
    encoded = encode_sample_result(SampleResult((sequence,), prompt_logprobs=prompt_logprobs))
    await gateway.finish(request_id, encoded.body, content_type=encoded.content_type)

    body = ok(await result_of(gateway, request_id, OLD))

    assert body["prompt_logprobs"] == [None, -1.0, -2.0]
    assert body["sequences"] == [{"stop_reason": "length", "tokens": [5], "logprobs": [-0.5]}]


async def test_external_weights_are_not_listed_to_who_does_not_know_them(gateway: Harness, model_id: ModelId) -> None:
    await gateway.publish(model_id, "a")
    await gateway.publish(model_id, "b", kind=CheckpointKind.EXTERNAL)

    async def listed(version: str) -> list[tuple[set[str], int]]:
        found = []
        for path in (f"training_runs/{model_id}/checkpoints", "checkpoints"):
            headers = {"X-API-Key": KEY, "X-Stainless-Package-Version": version}
            body = ok(await gateway.client.get(f"/api/v1/{path}", headers=headers))
            kinds = {checkpoint["checkpoint_type"] for checkpoint in body["checkpoints"]}
            found.append((kinds, body.get("cursor", {}).get("total_count", len(body["checkpoints"]))))
        return found

    for version in ("0.6.1", "0.27.0"):
        assert await listed(version) == [({"training"}, 1)] * 2
    for version in ("0.28.0", "0.38.0", "1.0", "unheard of", ""):
        assert await listed(version) == [({"training", "external"}, 2)] * 2


def test_versions_are_numbers() -> None:
    assert parsed_version("0.38.0") == (0, 38, 0)
    assert parsed_version("0.9.1") < parsed_version("0.16.1")
    for text in ("", "1.x", "0.38.0rc1", "1.-2", "999999.0", "1..2", "\u0661.0"):
        assert parsed_version(text) == ()
