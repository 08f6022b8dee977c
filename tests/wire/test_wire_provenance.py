"""Provenance spans: what the official SDK writes is read exactly, and what does not tile a datum is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from treadle.domain.limits import MAX_SEQUENCE_ID_CHARS
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import Datum, PassOp
from treadle.domain.provenance import Provenance, Span
from treadle.errors import InvalidRequest
from treadle.wire import treadle_pb2 as pb
from treadle.wire.passes import PassLimits, decode_pass, decode_pass_trusted, encode_pass, with_inputs

LIMITS = PassLimits(vocab_size=100, max_context_length=64)


def prompt(sequence_id: str, offset: int, length: int) -> tinker.PromptProvenanceSpan:
    return tinker.PromptProvenanceSpan(sequence_id=sequence_id, offset=offset, length=length)


def sampled(sequence_id: str, offset: int, length: int) -> tinker.SampledProvenanceSpan:
    return tinker.SampledProvenanceSpan(sequence_id=sequence_id, offset=offset, length=length)


def sdk_message(*, loss_fn: str = "stable_reinforce", config: dict[str, float] | None = None) -> pb.PassRequest:
    """A prompt of three tokens and a sample of two, as the public recipe sends them."""
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3, 40]),
        loss_fn_inputs={"target_tokens": [0, 0, 40, 41], "advantages": [0.0, 0.0, 1.0, 1.0]},
    ).with_provenance(
        model_input=[prompt("s:0", 0, 3), sampled("s:0", 0, 1)],
        loss_fn_inputs=[prompt("s:0", 1, 2), sampled("s:0", 0, 2)],
    )
    request = ForwardBackwardRequest(
        model_id="session:train:0",
        seq_id=1,
        forward_backward_input=ForwardBackwardInput(data=[datum], loss_fn=loss_fn, loss_fn_config=config),  # type: ignore[arg-type]
    )
    return pb.PassRequest.FromString(forward_backward_request_to_proto(request).SerializeToString())


def decoded(message: pb.PassRequest) -> PassOp:
    return decode_pass(message.SerializeToString(), limits=LIMITS)


def test_spans_of_the_sdk_are_read_exactly() -> None:
    (datum,) = decoded(sdk_message()).datums
    assert datum.provenance == Provenance(
        model_input=(Span("s:0", 0, 3, False), Span("s:0", 0, 1, True)),
        targets=(Span("s:0", 1, 2, False), Span("s:0", 0, 2, True)),
    )
    assert datum.provenance.sequence_ids() == {"s:0"}


def test_kl_coeff_is_read_and_a_negative_one_refused() -> None:
    assert decoded(sdk_message(config={"kl_coeff": 0.01})).loss.config == {"kl_coeff": 0.01}
    assert decoded(sdk_message()).loss.config == {"kl_coeff": 0.0}
    with pytest.raises(InvalidRequest, match=r"kl_coeff -0\.1 of stable_reinforce is below 0"):
        decoded(sdk_message(config={"kl_coeff": -0.1}))


def _without_targets(datum: pb.DatumMessage) -> None:
    del datum.loss_fn_input_spans[:]


def _without_model_input(datum: pb.DatumMessage) -> None:
    del datum.model_input_spans[:]


def _short(datum: pb.DatumMessage) -> None:
    datum.loss_fn_input_spans[1].sampled_tokens.length = 1


def _long(datum: pb.DatumMessage) -> None:
    datum.model_input_spans[0].prompt_tokens.length = 4


def _empty_span(datum: pb.DatumMessage) -> None:
    datum.model_input_spans.add()


def _nameless(datum: pb.DatumMessage) -> None:
    datum.model_input_spans[0].prompt_tokens.sequence_id = ""


def _nul(datum: pb.DatumMessage) -> None:
    datum.model_input_spans[0].prompt_tokens.sequence_id = "a\0b"


def _endless_name(datum: pb.DatumMessage) -> None:
    datum.model_input_spans[0].prompt_tokens.sequence_id = "a" * (MAX_SEQUENCE_ID_CHARS + 1)


def _negative_offset(datum: pb.DatumMessage) -> None:
    datum.model_input_spans[0].prompt_tokens.offset = -1


def _lengths_that_cancel(datum: pb.DatumMessage) -> None:
    datum.loss_fn_input_spans[0].prompt_tokens.length = -2
    datum.loss_fn_input_spans[1].sampled_tokens.length = 6


def _many_empty(datum: pb.DatumMessage) -> None:
    for _ in range(20):
        datum.loss_fn_input_spans.add().prompt_tokens.sequence_id = "s:0"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_targets, "loss_fn_input_spans is missing; provenance is both lists"),
        (_without_model_input, "model_input_spans is missing"),
        (_short, "loss_fn_input_spans cover 3 positions of 4"),
        (_long, "model_input_spans cover 5 positions of 4"),
        (_empty_span, r"model_input_spans\[2\] is neither"),
        (_nameless, r"model_input_spans\[0\]: sequence_id '' is not an id"),
        (_nul, "is not an id"),
        (_endless_name, "is not an id"),
        (_negative_offset, "offset -1 and length 3 must be at least 0"),
        (_lengths_that_cancel, "length -2 must be at least 0"),
        (_many_empty, "loss_fn_input_spans has 22 spans for 4 tokens"),
    ],
)
@pytest.mark.parametrize("loss_fn", ["stable_reinforce", "cross_entropy"])
def test_spans_that_do_not_tile_a_datum_are_refused_whatever_the_loss(
    loss_fn: str, spoil: Callable[[pb.DatumMessage], None], reason: str
) -> None:
    message = sdk_message(loss_fn=loss_fn)
    if loss_fn == "cross_entropy":
        del message.datums[0].loss_fn_inputs["advantages"]
    decoded(message)
    spoil(message.datums[0])
    with pytest.raises(InvalidRequest, match=f"datum 0: .*{reason}|datum 0: {reason}"):
        decoded(message)


def test_empty_spans_are_allowed() -> None:
    message = sdk_message()
    message.datums[0].model_input_spans.add().sampled_tokens.sequence_id = "s:1"
    (datum,) = decoded(message).datums
    assert datum.provenance is not None
    assert datum.provenance.model_input[-1] == Span("s:1", 0, 0, True)


def test_what_the_server_adds_is_in_the_payload_beside_the_clients_own_bytes() -> None:
    body = sdk_message().SerializeToString()
    logprobs, runs = np.array([0, 0, -1, -2], np.float32), np.array([0, 0, 1, 1], np.float32)
    payload = with_inputs(body, [{"sampling_logprobs": logprobs, "sampled_runs": runs}])
    (datum,) = decode_pass_trusted(payload).datums
    np.testing.assert_array_equal(datum.inputs["sampling_logprobs"], logprobs)
    np.testing.assert_array_equal(datum.inputs["sampled_runs"], runs)
    # The spans are kept, for whoever reads payloads, but a worker does not need them.
    assert datum.provenance is None
    message = pb.PassRequest.FromString(payload)
    for name in ("sampling_logprobs", "sampled_runs"):
        del message.datums[0].loss_fn_inputs[name]
    assert message == pb.PassRequest.FromString(body)


@pytest.mark.parametrize("name", ["sampling_logprobs", "sampled_runs"])
def test_a_client_cannot_send_what_the_server_records(name: str) -> None:
    body = with_inputs(sdk_message().SerializeToString(), [{name: np.zeros(4, np.float32)}])
    with pytest.raises(InvalidRequest, match=f"loss_fn_inputs '{name}' is not an input of stable_reinforce"):
        decode_pass(body, limits=LIMITS)


def test_a_payload_without_the_servers_inputs_is_not_run() -> None:
    with pytest.raises(InvalidRequest, match="lacks sampling_logprobs, sampled_runs"):
        decode_pass_trusted(sdk_message().SerializeToString())


def test_a_written_pass_with_provenance_is_read_back() -> None:
    spans = (Span("s:0", 1, 0, False), Span("s:0", 0, 2, True), Span("s:1", 3, 1, False))
    datum = Datum(
        tokens=np.array([1, 2, 3], np.int32),
        inputs={"target_tokens": np.array([2, 3, 4]), "advantages": np.zeros(3, np.float32)},
        provenance=Provenance(model_input=spans, targets=spans[::-1]),
    )
    op = PassOp("m", 1, (datum,), resolve_loss("stable_reinforce", {}), forward_only=False)  # type: ignore[arg-type]
    (back,) = decode_pass(encode_pass(op), limits=LIMITS).datums
    assert back.provenance == datum.provenance


def _forward(value: float | str, *, forward_only: bool = True) -> PassOp:
    message = sdk_message(loss_fn="cross_entropy", config={"disable_lora": value})  # type: ignore[dict-item]
    del message.datums[0].loss_fn_inputs["advantages"]
    message.forward_only = forward_only
    return decoded(message)


def test_a_forward_may_leave_the_adapter_out() -> None:
    op = _forward(True)
    assert not op.uses_adapter
    assert op.loss == resolve_loss("cross_entropy", {})
    assert not decode_pass(encode_pass(op), limits=LIMITS).uses_adapter
    assert _forward(0).uses_adapter
    assert decoded(sdk_message()).uses_adapter


@pytest.mark.parametrize("value", [2.0, -1.0, float("nan"), "yes"])
def test_disable_lora_is_a_switch(value: float | str) -> None:
    with pytest.raises(InvalidRequest, match=r"disable_lora=.* must be 0 or 1"):
        _forward(value)


def test_there_is_no_backward_without_the_adapter() -> None:
    with pytest.raises(InvalidRequest, match="disable_lora is for forward alone"):
        _forward(1, forward_only=False)
    assert _forward(0, forward_only=False).uses_adapter
