"""stable_reinforce at the gateway: records looked up at admission, and refusals through the future."""

from __future__ import annotations

from dataclasses import replace

import httpx
import numpy as np
import pytest
from gateway_support import KEY, MAX_CONTEXT, OTHER_KEY, Harness, failed, ok, sample_body

from treadle.domain.ids import RequestId
from treadle.domain.limits import MAX_INLINE_PAYLOAD_BYTES, STABILITY_RECORD_KEPT_S
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import Datum, PassOp, SampleOp
from treadle.domain.outcome import EncodedResult
from treadle.domain.provenance import Provenance, Span
from treadle.domain.records import FinishedRequest
from treadle.domain.stability import recorded
from treadle.gateway.admission import INLINE_DECODE_BYTES
from treadle.gateway.stability import objective_notice
from treadle.wire.passes import encode_pass

PROTOBUF = {"Content-Type": "application/x-protobuf"}
PROMPT = (1, 2, 3)
SAMPLED = ([10, 11, 12, 13], [20, 21])


def logprobs_of(ids: list[int]) -> np.ndarray:
    return (-np.array(ids, np.float32) / 7).astype(np.float32)


async def sample(gateway: Harness, session_id: str, *, key: str = KEY, seq_id: int = 1) -> list[str]:
    """The ids of two sequences that were sampled on record in this session."""
    sampler = await gateway.new_sampler(session_id, key=key)
    body = sample_body(sampler, seq_id, record_stability_info=True)
    answer = ok(await gateway.post("asample", body, key=key))
    op = await gateway.op(answer["request_id"])
    assert isinstance(op, SampleOp)
    assert op.record_stability_info
    finished = FinishedRequest(
        RequestId(answer["request_id"]),
        result=EncodedResult("application/x-protobuf", b""),
        recorded=recorded([(np.array(ids, np.int32), logprobs_of(ids)) for ids in SAMPLED], len(PROMPT)),
    )
    await gateway.commit(finished)
    return [str(id_) for id_ in answer["sample_sequence_ids"]]


def datum_of(sequence_id: str, ids: list[int]) -> Datum:
    """As the public recipe makes it: prompt and sampled tokens, shifted, and provenance for both."""
    num_prompt = len(PROMPT)
    return Datum(
        tokens=np.array([*PROMPT, *ids[:-1]], np.int32),
        inputs={
            "target_tokens": np.array([0] * (num_prompt - 1) + ids),
            "logprobs": np.concatenate([np.zeros(num_prompt - 1, np.float32), logprobs_of(ids)]),
            "advantages": np.array([0.0] * (num_prompt - 1) + [0.5] * len(ids), np.float32),
        },
        provenance=Provenance(
            model_input=(Span(sequence_id, 0, num_prompt, False), Span(sequence_id, 0, len(ids) - 1, True)),
            targets=(Span(sequence_id, 1, num_prompt - 1, False), Span(sequence_id, 0, len(ids), True)),
        ),
    )


async def send(gateway: Harness, model_id: str, *datums: Datum, seq_id: int = 1, key: str = KEY) -> httpx.Response:
    loss = resolve_loss("stable_reinforce", {"kl_coeff": 0.01})
    op = PassOp(model_id, seq_id, datums, loss, forward_only=False)  # type: ignore[arg-type]
    return await gateway.post("forward_backward", content=encode_pass(op), headers=PROTOBUF, key=key)


async def refusal(gateway: Harness, model_id: str, *datums: Datum, key: str = KEY) -> str:
    """What the future says of a pass with these datums, which is admitted like any other."""
    answer = ok(await send(gateway, model_id, *datums, key=key))
    assert answer["request_id"] == f"{model_id}:1"
    return failed(await gateway.future(answer["request_id"], key=key))


