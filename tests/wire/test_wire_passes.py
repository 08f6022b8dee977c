"""forward_backward bodies: what the official SDK writes is read exactly, and every bad body is refused in our words."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tinker
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as sdk_pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from treadle.domain.limits import MAX_DATUMS_PER_REQUEST, MAX_TARGETS_PER_POSITION
from treadle.errors import InvalidRequest, NotSupported, TreadleError, UnreadableBody, UserError
from treadle.wire import treadle_pb2 as pb
from treadle.wire.passes import PassHead, PassLimits, decode_pass, decode_pass_trusted, encode_pass, read_pass_head

LIMITS = PassLimits(vocab_size=100, max_context_length=64)
MODEL_ID = "session:train:0"


def sdk_body(data, *, loss_fn="cross_entropy", config=None, seq_id=1, forward_only=False) -> bytes:
    request = ForwardBackwardRequest(
        model_id=MODEL_ID,
        seq_id=seq_id,
        forward_backward_input=ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config),
    )
    message = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    return message.SerializeToString()


def sdk_datum(tokens, **inputs) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def pass_message(num_tokens=3) -> pb.PassRequest:
    """A good cross_entropy pass of one datum, to be broken by a test."""
    message = pb.PassRequest(model_id=MODEL_ID, seq_id=1, loss_fn="cross_entropy")
    datum = message.datums.add()
    datum.model_input.add().text.tokens = np.arange(num_tokens, dtype="<i4").tobytes()
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dtype = pb.ELEMENT_TYPE_INT64
    targets.dense = np.arange(num_tokens, dtype="<i8").tobytes()
    return message


def set_tensor(message, name, values, *, dtype=None, shape=None) -> None:
    tensor = message.datums[0].loss_fn_inputs[name]
    values = np.asarray(values)
    tensor.dtype = dtype or (pb.ELEMENT_TYPE_INT64 if values.dtype.kind == "i" else pb.ELEMENT_TYPE_FLOAT32)
    tensor.dense = values.astype("<i8" if values.dtype.kind == "i" else "<f4").tobytes()
    del tensor.shape[:]
    tensor.shape.extend(values.shape if shape is None else shape)


def set_sparse(message, name, *, values, row_starts, columns, shape) -> None:
    tensor = message.datums[0].loss_fn_inputs[name]
    is_integer = name == "target_tokens"
    tensor.dtype = pb.ELEMENT_TYPE_INT64 if is_integer else pb.ELEMENT_TYPE_FLOAT32
    tensor.sparse.values = np.asarray(values, dtype="<i8" if is_integer else "<f4").tobytes()
    tensor.sparse.row_starts = np.asarray(row_starts, dtype="<i8").tobytes()
    tensor.sparse.columns = np.asarray(columns, dtype="<i8").tobytes()
    del tensor.shape[:]
    tensor.shape.extend(shape)


def assert_refused(message, *words, kind=InvalidRequest, limits=LIMITS) -> None:
    with pytest.raises(kind) as caught:
        decode_pass(message.SerializeToString(), limits=limits)
    for word in words:
        assert word in str(caught.value)


def test_the_sdks_cross_entropy_request_is_read_exactly():
    data = [
        sdk_datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0.0, 0.5, -1.5]),
        sdk_datum([9], target_tokens=np.array([8])),
    ]
    body = sdk_body(data, seq_id=7)

    assert read_pass_head(body) == PassHead(MODEL_ID, 7, "cross_entropy")
    op = decode_pass(body, limits=LIMITS)

    assert (op.model_id, op.seq_id, op.forward_only, op.loss.name) == (MODEL_ID, 7, False, "cross_entropy")
    first, second = op.datums
    assert first.tokens.dtype == np.int32
    assert first.tokens.tolist() == [1, 2, 3]
    assert first.inputs["target_tokens"].dtype == np.int64
    assert first.inputs["target_tokens"].tolist() == [2, 3, 4]
    assert first.inputs["weights"].dtype == np.float32
    assert first.inputs["weights"].tolist() == [0.0, 0.5, -1.5]
    assert list(second.inputs) == ["target_tokens"]


def test_the_sdks_ppo_request_is_read_with_settings_and_per_token_clips():
    rows = {"target_tokens": [1, 2], "logprobs": [-1.0, -2.0], "advantages": [1.0, 1.0]}
    data = [sdk_datum([1, 2], **rows), sdk_datum([1, 2], **rows, clip_low_threshold=[0.5, 0.6])]
    op = decode_pass(sdk_body(data, loss_fn="ppo", config={"clip_high_threshold": 1.5}), limits=LIMITS)
    assert op.loss.config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5}
    assert "clip_low_threshold" not in op.datums[0].inputs
    np.testing.assert_array_equal(op.datums[1].inputs["clip_low_threshold"], np.float32([0.5, 0.6]))


def test_forward_only_comes_from_the_flag():
    assert decode_pass(sdk_body([sdk_datum([1], target_tokens=[1])], forward_only=True), limits=LIMITS).forward_only


@given(st.integers(1, 12), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_soft_targets_are_read_whether_the_sdk_sends_them_sparse_or_dense(num_tokens, num_columns, density, seed):
    rng = np.random.default_rng(seed)
    is_set = rng.random((num_tokens, num_columns)) < density
    targets = torch.from_numpy(np.where(is_set, rng.integers(1, 100, is_set.shape), 0))
    weights = torch.from_numpy(np.where(rng.random(is_set.shape) < density, rng.random(is_set.shape), 0)).float()
    body = sdk_body([sdk_datum(list(range(num_tokens)), target_tokens=targets, weights=weights)])
    (datum,) = decode_pass(body, limits=LIMITS).datums
    np.testing.assert_array_equal(datum.inputs["target_tokens"], targets.numpy())
    np.testing.assert_array_equal(datum.inputs["weights"], weights.numpy())


def test_the_sdk_does_send_sparse_targets():
    # Guards the test above against a future SDK that no longer compresses.
    targets = torch.zeros((20, 8), dtype=torch.int64)
    message = sdk_pb.ForwardBackwardRequest.FromString(sdk_body([sdk_datum([1] * 20, target_tokens=targets)]))
    assert message.data[0].loss_fn_inputs["target_tokens"].HasField("sparse_csr")


def test_several_text_chunks_are_one_sequence():
    model_input = tinker.ModelInput.from_ints([1, 2]).append_int(3)
    model_input = model_input.append(tinker.EncodedTextChunk(tokens=[4]))
    datum = tinker.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": [2, 3, 4, 5]})
    assert decode_pass(sdk_body([datum]), limits=LIMITS).datums[0].tokens.tolist() == [1, 2, 3, 4]


def test_integer_weights_are_taken_for_floats():
    # torch.tensor([0, 1, 1]) is int64, and a mask is the most natural weight there is.
    body = sdk_body([sdk_datum([1, 2, 3], target_tokens=[1, 2, 3], weights=torch.tensor([0, 1, 1]))])
    weights = decode_pass(body, limits=LIMITS).datums[0].inputs["weights"]
    assert weights.dtype == np.float32
    assert weights.tolist() == [0.0, 1.0, 1.0]


def test_integer_weights_that_float32_cannot_hold_are_refused():
    message = pass_message(1)
    set_tensor(message, "weights", [2**24 + 1])
    assert_refused(message, "datum 0", "weights", "exactly")


def test_provenance_spans_are_ignored_by_losses_that_do_not_read_them():
    span = tinker.types.provenance_spans.PromptProvenanceSpan(length=2, sequence_id="x", offset=0)
    datum = sdk_datum([1, 2], target_tokens=[1, 2]).with_provenance(model_input=[span], loss_fn_inputs=[span])
    assert decode_pass(sdk_body([datum]), limits=LIMITS).datums[0].num_tokens == 2


def test_arrays_can_be_handed_to_torch():
    # torch.from_numpy warns about arrays that are not writable, and warnings are errors here.
    (datum,) = decode_pass(pass_message().SerializeToString(), limits=LIMITS).datums
    assert torch.from_numpy(datum.tokens).tolist() == [0, 1, 2]
    assert torch.from_numpy(datum.inputs["target_tokens"]).tolist() == [0, 1, 2]


def test_the_newer_settings_win_over_their_older_mirror():
    message = pass_message()
    message.loss_fn_numbers["nonsense"] = 1.0
    message.loss_fn_settings["clip_low_threshold"].number = 0.5
    message.loss_fn = "ppo"
    for name in ("logprobs", "advantages"):
        set_tensor(message, name, [0.0, 0.0, 0.0])
    assert decode_pass(message.SerializeToString(), limits=LIMITS).loss.config["clip_low_threshold"] == 0.5
    message.loss_fn_settings.clear()
    assert_refused(message, "nonsense")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "model_id"),
        (b"\xff\xff\xff\xff", "protobuf"),
        (b'{"model_id": "a", "seq_id": 1}', "protobuf"),
        (pb.PassRequest(seq_id=1).SerializeToString(), "model_id"),
        (pb.PassRequest(model_id="a").SerializeToString(), "seq_id 0"),
        (pb.PassRequest(model_id="a", seq_id=-3).SerializeToString(), "seq_id -3"),
        (pb.PassRequest(model_id="a\0b", seq_id=1).SerializeToString(), "model_id"),
        (pb.PassRequest(model_id="a" * 10_000, seq_id=1).SerializeToString(), "model_id"),
    ],
)
def test_a_body_without_a_readable_head_is_unreadable(body, word):
    for read in (read_pass_head, lambda raw: decode_pass(raw, limits=LIMITS)):
        with pytest.raises(UnreadableBody, match=word):
            read(body)


def test_a_bad_pass_still_has_a_head():
    message = pass_message()
    message.loss_fn = "nope"
    assert read_pass_head(message.SerializeToString()).seq_id == 1
    assert_refused(message, "'nope'", "cross_entropy")


def _no_datums(message):
    del message.datums[:]


def _empty_datum(message):
    del message.datums[0].model_input[:]


def _half_a_token(message):
    message.datums[0].model_input[0].text.tokens = b"\0" * 5


def _no_targets(message):
    del message.datums[0].loss_fn_inputs["target_tokens"]


def _unset_chunk(message):
    message.datums[0].model_input.add()


def _text_setting(message):
    message.loss_fn = "ppo"
    message.loss_fn_settings["clip_low_threshold"].text = "low"


def _long_setting(message):
    message.loss_fn_settings["clip"].text = "x" * 1_000


def _empty_setting(message):
    message.loss_fn_settings["clip"].SetInParent()


@pytest.mark.parametrize(
    ("break_it", "kind", "words"),
    [
        (_no_datums, InvalidRequest, ["0 datums"]),
        (_empty_datum, InvalidRequest, ["datum 0", "no tokens"]),
        (_half_a_token, InvalidRequest, ["datum 0", "5 bytes"]),
        (_no_targets, InvalidRequest, ["datum 0", "target_tokens"]),
        (_unset_chunk, NotSupported, ["datum 0", "chunk"]),
        (_text_setting, InvalidRequest, ["clip_low_threshold", "'low'"]),
        (_long_setting, InvalidRequest, ["'clip'", "512 characters"]),
        (_empty_setting, InvalidRequest, ["'clip'", "no value"]),
        (lambda m: setattr(m, "loss_fn", ""), InvalidRequest, ["loss_fn ''"]),
        (lambda m: setattr(m, "loss_fn", "ppo"), InvalidRequest, ["datum 0", "logprobs, advantages"]),
        (lambda m: set_tensor(m, "mask", [1.0] * 3), InvalidRequest, ["datum 0", "'mask'", "target_tokens, weights"]),
        (lambda m: set_tensor(m, "logprobs", [1.0] * 3), InvalidRequest, ["'logprobs'", "cross_entropy"]),
        (lambda m: set_tensor(m, "weights", [1.0] * 2), InvalidRequest, ["'weights'", "[2]", "3 tokens"]),
        (lambda m: set_tensor(m, "weights", [1.0] * 3, shape=[4]), InvalidRequest, ["[4]"]),
        (lambda m: set_tensor(m, "weights", [1.0] * 3, shape=[-1]), InvalidRequest, ["[-1]"]),
        (lambda m: set_tensor(m, "weights", [1.0] * 3, shape=[3, 2**40]), InvalidRequest, ["columns"]),
        (lambda m: set_tensor(m, "weights", [1.0] * 3, shape=[3, 2]), InvalidRequest, ["24 bytes", "got 12"]),
        (lambda m: set_tensor(m, "weights", [[1.0]] * 3), InvalidRequest, ["[3, 1]", "'target_tokens' has [3]"]),
        (lambda m: set_tensor(m, "weights", [[[1.0]]] * 3), InvalidRequest, ["[3, 1, 1]"]),
        (lambda m: set_tensor(m, "target_tokens", [1.0, 2.0, 3.0]), InvalidRequest, ["float32", "int64"]),
        (lambda m: set_tensor(m, "weights", [1.0] * 3, dtype=4), InvalidRequest, ["bfloat16"]),
        (lambda m: set_tensor(m, "weights", [1.0] * 3, dtype=99), InvalidRequest, ["99"]),
        (lambda m: set_tensor(m, "weights", [0, np.nan, 0.0]), InvalidRequest, ["weights[1]", "nan"]),
        (lambda m: set_tensor(m, "weights", [0, 0.0, np.inf]), InvalidRequest, ["weights[2]", "inf"]),
        (lambda m: set_tensor(m, "target_tokens", [0, 100, 0]), InvalidRequest, ["target_tokens[1] is 100, outside"]),
        (lambda m: set_tensor(m, "target_tokens", [0, 0, -100]), InvalidRequest, ["target_tokens[2] is -100"]),
        (lambda m: set_tensor(m, "target_tokens", [[0, 2**40]] * 3), InvalidRequest, ["target_tokens[0, 1]"]),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_datum_and_field(break_it, kind, words):
    message = pass_message()
    decode_pass(message.SerializeToString(), limits=LIMITS)
    break_it(message)
    assert_refused(message, *words, kind=kind)


@pytest.mark.parametrize("name", ["logprobs", "advantages", "clip_low_threshold", "clip_high_threshold"])
def test_every_float_input_must_be_finite(name):
    message = pass_message()
    message.loss_fn = "ppo"
    for known in ("logprobs", "advantages", "clip_low_threshold", "clip_high_threshold"):
        set_tensor(message, known, [0.0, 0.0, -np.inf if known == name else 0.0])
    assert_refused(message, f"{name}[2] is -inf")


def policy_datum(tokens, **changes) -> tinker.Datum:
    rows = {"target_tokens": tokens, "logprobs": [-1.0] * len(tokens), "advantages": [1.0] * len(tokens)}
    return sdk_datum(tokens, **(rows | changes))


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo", "gspo"])
def test_clip_bounds_that_cross_are_refused_by_datum_and_token(loss_fn):
    good, tokens = policy_datum([1, 2]), [1, 2, 3]

    def refusal(config=None, **clips):
        body = sdk_body([good, policy_datum(tokens, **clips)], loss_fn=loss_fn, config=config)
        with pytest.raises(InvalidRequest) as caught:
            decode_pass(body, limits=LIMITS)
        return str(caught.value)

    both = refusal(clip_low_threshold=[0.5, 0.5, 0.75], clip_high_threshold=[0.5, 0.5, 0.25])
    assert both == "datum 1: clip_low_threshold[2] = 0.75 is above clip_high_threshold[2] = 0.25"
    low = refusal({"clip_high_threshold": 1.5}, clip_low_threshold=[0.5, 2.0, 3.0])
    assert low == "datum 1: clip_low_threshold[1] = 2.0 is above clip_high_threshold = 1.5"
    high = refusal({"clip_low_threshold": 0.25}, clip_high_threshold=[0.5, 0.125, 0.5])
    assert high == "datum 1: clip_low_threshold = 0.25 is above clip_high_threshold[1] = 0.125"


def test_equal_clip_bounds_are_honoured_also_when_only_float32_makes_them_equal():
    # As a double 0.8 lies below the float32 nearest to it.
    datum = policy_datum([1, 2], clip_low_threshold=[0.8, 0.8])
    op = decode_pass(sdk_body([datum], loss_fn="ppo", config={"clip_high_threshold": 0.8}), limits=LIMITS)
    assert op.datums[0].inputs["clip_low_threshold"].tolist() == [np.float32(0.8)] * 2


def test_the_sdks_gspo_request_is_read_with_and_without_a_mask():
    data = [policy_datum([1, 2, 3], sequence_ratio_mask=[0.0, 1.0, 1.0]), policy_datum([4])]
    first, second = decode_pass(sdk_body(data, loss_fn="gspo"), limits=LIMITS).datums
    assert first.inputs["sequence_ratio_mask"].dtype == np.float32
    assert first.inputs["sequence_ratio_mask"].tolist() == [0.0, 1.0, 1.0]
    assert "sequence_ratio_mask" not in second.inputs
    body = sdk_body([policy_datum([1, 2, 3], sequence_ratio_mask=[1.0])], loss_fn="gspo")
    with pytest.raises(InvalidRequest, match=r"datum 0: loss_fn_inputs 'sequence_ratio_mask' has shape \[1\]"):
        decode_pass(body, limits=LIMITS)


def test_the_sdks_dro_request_is_read_with_its_setting():
    op = decode_pass(sdk_body([policy_datum([1])], loss_fn="dro", config={"beta": 0.25}), limits=LIMITS)
    assert op.loss.config == {"beta": 0.25}


def test_the_first_bad_value_is_found_in_its_own_datum():
    data = [sdk_datum([1] * n, target_tokens=[1] * n) for n in (3, 1, 4)]
    data += [sdk_datum([1, 2, 3], target_tokens=[1, 2, 100])]
    with pytest.raises(InvalidRequest, match=r"datum 3: target_tokens\[2\] is 100"):
        decode_pass(sdk_body(data), limits=LIMITS)
    data[1] = sdk_datum([-1], target_tokens=[1])
    with pytest.raises(InvalidRequest, match=r"datum 1: model_input\[0\] is -1"):
        decode_pass(sdk_body(data), limits=LIMITS)


def test_two_dimensional_targets_are_for_cross_entropy_only():
    message = pass_message()
    message.loss_fn = "importance_sampling"
    for name in ("target_tokens", "logprobs", "advantages"):
        set_tensor(message, name, np.ones((3, 1), dtype=int if name == "target_tokens" else float))
    assert_refused(message, "[3, 1]", "importance_sampling")


def test_the_context_length_is_a_limit_that_can_be_reached():
    decode_pass(pass_message(64).SerializeToString(), limits=LIMITS)
    assert_refused(pass_message(65), "datum 0", "65 tokens", "64")


def test_the_number_of_datums_is_limited():
    message = pass_message(1)
    message.datums.extend([message.datums[0]] * MAX_DATUMS_PER_REQUEST)
    assert_refused(message, f"{MAX_DATUMS_PER_REQUEST + 1} datums")


def test_images_are_not_supported():
    message = pass_message()
    message.datums[0].model_input.add().image.data = b"png"
    assert_refused(message, "datum 0", "image", kind=NotSupported)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shape": [3]}, "two dimensions"),
        ({"shape": []}, "shape []"),
        ({"shape": [4, 2]}, "[4, 2]"),
        ({"shape": [3, MAX_TARGETS_PER_POSITION + 1]}, "columns"),
        ({"shape": [3, 0]}, "columns"),
        ({"values": [1, 2]}, "2 values"),
        ({"row_starts": [0, 1, 3]}, "3 row starts"),
        ({"row_starts": [0, 2, 1, 3]}, "rise"),
        ({"row_starts": [1, 1, 2, 3]}, "rise"),
        ({"row_starts": [0, 1, 2, 2]}, "rise"),
        ({"row_starts": [0, -(2**62), 2**62, 3]}, "rise"),
        # The differences of these all wrap around to positive numbers.
        ({"row_starts": [0, 2**63 - 1, -(2**63), -1, 3], "shape": [4, 2]}, "rise"),
        ({"columns": [0, 1, 2]}, "outside [0, 2)"),
        ({"columns": [0, 1, -1]}, "outside [0, 2)"),
        ({"columns": [0, 1, 1], "row_starts": [0, 1, 3, 3]}, "out of order"),
        ({"columns": [0, 1, 0], "row_starts": [0, 1, 3, 3]}, "out of order"),
    ],
)
def test_malformed_sparse_tensors_are_refused(change, word):
    good = {"values": [1, 2, 3], "row_starts": [0, 1, 2, 3], "columns": [0, 1, 0], "shape": [3, 2]}
    message = pass_message()
    set_sparse(message, "target_tokens", **good)
    (datum,) = decode_pass(message.SerializeToString(), limits=LIMITS).datums
    assert datum.inputs["target_tokens"].tolist() == [[1, 0], [0, 2], [3, 0]]
    num_rows = 4 if change.get("shape") == [4, 2] and "row_starts" in change else 3
    message.datums[0].model_input[0].text.tokens = bytes(4 * num_rows)
    set_sparse(message, "target_tokens", **(good | change))
    assert_refused(message, "datum 0", "target_tokens", word)


def test_sparse_tensors_cannot_unfold_beyond_the_bound(monkeypatch):
    monkeypatch.setattr("treadle.wire.passes.MAX_DECOMPRESSED_BYTES", 3_000)
    message = pass_message()
    for _ in range(2):
        set_sparse(message, "target_tokens", values=[], row_starts=[0, 0, 0, 0], columns=[], shape=[3, 100])
        set_sparse(message, "weights", values=[], row_starts=[0, 0, 0, 0], columns=[], shape=[3, 100])
        message.datums.append(message.datums[0])
    assert_refused(message, "datum 0", "weights", "over")


@given(st.binary(max_size=200))
def test_random_bytes_raise_only_our_errors(raw):
    for read in (read_pass_head, lambda body: decode_pass(body, limits=LIMITS)):
        with contextlib.suppress(UserError):
            read(raw)


@given(st.data())
def test_damaged_bodies_raise_only_our_errors_or_are_safe_to_launch(data):
    message = pass_message()
    set_sparse(message, "weights", values=[1, 2], row_starts=[0, 1, 2, 2], columns=[0, 1], shape=[3, 2])
    body = bytearray(message.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        op = decode_pass(bytes(body), limits=LIMITS)
    except TreadleError:
        return
    for datum in op.datums:
        assert 0 <= datum.tokens.min() <= datum.tokens.max() < LIMITS.vocab_size
        for name, values in datum.inputs.items():
            assert values.shape == datum.inputs["target_tokens"].shape
            assert name != "weights" or np.isfinite(values).all()


def test_a_stored_pass_is_read_without_a_models_limits():
    message = pass_message(65)
    op = decode_pass_trusted(message.SerializeToString())
    assert op.datums[0].num_tokens == 65
    again = decode_pass_trusted(encode_pass(op))
    np.testing.assert_array_equal(again.datums[0].tokens, op.datums[0].tokens)


def test_a_full_chunk_of_the_sdk_is_decoded():
    # 64 sequences of 4,096 tokens: about the 5 MB that the SDK aims at.
    tokens = list(range(100)) * 41
    datum = sdk_datum(tokens[:4096], target_tokens=tokens[:4096], weights=[1.0] * 4096)
    body = sdk_body([datum] * 64)
    limits = PassLimits(vocab_size=100, max_context_length=4096)
    assert len(body) > 4_000_000
    op = decode_pass(body, limits=limits)
    assert [read.num_tokens for read in op.datums] == [4096] * 64
