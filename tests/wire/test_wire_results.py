"""Results are read back with the SDK's own decoders, exactly as a client does."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model
from tinker.proto.response_conv import deserialize_proto_response
from tinker.types.load_weights_response import LoadWeightsResponse
from tinker.types.save_weights_for_sampler_response import SaveWeightsForSamplerResponseInternal

from treadle.domain.outcome import (
    AltTokens,
    Failure,
    PassResult,
    SampledSequence,
    SampleResult,
    StepResult,
    TargetLogprobs,
    TopkLogprobs,
)
from treadle.domain.states import Category, QueueState, StopReason
from treadle.wire import results
from treadle.wire.prompt_targets import prompt_targets


def decoded_pass(logprobs, metrics=None):
    encoded = results.encode_pass_result(PassResult(tuple(logprobs), metrics or {"loss:sum": 1.0}))
    assert encoded.content_type == "application/x-protobuf"
    return deserialize_proto_response(encoded.body, types.ForwardBackwardOutput)


def decoded_sample(result):
    encoded = results.encode_sample_result(result)
    assert encoded.content_type == "application/x-protobuf"
    return deserialize_proto_response(encoded.body, types.SampleResponse)


def sequence(tokens, logprobs=None, stop_reason=StopReason.STOP):
    logprobs = [-0.5] * len(tokens) if logprobs is None else logprobs
    return SampledSequence(np.array(tokens, np.int32), np.array(logprobs, np.float32), stop_reason)


shapes = st.one_of(
    st.tuples(st.integers(1, 5)),
    st.tuples(st.integers(1, 5), st.integers(1, 4)),
)


@given(st.lists(shapes, min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_ragged_logprobs_of_any_columns_come_back_in_order(shape_list, seed):
    rng = np.random.default_rng(seed)
    logprobs = [rng.standard_normal(shape).astype(np.float32) for shape in shape_list]
    output = decoded_pass(logprobs)
    assert len(output.loss_fn_outputs) == len(logprobs)
    for fields, expected in zip(output.loss_fn_outputs, logprobs, strict=True):
        assert list(fields) == ["logprobs"]
        assert fields["logprobs"].dtype == "float32"
        assert fields["logprobs"].shape == list(expected.shape)
        np.testing.assert_array_equal(fields["logprobs"].to_numpy(), expected)


def test_pass_metrics_survive_the_sdks_combination_of_chunks():
    chunks = [decoded_pass([np.zeros(2, np.float32)] * n, {"loss:sum": 2.0, "kl:mean": float(n)}) for n in (1, 3)]
    assert chunks[0].loss_fn_output_type == "ArrayRecord"
    combined = combine_fwd_bwd_output_results(chunks)
    assert combined.metrics["loss:sum"] == 4.0
    assert combined.metrics["kl:mean"] == 2.5


def test_non_contiguous_and_double_logprobs_are_encoded_by_value():
    array = np.arange(6, dtype=np.float64).reshape(2, 3).T
    (fields,) = decoded_pass([array]).loss_fn_outputs
    np.testing.assert_array_equal(fields["logprobs"].to_numpy(), array)


def test_a_pass_without_datums_or_with_a_bad_metric_name_is_our_bug():
    with pytest.raises(AssertionError):
        results.encode_pass_result(PassResult((), {}))
    with pytest.raises(AssertionError):
        results.encode_pass_result(PassResult((np.zeros(1, np.float32),), {"loss": 1.0}))


def test_step_metrics_are_what_the_sdk_validates():
    encoded = results.encode_step_result(StepResult({"grad_norm": np.float32(0.5)}))
    assert encoded.content_type == "application/json"
    response = types.OptimStepResponse.model_validate(orjson.loads(encoded.body))
    assert response.metrics == {"grad_norm": 0.5}
    with pytest.raises(AssertionError):
        results.encode_step_result(StepResult({"grad_norm": math.nan}))


def test_sampled_sequences_come_back_exactly():
    response = decoded_sample(
        SampleResult(
            sequences=(sequence([1, 2, 3]), sequence([2**31 - 1], [-np.inf], StopReason.LENGTH), sequence([])),
            prompt_cache_hit_tokens=5,
        )
    )
    assert [s.tokens for s in response.sequences] == [[1, 2, 3], [2**31 - 1], []]
    assert [s.stop_reason for s in response.sequences] == ["stop", "length", "stop"]
    assert response.sequences[0].logprobs == [-0.5, -0.5, -0.5]
    assert response.sequences[1].logprobs == [-math.inf]
    assert response.sequences[2].logprobs is None
    assert response.prompt_logprobs is None
    assert response.topk_prompt_logprobs is None
    assert response.prompt_cache_hit_tokens == 5


def test_prompt_logprobs_start_with_none():
    response = decoded_sample(
        SampleResult((sequence([1]),), prompt_logprobs=np.array([np.nan, -1.0, -2.0], dtype=np.float32))
    )
    assert response.prompt_logprobs == [None, -1.0, -2.0]


def topk_table(rows, k):
    """A table from rows of (token, logprob) pairs, or None where there is no prediction."""
    table = TopkLogprobs(np.zeros((len(rows), k), np.int32), np.full((len(rows), k), np.nan, np.float32))
    for place, row in enumerate(rows):
        for column, (token, logprob) in enumerate(row or ()):
            table.token_ids[place, column], table.logprobs[place, column] = token, logprob
    return table


def test_topk_rows_keep_their_order_and_length():
    rows = [None, [(7, -0.25), (0, -1.5)], [(0, -0.5)]]
    response = decoded_sample(SampleResult((sequence([1]),), topk_prompt_logprobs=topk_table(rows, 2)))
    assert response.topk_prompt_logprobs == rows


def test_a_topk_table_of_a_single_token_prompt_is_still_a_table():
    response = decoded_sample(SampleResult((sequence([1]),), topk_prompt_logprobs=topk_table([None], 3)))
    assert response.topk_prompt_logprobs == [None]


def test_each_sequence_has_its_own_table():
    rows = [[(5, -0.5), (6, -1.0)], [(0, -0.25), (1, -3.0)]]
    with_table = dataclasses.replace(sequence([5, 1]), topk_logprobs=topk_table(rows, 2))
    response = decoded_sample(SampleResult((with_table, sequence([1]))))
    assert [s.topk_logprobs for s in response.sequences] == [rows, None]


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False))
def test_target_logprobs_come_back_in_the_layout_of_the_request(num_rows, num_columns, is_sparse, random):
    """The request's tensor is the SDK's own, read by the server's own code, so that both ends meet."""
    ids = torch.tensor([[random.choice([-1, 3, 9]) for _ in range(num_columns)] for _ in range(num_rows)])
    ids[random.randrange(num_rows), random.randrange(num_columns)] = 4
    tensor = types.TensorData.from_torch_sparse(ids, pad_value=-1) if is_sparse else types.TensorData.from_torch(ids)
    sent = _tensor_data_to_model(tensor).model_dump(mode="json")
    targets = prompt_targets(sent, num_prompt_tokens=num_rows + 1, vocab_size=10)
    logprobs = np.where(targets.token_ids >= 0, -0.125 * targets.token_ids, 0.0).astype(np.float32)
    result = SampleResult((sequence([1]),), target_prompt_logprobs=TargetLogprobs(targets, logprobs))
    answer = decoded_sample(result).target_prompt_logprobs
    assert (answer.dtype, list(answer.shape)) == ("float32", [num_rows, num_columns])
    assert (answer.sparse_crow_indices is None) == (tensor.sparse_crow_indices is None)
    if tensor.sparse_crow_indices is not None:
        assert list(answer.sparse_crow_indices) == list(tensor.sparse_crow_indices)
        assert list(answer.sparse_col_indices) == list(tensor.sparse_col_indices)
    expected = torch.where(ids >= 0, -0.125 * ids, 0.0).to(torch.float32)
    assert torch.equal(answer.to_torch().to_dense(), expected)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_alternatives_come_back_as_two_dense_tensors(num_rows):
    tokens = np.arange(2 * num_rows, dtype=np.int32).reshape(num_rows, 2)
    logprobs = -tokens.astype(np.float32)
    result = SampleResult((sequence([1]),), prompt_alt_tokens=AltTokens(tokens, logprobs))
    answer = decoded_sample(result).prompt_alt_tokens
    assert (answer.tokens.dtype, answer.tokens.shape, answer.logprobs.shape) == ("int64", [num_rows, 2], [num_rows, 2])
    np.testing.assert_array_equal(answer.tokens.to_numpy(), tokens)
    np.testing.assert_array_equal(answer.logprobs.to_numpy(), logprobs)