async def test_what_was_recorded_is_written_into_the_payload(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    ids = await sample(gateway, session_id)
    model_id = await gateway.new_model(session_id)
    datums = [datum_of(id_, tokens) for id_, tokens in zip(ids, SAMPLED, strict=True)]
    answer = ok(await send(gateway, model_id, *datums))

    # A replay needs no record.
    gateway.clock.advance(2 * STABILITY_RECORD_KEPT_S)
    assert await gateway.store.stability.forget(unused_since=gateway.clock.now()) == 2
    op = await gateway.op(answer["request_id"])
    assert isinstance(op, PassOp)
    assert op.loss.config == {"kl_coeff": 0.01}
    for datum, tokens in zip(op.datums, SAMPLED, strict=True):
        assert datum.inputs["sampled_runs"].tolist() == [0, 0, *[1] * len(tokens)]
        np.testing.assert_array_equal(datum.inputs["sampling_logprobs"][2:], logprobs_of(tokens))
        assert not datum.inputs["sampling_logprobs"][:2].any()

    # The same pass again is a replay, whatever became of the records.
    assert ok(await send(gateway, model_id, *datums)) == answer
    assert await gateway.op(answer["request_id"]) is not None


async def test_a_large_pass_is_stored_as_a_blob_with_the_records(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    (first, _) = await sample(gateway, session_id)
    model_id = await gateway.new_model(session_id)
    num_datums = 2 * INLINE_DECODE_BYTES // (4 * 20 * len(SAMPLED[0]))
    answer = ok(await send(gateway, model_id, *[datum_of(first, SAMPLED[0])] * num_datums))

    row = await gateway.row(answer["request_id"])
    assert row.payload_key is not None
    assert row.payload_bytes > MAX_INLINE_PAYLOAD_BYTES
    assert row.num_tokens == num_datums * 6 > MAX_CONTEXT
    op = await gateway.op(answer["request_id"])
    assert isinstance(op, PassOp)
    assert all(datum.inputs["sampled_runs"].sum() == 4 for datum in op.datums)


async def test_an_unknown_sequence_is_named_in_the_future(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    ids = await sample(gateway, session_id)
    model_id = await gateway.new_model(session_id)
    good = datum_of(ids[0], SAMPLED[0])
    message = await refusal(gateway, model_id, good, datum_of(f"{ids[0]}0", SAMPLED[0]))
    assert "datum 1: sequence" in message
    assert f"{ids[0]}0" in message


async def test_a_sequence_of_another_session_or_tenant_is_as_unknown_as_one_that_never_was(gateway: Harness) -> None:
    elsewhere = await sample(gateway, await gateway.new_session())
    foreign = await sample(gateway, await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
    messages = set()
    for place, id_ in enumerate([elsewhere[0], foreign[0], "never:sample:0:1:0"]):
        model_id = await gateway.new_model(await gateway.new_session(), place)
        messages.add((await refusal(gateway, model_id, datum_of(id_, SAMPLED[0]))).replace(id_, "ID"))
    assert len(messages) == 1, messages
    assert "not on record" in messages.pop()


async def test_an_expired_record_is_refused(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    ids = await sample(gateway, session_id)
    gateway.clock.advance(STABILITY_RECORD_KEPT_S + 1)
    await gateway.store.stability.forget(unused_since=gateway.clock.now() - STABILITY_RECORD_KEPT_S)
    model_id = await gateway.new_model(session_id)
    assert "not on record" in await refusal(gateway, model_id, datum_of(ids[0], SAMPLED[0]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda datum: replace(datum, provenance=None), "datum 0: stable_reinforce needs its provenance"),
        (
            lambda datum: replace(datum, tokens=np.array([1, 2, 3, 10, 11, 13], np.int32)),
            r"datum 0: model_input[5] is 13, but token 2 of sequence",
        ),
        (
            lambda datum: replace(datum, inputs={**datum.inputs, "advantages": np.ones(6, np.float32)}),
            "datum 0: advantages[0] is 1.0, but the target there is not in a sampled span",
        ),
        (
            lambda datum: replace(datum, inputs={**datum.inputs, "logprobs": np.zeros(6, np.float32)}),
            "datum 0: logprobs[2] is 0.0, but -1.428",
        ),
    ],
)
async def test_what_the_record_does_not_bear_out_is_refused(gateway: Harness, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    session_id = await gateway.new_session()
    ids = await sample(gateway, session_id)
    model_id = await gateway.new_model(session_id)
    assert reason in await refusal(gateway, model_id, change(datum_of(ids[0], SAMPLED[0])))


@pytest.mark.parametrize(
    ("version", "is_told"),
    [("0.38.0", True), ("0.35.0", True), ("1.0.0rc1", True), ("0.34.9", False), ("", False), ("x", False)],
)
async def test_sessions_of_sdks_that_know_the_loss_are_told_whose_objective_it_is(
    gateway: Harness, version: str, is_told: bool
) -> None:
    answer = ok(await gateway.post("create_session", {"sdk_version": version}))
    assert ("warning_message" in answer) == is_told
    assert (
        objective_notice("0.38.0")
        == ok(await gateway.post("create_session", {"sdk_version": "0.38.0"}))["warning_message"]
    )
