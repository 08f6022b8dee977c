"""Results as JSON: what an old SDK reads in them is what a new one reads in the protobuf, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto.response_conv import deserialize_proto_response

from treadle.domain.outcome import PassResult
from treadle.wire import treadle_pb2 as pb
from treadle.wire.legacy_results import pass_result_json, sample_result_json
from treadle.wire.results import encode_pass_result

shapes = st.one_of(st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 5), st.integers(1, 4)))


def float_bytes(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def int_bytes(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def sample_output(**fields: Any) -> pb.SampleOutput:
    output = pb.SampleOutput(**fields)
    output.sequences.add(stop_reason=1, tokens=int_bytes(3, 4), logprobs=float_bytes(-0.1, -1 / 3))
    output.sequences.add(stop_reason=0, tokens=int_bytes(), logprobs=b"")
    return output


def as_json(output: pb.SampleOutput) -> dict[str, Any]:
    answer = orjson.loads(sample_result_json(output.SerializeToString()))
    assert isinstance(answer, dict)
    return answer


@given(st.lists(shapes, min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_passes_read_the_same_in_both_forms(shape_list: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logprobs = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shape_list)
    metrics = {"loss:sum": float(rng.standard_normal()), "clipped_tokens:sum": 3.0}
    encoded = encode_pass_result(PassResult(logprobs, metrics))

    answer = orjson.loads(pass_result_json(encoded.body))

    newer = deserialize_proto_response(encoded.body, types.ForwardBackwardOutput)
    assert answer["metrics"] == newer.metrics
    assert isinstance(answer["loss_fn_output_type"], str)
    assert len(answer["loss_fn_outputs"]) == len(newer.loss_fn_outputs)
    for fields, expected in zip(answer["loss_fn_outputs"], newer.loss_fn_outputs, strict=True):
        tensor = expected["logprobs"]
        assert fields == {"logprobs": {"data": tensor.data, "dtype": "float32", "shape": tensor.shape}}


def test_a_metric_that_is_no_number_is_left_out() -> None:
    encoded = encode_pass_result(PassResult((np.zeros(1, np.float32),), {"a:sum": math.nan, "loss:sum": 1.0}))
    assert orjson.loads(pass_result_json(encoded.body))["metrics"] == {"loss:sum": 1.0}


def test_samples_have_exact_logprobs_and_words_for_reasons() -> None:
    answer = as_json(sample_output())
    assert answer["type"] == "sample"
    assert answer["prompt_logprobs"] is None
    assert answer["topk_prompt_logprobs"] is None
    first, second = answer["sequences"]
    assert first == {
        "stop_reason": "length",
        "tokens": [3, 4],
        "logprobs": [float(np.float32(-0.1)), float(np.float32(-1 / 3))],
    }
    assert second == {"stop_reason": "stop", "tokens": [], "logprobs": []}


def test_no_logprob_is_null() -> None:
    answer = as_json(sample_output(prompt_logprobs=float_bytes(math.nan, -0.5, math.nan)))
    assert answer["prompt_logprobs"] == [None, -0.5, None]


@pytest.mark.parametrize("num_rows", [1, 4])
def test_top_k_rows_are_those_of_the_protobuf(num_rows: int) -> None:
    nothing = -99999.0
    token_ids = [[0, 0], [7, 8], [9, 0], [0, 5]][:num_rows]
    logprobs = [[nothing, nothing], [-0.5, -1.5], [-0.1, nothing], [-0.25, -2.0]][:num_rows]
    output = sample_output(
        topk_prompt_logprobs=pb.TopkMessage(
            token_ids=np.array(token_ids, "<i4").tobytes(),
            logprobs=np.array(logprobs, "<f4").tobytes(),
            k=2,
            length=num_rows,
        )
    )
    del output.sequences[:]
    newer = deserialize_proto_response(output.SerializeToString(), types.SampleResponse)
    expected = [None if row is None else [list(pair) for pair in row] for row in newer.topk_prompt_logprobs]
    assert as_json(output)["topk_prompt_logprobs"] == expected


def test_an_empty_table_is_none() -> None:
    output = sample_output()
    output.topk_prompt_logprobs.SetInParent()
    assert as_json(output)["topk_prompt_logprobs"] is None


def test_newer_fields_come_along() -> None:
    """Nothing that was asked for is lost on the way, though no SDK reads it from JSON."""
    output = sample_output(prompt_cache_hit_tokens=5)
    dense = pb.TensorMessage(dtype=pb.ELEMENT_TYPE_FLOAT32, dense=float_bytes(-1, -2), shape=[1, 2])
    output.target_prompt_logprobs.CopyFrom(dense)
    output.prompt_alt_tokens.tokens.CopyFrom(
        pb.TensorMessage(dtype=pb.ELEMENT_TYPE_INT32, dense=int_bytes(4, 5), shape=[1, 2])
    )
    output.prompt_alt_tokens.logprobs.CopyFrom(dense)
    output.sequences[0].topk_logprobs.CopyFrom(
        pb.TopkMessage(token_ids=int_bytes(1, 2), logprobs=float_bytes(-1, -2), k=1, length=2)
    )
    answer = as_json(output)
    assert answer["prompt_cache_hit_tokens"] == 5
    assert answer["target_prompt_logprobs"] == {"data": [-1.0, -2.0], "dtype": "float32", "shape": [1, 2]}
    assert answer["prompt_alt_tokens"]["tokens"] == {"data": [4, 5], "dtype": "int64", "shape": [1, 2]}
    assert answer["sequences"][0]["topk_sampled_logprobs"] == [[[1, -1.0]], [[2, -2.0]]]


def test_sparse_answers_keep_their_layout() -> None:
    output = sample_output()
    tensor = output.target_prompt_logprobs
    tensor.dtype = pb.ELEMENT_TYPE_FLOAT32
    tensor.shape.extend([2, 3])
    tensor.sparse.values = float_bytes(-1)
    tensor.sparse.row_starts = np.array([0, 0, 1], "<i8").tobytes()
    tensor.sparse.columns = np.array([2], "<i8").tobytes()
    assert as_json(output)["target_prompt_logprobs"] == {
        "data": [-1.0],
        "dtype": "float32",
        "shape": [2, 3],
        "sparse_crow_indices": [0, 0, 1],
        "sparse_col_indices": [2],
    }