def test_json_results_pass_the_sdks_strict_models():
    def load(encoded):
        assert encoded.content_type == "application/json"
        body = orjson.loads(encoded.body)
        # These keys are how the SDK recognises failures and unfinished requests.
        assert "error" not in body
        assert body.get("type") != "try_again"
        assert "status" not in body
        return body

    assert types.CreateModelResponse.model_validate(load(results.create_model_result("s:train:0"))).model_id
    loaded = LoadWeightsResponse.model_validate(load(results.load_weights_result("tinker://a/weights/b", "a")))
    assert loaded.path == "tinker://a/weights/b"
    saved = types.SaveWeightsResponse.model_validate(load(results.saved_weights_result("tinker://a/weights/b")))
    assert saved.path == "tinker://a/weights/b"
    internal = SaveWeightsForSamplerResponseInternal
    named = internal.model_validate(load(results.saved_for_sampler_result(path="tinker://a/sampler_weights/b")))
    assert (named.path, named.sampling_session_id) == ("tinker://a/sampler_weights/b", None)
    ephemeral = internal.model_validate(load(results.saved_for_sampler_result(sampling_session_id="s:sample:1")))
    assert (ephemeral.path, ephemeral.sampling_session_id) == (None, "s:sample:1")
    assert types.UnloadModelResponse.model_validate(load(results.unload_result("a"))).model_id == "a"


def test_failures_and_queue_states_have_the_keys_the_sdk_reads():
    body = results.failure_body(Failure("no such thing", Category.USER))
    assert orjson.loads(body) == {"error": "no such thing", "category": "user"}
    assert orjson.loads(results.queue_state_body(QueueState.ACTIVE)) == {"queue_state": "active"}
    paused = orjson.loads(results.queue_state_body(QueueState.PAUSED_CAPACITY, reason="loading"))
    assert paused == {"queue_state": "paused_capacity", "queue_state_reason": "loading"}
