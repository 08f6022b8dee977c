"""JSON passes of older SDKs: the same op as their protobuf form, and the same words for what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.ops import PassOp
from treadle.errors import BodyTooLarge, InvalidRequest, NotSupported, UnreadableBody, UserError
from treadle.testing.builders import datum, pass_op, policy_gradient_datum
from treadle.wire import legacy_passes, number_text
from treadle.wire.legacy_passes import read_json_pass
from treadle.wire.number_text import NumberText
from treadle.wire.passes import PassHead, PassLimits, decode_pass, encode_pass

LIMITS = PassLimits(vocab_size=1_000, max_context_length=10_000)
MODEL_ID = "session:train:0"
FIELD = "forward_backward_input"


def tensor_json(values: np.ndarray) -> dict[str, Any]:
    dtype = "int64" if values.dtype.kind == "i" else "float32"
    return {"data": values.ravel().tolist(), "dtype": dtype, "shape": list(values.shape)}


def fields_of(op: PassOp) -> dict[str, Any]:
    """The body as SDK 0.16.1 writes it: no type tags, floats as Python prints them."""
    data = [
        {
            "loss_fn_inputs": {name: tensor_json(values) for name, values in datum.inputs.items()},
            "model_input": {"chunks": [{"tokens": datum.tokens.tolist()}]},
        }
        for datum in op.datums
    ]
    given = {"data": data, "loss_fn": op.loss.name, "loss_fn_config": dict(op.loss.config)}
    return {FIELD: given, "model_id": op.model_id, "seq_id": op.seq_id}


def plain_fields(**changes: Any) -> dict[str, Any]:
    fields = fields_of(pass_op(1, model_id=MODEL_ID, datums=[datum(3)]))
    fields[FIELD].update(changes)
    return fields


def read(fields: object, *, forward_only: bool = False, field: str = FIELD) -> bytes:
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    sent = read_json_pass(raw, input_field=field, forward_only=forward_only)
    if isinstance(sent.body, UserError):
        raise sent.body
    return sent.body


def decoded(fields: object, **options: Any) -> PassOp:
    return decode_pass(read(fields, **options), limits=LIMITS)


def assert_refused(fields: object, *words: str, kind: type[UserError] = InvalidRequest) -> None:
    with pytest.raises(kind) as caught:
        decoded(fields)
    assert type(caught.value) is kind
    for word in words:
        assert word in caught.value.message, caught.value.message


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([1, 7, 300]), st.booleans())
def test_json_and_protobuf_are_the_same_op(seed: int, num_datums: int, num_tokens: int, is_indented: bool) -> None:
    datums = [policy_gradient_datum(num_tokens, seed=seed % 1_000 + i) for i in range(num_datums)]
    op = pass_op(3, model_id=MODEL_ID, datums=datums, loss="ppo", loss_config={"clip_low_threshold": 0.1})
    raw = json.dumps(fields_of(op), indent=2 if is_indented else None).encode()

    sent = read_json_pass(raw, input_field=FIELD, forward_only=False)

    assert sent.head == PassHead(MODEL_ID, 3, "ppo")
    assert encode_pass(decode_pass(sent.body, limits=LIMITS)) == encode_pass(
        decode_pass(encode_pass(op), limits=LIMITS)
    )


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.integers(8, 64)
)
def test_numbers_are_exact_wherever_their_text_is_cut(values: list[float], piece_bytes: int) -> None:
    # Written as tightly as the SDK does, so that no character is there to be lost.
    text = NumberText(orjson.dumps({"data": values}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(number_text, "PIECE_BYTES", max(piece_bytes, 32))
        pieces = text.pieces(text.fields["data"])
        assert pieces is not None
        assert [number for piece in pieces for number in piece] == values


@pytest.mark.parametrize("items", ["1,,2", "1,", ",1", "1 2", "1,2,", "0x1", "1,]"])
@pytest.mark.parametrize("num_before", [0, 40_000])
def test_a_damaged_list_is_not_json(items: str, num_before: int) -> None:
    before = "1," * num_before
    body = json.dumps(plain_fields(data=[{"model_input": {"chunks": [{"tokens": "HERE"}]}}])).encode()
    assert_refused(body.replace(b'"HERE"', f"[{before}{items}]".encode()), kind=UnreadableBody)


def test_texts_that_look_like_lists_stay_texts() -> None:
    fields = plain_fields(loss_fn='{"tokens": [1, 2]}')
    assert_refused(fields, '{"tokens": [1, 2]}', "not known")


def test_old_numbers_are_rounded_as_numpy_rounds_them() -> None:
    values = [0.1, 1 / 3, 1e-50, -7, 16_777_217]
    fields = plain_fields()
    tokens = [1] * len(values)
    fields[FIELD]["data"] = [
        {
            "model_input": {"chunks": [{"tokens": tokens}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": tokens, "dtype": "int64"},
                "weights": {"data": values, "dtype": "float32", "shape": None},
            },
        }
    ]
    [read_datum] = decoded(fields).datums
    np.testing.assert_array_equal(read_datum.inputs["weights"], np.array(values, np.float32))


def test_sparse_tensors_and_typed_chunks_are_read() -> None:
    """As 0.24.1 writes them when it is told not to write protobuf."""
    targets = {
        "data": [5, 6, 7],
        "dtype": "int64",
        "shape": [2, 4],
        "sparse_crow_indices": [0, 2, 3],
        "sparse_col_indices": [0, 3, 1],
    }
    chunks = [{"type": "encoded_text", "tokens": [1]}, {"type": "encoded_text", "tokens": [2]}]
    fields = plain_fields(data=[{"model_input": {"chunks": chunks}, "loss_fn_inputs": {"target_tokens": targets}}])
    [read_datum] = decoded(fields).datums
    assert read_datum.tokens.tolist() == [1, 2]
    assert read_datum.inputs["target_tokens"].tolist() == [[5, 0, 0, 6], [0, 7, 0, 0]]


def test_forward_bodies_lie_elsewhere_and_have_no_gradient() -> None:
    fields = plain_fields()
    fields["forward_input"] = fields.pop(FIELD)
    assert decoded(fields, forward_only=True, field="forward_input").forward_only


def test_nulls_mean_absent() -> None:
    fields = plain_fields(loss_fn_config=None)
    fields[FIELD]["data"][0]["loss_fn_inputs"]["weights"] = None
    fields[FIELD]["data"][0]["model_input"]["chunks"][0]["type"] = None
    fields["type"] = None
    assert decoded(fields).datums[0].tokens.tolist() == decoded(plain_fields()).datums[0].tokens.tolist()


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"nonsense", b'{"seq_id": 1}', b'{"model_id": "a"}'])
def test_a_body_without_a_place_is_unreadable(body: bytes) -> None:
    assert_refused(body, kind=UnreadableBody)


@pytest.mark.parametrize("seq_id", [0, -1, 2**31, 1.5, "1", True])
def test_a_seq_id_that_is_none_is_unreadable(seq_id: object) -> None:
    assert_refused({**plain_fields(), "seq_id": seq_id}, "seq_id", kind=UnreadableBody)


def broken(*path: str | int, value: object) -> dict[str, Any]:
    fields = plain_fields()
    place: Any = fields[FIELD]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return fields


TARGETS = ("data", 0, "loss_fn_inputs", "target_tokens")
CHUNK = ("data", 0, "model_input", "chunks", 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**plain_fields(), FIELD: None}, [FIELD]),
        (broken("loss_fn", value=None), ["loss_fn"]),
        (broken("loss_fn", value="x" * 5_000), ["loss_fn", "longer"]),
        (broken("loss_fn", value="magic"), ["magic", "not known"]),
        (broken("loss_fn_config", value=[1]), ["loss_fn_config"]),
        (broken("loss_fn_config", value={"beta": None}), ["beta"]),
        (broken("loss_fn_config", value={"beta": 0.5}), ["beta", "not known to cross_entropy"]),
        (broken("loss_fn_config", value={"beta": 10**400}), ["beta", "too large"]),
        (broken("data", value=None), ["data"]),
        (broken("data", value=[1, 2]), ["data"]),
        (broken("data", value=[]), ["0 datums"]),
        (broken("data", value=[7, {}]), ["datum 0"]),
        (broken("data", 0, "mask", value=[1]), ["datum 0", "mask"]),
        (broken("data", 0, "model_input", value=None), ["datum 0", "model_input"]),
        (broken("data", 0, "loss_fn_inputs", value=None), ["datum 0", "target_tokens"]),
        (broken(*CHUNK, "tokens", value=[]), ["datum 0", "no tokens"]),
        (broken(*CHUNK, "tokens", value=[1, 2.5, 3]), ["datum 0", "integers", "no integer"]),
        (broken(*CHUNK, "tokens", value=[1, True, 3]), ["datum 0", "true or false"]),
        (broken(*CHUNK, "tokens", value=[1, None, 3]), ["datum 0", "null"]),
        (broken(*CHUNK, "tokens", value=[1, 2**40, 3]), ["datum 0", "int32"]),
        (broken(*CHUNK, "tokens", value=[1, 10**30, 3]), ["datum 0", "integers"]),
        (broken(*CHUNK, "tokens", value=[1, 5_000, 3]), ["datum 0", "vocabulary"]),
        (broken(*CHUNK, "tokens", value="text"), ["datum 0", "list"]),
        (broken(*TARGETS, value=[1, 2, 3]), ["target_tokens", "object"]),
        (broken(*TARGETS, "dtype", value="bfloat16"), ["target_tokens", "bfloat16"]),
        (broken(*TARGETS, "dtype", value=None), ["target_tokens", "dtype"]),
        (broken(*TARGETS, "data", value=[[1, 2, 3]]), ["target_tokens", "a list"]),
        (broken(*TARGETS, "data", value=[1, "2", 3]), ["target_tokens", "a text"]),
        (broken(*TARGETS, "shape", value=[4]), ["target_tokens", "[4]"]),
        (broken(*TARGETS, "shape", value=[2**70]), ["target_tokens", "integers"]),
        (broken(*TARGETS, "shape", value=3), ["target_tokens", "shape"]),
        (broken(*TARGETS, "sparse_col_indices", value=[0]), ["target_tokens", "only one"]),
        (broken(*TARGETS, "scale", value=2), ["target_tokens", "scale"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_place(fields: dict[str, Any], words: list[str]) -> None:
    assert_refused(fields, *words)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e39])
def test_numbers_that_are_none_are_refused_by_their_place(number: float) -> None:
    weights = {"data": [1.0, number, 1.0], "dtype": "float32", "shape": [3]}
    assert_refused(broken("data", 0, "loss_fn_inputs", "weights", value=weights), "datum 0: weights[1]", "not finite")


@pytest.mark.parametrize(
    ("chunk", "kind"),
    [
        ({"type": "image", "data": "AAAA", "format": "png"}, "image"),
        ({"data": "AAAA", "format": "png"}, "image"),
        ({"location": "x", "format": "png"}, "image_asset_pointer"),
        ({"dmel": "AAAA"}, "dmel"),
        ({}, "None"),
    ],
)
def test_chunks_other_than_text_are_not_supported(chunk: dict[str, Any], kind: str) -> None:
    assert_refused(broken(*CHUNK, value=chunk), "datum 0", f"kind {kind}", kind=NotSupported)


def test_bodies_and_what_is_beside_their_numbers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = orjson.dumps(plain_fields())
    monkeypatch.setattr(number_text, "MAX_SKELETON_BYTES", 100)
    assert_refused(raw, "beside", kind=BodyTooLarge)
    monkeypatch.setattr(legacy_passes, "MAX_JSON_PASS_BYTES", len(raw) - 1)
    assert_refused(raw, "protobuf", kind=BodyTooLarge)
