"""Custom losses as JSON: read as sent, stored as read, refused in words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.custom_loss import CustomLoss, DType, LossInput, Node, NodeOp, Ref
from treadle.domain.losses import Loss, LossMeaning
from treadle.domain.ops import Datum, PassOp
from treadle.errors import InvalidRequest
from treadle.testing.builders import MODEL_ID
from treadle.wire import treadle_pb2 as pb
from treadle.wire.graphs import CreateCustomLossBody, custom_loss_of, read_custom_loss, write_custom_loss
from treadle.wire.passes import (
    PassLimits,
    decode_pass,
    decode_pass_trusted,
    encode_pass,
    read_pass_head,
    with_meaning,
)

LIMITS = PassLimits(vocab_size=64, max_context_length=128)


def traced(loss: CustomLoss) -> LossMeaning:
    return LossMeaning("custom", write_custom_loss(loss))


def loss_of(*inputs: LossInput, argument: Any = 1.0) -> CustomLoss:
    """sum(logprobs * argument) of a loss with these inputs beside logprobs."""
    declared = (LossInput("logprobs", 1), *inputs)
    return CustomLoss(
        "written",
        declared,
        (
            *(Node(NodeOp.PLACEHOLDER, given.name, given.name) for given in declared),
            Node(NodeOp.CALL_FUNCTION, "product", "torch.where", (Ref("logprobs"), argument), {"dim": 0}),
            Node(NodeOp.OUTPUT, "output", "output", ((Ref("product"), {"custom/it:sum": Ref("product")}),)),
        ),
    )


def fields_of(loss: CustomLoss) -> dict[str, Any]:
    return orjson.loads(write_custom_loss(loss)) | {"session_id": "s", "custom_loss_seq_id": 0}


def read(fields: dict[str, Any]) -> CustomLoss:
    return custom_loss_of(CreateCustomLossBody.model_validate(fields))


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.just(Ref("logprobs")),
    st.just(...),
    st.sampled_from(["float32", "bool", "int64"]).map(DType),
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.tuples(inner, inner, inner).map(lambda parts: slice(*parts)),
    ),
    max_leaves=6,
)


@given(NESTED)
def test_what_is_written_is_read_again_and_written_alike(argument: object) -> None:
    loss = loss_of(argument=argument)
    try:
        again = read_custom_loss(write_custom_loss(loss))
    except InvalidRequest as error:
        assert "nested over" in error.message  # noqa: PT017 (anything else that is refused is a mistake)
        return
    assert write_custom_loss(again) == write_custom_loss(loss)
    assert again == read(fields_of(loss))


def test_numbers_that_json_has_no_words_for() -> None:
    loss = loss_of(argument=[math.inf, -math.inf, math.nan])
    stored = write_custom_loss(loss)
    assert b'[{"float":"inf"},{"float":"-inf"},{"float":"nan"}]' in stored
    assert write_custom_loss(read_custom_loss(stored)) == stored


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": ""}, None),
        ({"inputs": []}, "inputs must be 'logprobs' and up to 15 others"),
        ({"inputs": [{"name": "logprobs", "rank": 0}]}, "input logprobs has rank 0"),
        ({"inputs": [{"name": "logprobs", "rank": 3}]}, "input logprobs has rank 3"),
        ({"inputs": [{"name": "logprobs", "rank": True}]}, "rank True of an input"),
        ({"inputs": [{"name": "Logprobs", "rank": 1}]}, "inputs must be 'logprobs'"),
        ({"inputs": [{"name": "logprobs", "rank": 1}] * 2}, "two inputs have the same name"),
        ({"inputs": [{"name": "logprobs", "rank": 1}] * 17}, "inputs must be a list of up to 16"),
        ({"inputs": [{"name": "logprobs", "rank": 1}, {"name": "q", "rank": 1}]}, "the graph's placeholders are"),
        ({"graph": {"format": 2, "nodes": []}}, "graph format 2 is not known; known is 1"),
        ({"graph": {"nodes": []}}, "does not end with an output node"),
        ({"graph": {"nodes": [{}] * 513}}, "the graph has 513 nodes; allowed are up to 512"),
        ({"graph": {"nodes": [7]}}, "a node is not an object"),
    ],
)
def test_a_registration_that_cannot_be_honoured_says_why(change: dict[str, Any], why: str | None) -> None:
    with pytest.raises(InvalidRequest if why else ValueError, match=why):
        read(fields_of(loss_of()) | change)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ([{"ref": "product"}], "must be a loss and its metrics"),
        ([{"tuple": [1.0, {"dict": {}}]}], "must be the value of a node, and a dictionary of metrics"),
        (
            [{"tuple": [{"ref": "product"}, {"dict": {"loss:sum": {"ref": "product"}}}]}],
            "metric 'loss:sum' is not custom",
        ),
        ([{"tuple": [{"ref": "product"}, {"dict": {"custom/A:sum": {"ref": "product"}}}]}], "metric 'custom/A:sum'"),
        ([{"tuple": [{"ref": "product"}, {"dict": {"custom/a:max": {"ref": "product"}}}]}], "metric 'custom/a:max'"),
        ([{"tuple": [{"ref": "product"}, {"dict": {"custom/a:sum": 1}}]}], "metric custom/a:sum is not the value"),
    ],
)
def test_an_output_is_a_loss_and_metrics_of_its_own(output: list[Any], why: str) -> None:
    fields = fields_of(loss_of())
    fields["graph"]["nodes"][-1]["args"] = output
    with pytest.raises(InvalidRequest, match=why):
        read(fields)


def test_a_definition_has_a_size() -> None:
    fields = fields_of(loss_of())
    first, *rest = fields["graph"]["nodes"]
    filler = [
        {"op": "call_function", "name": f"n{n}", "target": "torch.stack", "args": [[0.123456789] * 20], "kwargs": {}}
        for n in range(400)
    ]
    fields["graph"]["nodes"] = [first, *filler, *rest]
    with pytest.raises(InvalidRequest, match="bytes; allowed are 65536"):
        read(fields)


def pass_of(custom: CustomLoss, **inputs: np.ndarray) -> PassOp:
    tokens = np.arange(1, 5, dtype=np.int32)
    given = {"target_tokens": np.arange(2, 6), **inputs}
    return PassOp(MODEL_ID, 3, (Datum(tokens, given),), Loss("custom", custom=custom), forward_only=False)


SCALE, KIND = LossInput("scale", 0), LossInput("kind", 1)
GIVEN = {"scale": np.array(0.5, np.float32), "kind": np.array([7, 900, -1, 2])}


def sent(custom: CustomLoss, **inputs: np.ndarray) -> bytes:
    """A pass as a client sends it: the loss is a name."""
    message = pb.PassRequest()
    message.ParseFromString(encode_pass(pass_of(custom, **inputs)))
    del message.loss_fn_settings["definition"]
    message.loss_fn_settings["loss_id"].text = "session:loss:0"
    return message.SerializeToString()


def test_a_stored_pass_says_itself_what_its_loss_is() -> None:
    custom = loss_of(SCALE, KIND)
    body = sent(custom, **GIVEN, unread=np.ones(2, np.float32))
    assert read_pass_head(body).custom_loss_id == "session:loss:0"
    admitted = decode_pass(body, limits=LIMITS, meaning=traced(custom))
    stored = decode_pass_trusted(with_meaning(body, traced(custom)))
    for op in (admitted, stored, decode_pass_trusted(encode_pass(stored))):
        assert op.loss == Loss("custom", custom=custom)
        (datum,) = op.datums
        assert datum.inputs.keys() == {"target_tokens", "scale", "kind"}
        for name, values in GIVEN.items():
            assert datum.inputs[name].dtype == values.dtype
            assert datum.inputs[name].shape == values.shape
            np.testing.assert_array_equal(datum.inputs[name], values)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({"scale": GIVEN["scale"]}, "datum 0: loss_fn_inputs lacks kind, which custom loss 'written' needs"),
        (
            GIVEN | {"scale": np.ones(2, np.float32)},
            r"datum 0: .* 'scale' has shape \[2\]; a scalar is due",
        ),
        (GIVEN | {"kind": np.ones((4, 2), np.float32)}, "'kind' has rank 2; custom loss 'written' declares 1"),
        (GIVEN | {"kind": np.ones(3, np.float32)}, r"'kind' has shape \[3\], but model_input has 4 tokens"),
        (GIVEN | {"scale": np.array(math.nan, np.float32)}, r"datum 0: scale\[\] is nan, not finite"),
        (GIVEN | {"target_tokens": np.array([1, 2, 3, 64])}, r"target_tokens\[3\] is 64, outside the vocabulary"),
        (GIVEN | {"target_tokens": np.ones((4, 2), np.int64)}, "'target_tokens' has rank 2"),
    ],
)
def test_a_datum_that_does_not_fit_the_declaration_names_the_input(inputs: dict[str, Any], why: str) -> None:
    custom = loss_of(SCALE, KIND)
    with pytest.raises(InvalidRequest, match=why):
        decode_pass(sent(custom, **inputs), limits=LIMITS, meaning=traced(custom))


@pytest.mark.parametrize("key", ["definition", "beta"])
def test_a_client_names_the_loss_and_says_nothing_else(key: str) -> None:
    custom = loss_of(SCALE, KIND)
    message = pb.PassRequest()
    message.ParseFromString(sent(custom, **GIVEN))
    message.loss_fn_settings[key].text = "{}"
    body = message.SerializeToString()
    with pytest.raises(InvalidRequest, match=f"key '{key}' is not known to custom; known: loss_id"):
        decode_pass(body, limits=LIMITS, meaning=traced(custom))
    with pytest.raises(InvalidRequest, match="needs the loss_id"):
        decode_pass(body, limits=LIMITS)


def test_a_head_without_a_loss_id_names_none() -> None:
    message = pb.PassRequest()
    message.ParseFromString(sent(loss_of(SCALE, KIND), **GIVEN))
    message.loss_fn_settings.clear()
    assert read_pass_head(message.SerializeToString()).custom_loss_id == ""
    message.loss_fn = "cross_entropy"
    assert read_pass_head(message.SerializeToString()).custom_loss_id is None
