"""Bodies to ops: seeds and defaults are fixed once, and what cannot be honoured is refused."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model

from treadle.domain.limits import MAX_STOP_CHARS, MAX_STOP_SEQUENCES
from treadle.domain.ops import AdamParams, LoraSpec, OptimStepOp, SaveForSamplerOp, SaveWeightsOp, UnloadModelOp
from treadle.errors import InvalidRequest, NotSupported, TreadleError
from treadle.wire import bodies, ops
from treadle.wire.bodies import parse_body
from treadle.wire.passes import PassLimits

LIMITS = PassLimits(vocab_size=50, max_context_length=16)


def body_of(model, **fields):
    return parse_body(model, orjson.dumps(fields))


def never_drawn() -> int:
    raise AssertionError("a seed that was sent is never drawn again")


def create(lora_config, *, draw_seed=never_drawn, max_rank=32):
    body = body_of(bodies.CreateModelBody, session_id="s", model_seq_id=2, base_model="alias", lora_config=lora_config)
    return ops.create_model_op(body, base_model="pool", max_rank=max_rank, draw_seed=draw_seed)


def sample(prompt=(1, 2, 3), *, limits=LIMITS, draw_seed=never_drawn, **fields):
    """A SampleOp from the SDK's own request, with some of its fields replaced."""
    params = {"seed": 1, "max_tokens": 4} | fields.pop("sampling_params", {})
    request = types.SampleRequest(
        sampling_session_id="s:sample:0",
        seq_id=3,
        prompt=types.ModelInput.from_ints(list(prompt)),
        sampling_params=types.SamplingParams.model_validate(params),
        prompt_logprobs=False,
    )
    raw = orjson.dumps(request.model_dump(mode="json", exclude_none=True) | fields)
    body = parse_body(bodies.SampleBody, raw)
    return ops.sample_op(body, blob_key="blob", limits=limits, draw_seed=draw_seed)


def test_create_model_fixes_the_seed_once():
    op = create({"rank": 8, "seed": 5, "train_unembed": False})
    assert (op.model_id, op.base_model) == ("s:train:2", "pool")
    assert op.lora == LoraSpec(rank=8, seed=5, train_unembed=False)
    assert create({"rank": 8}, draw_seed=lambda: 77).lora.seed == 77
    assert create({"rank": 8, "seed": 0}).lora.seed == 0


def test_create_model_refuses_what_it_cannot_train():
    create({"rank": 32, "seed": 1})
    for rank in (-1, 0, 33):
        with pytest.raises(InvalidRequest, match=rf"rank={rank} .* 1 to 32"):
            create({"rank": rank})
    with pytest.raises(InvalidRequest, match="trains nothing"):
        create({"rank": 8, "train_attn": False, "train_mlp": False, "train_unembed": False})
    with pytest.raises(NotSupported, match="full fine-tuning"):
        create(None)


def test_a_load_that_creates_its_run_is_op_zero():
    lora = LoraSpec(rank=4, seed=9)
    fields = {"path": "tinker://a:train:0/weights/b", "optimizer": True}
    body = body_of(bodies.LoadWeightsBody, session_id="s", model_seq_id=1, **fields)
    op = ops.load_weights_op(body, blob_key="blob", lora=lora)
    assert (op.model_id, op.seq_id, op.creates_model, op.with_optimizer) == ("s:train:1", 0, True, True)
    body = body_of(bodies.LoadWeightsBody, model_id="m", seq_id=6, **fields)
    op = ops.load_weights_op(body, blob_key="blob", lora=lora)
    assert (op.model_id, op.seq_id, op.creates_model) == ("m", 6, False)
    assert (op.blob_key, op.lora, op.path) == ("blob", lora, fields["path"])


def test_optim_step_takes_adam_only():
    body = body_of(bodies.OptimStepBody, model_id="m", seq_id=2, adam_params={"beta1": 0.5})
    assert ops.optim_step_op(body) == OptimStepOp("m", 2, AdamParams(beta1=0.5))
    body = body_of(bodies.OptimStepBody, model_id="m", seq_id=2, optimizer_params={"type": "dimuon"})
    with pytest.raises(NotSupported, match=r"'dimuon'.*AdamW"):
        ops.optim_step_op(body)
    with pytest.raises(InvalidRequest, match="adam_params"):
        ops.optim_step_op(body_of(bodies.OptimStepBody, model_id="m", seq_id=2))


def test_saves_are_checked_and_named():
    body = body_of(bodies.SaveWeightsBody, model_id="m", seq_id=12, path="a", ttl_seconds=3600, overwrite=True)
    assert ops.save_weights_op(body) == SaveWeightsOp("m", 12, "a", overwrite=True, ttl_s=3600)
    assert ops.save_weights_op(body_of(bodies.SaveWeightsBody, model_id="m", seq_id=12)).name == "000012"
    for bad in ("a/b", "..", "", "a" * 200):
        with pytest.raises(InvalidRequest):
            ops.save_weights_op(body_of(bodies.SaveWeightsBody, model_id="m", seq_id=12, path=bad))


def test_sampler_saves_are_named_or_ephemeral():
    ids = {"model_id": "s:train:0", "seq_id": 3}
    named = body_of(bodies.SaveForSamplerBody, **ids, path="x")
    assert ops.save_for_sampler_op(named, session_id="s") == SaveForSamplerOp("s:train:0", 3, name="x")
    ephemeral = body_of(bodies.SaveForSamplerBody, **ids, sampling_session_seq_id=4, kind="inflight")
    op = ops.save_for_sampler_op(ephemeral, session_id="s")
    assert (op.name, op.sampling_session_id, op.is_inflight) == (None, "s:sample:4", True)
    with pytest.raises(InvalidRequest, match="inflight cannot be named"):
        ops.save_for_sampler_op(body_of(bodies.SaveForSamplerBody, **ids, path="x", kind="inflight"), session_id="s")
    for fields in ({}, {"path": "x", "sampling_session_seq_id": 4}):
        with pytest.raises(InvalidRequest, match="either"):
            ops.save_for_sampler_op(body_of(bodies.SaveForSamplerBody, **ids, **fields), session_id="s")


def test_unload_takes_the_place_it_is_given():
    assert ops.unload_model_op(body_of(bodies.UnloadModelBody, model_id="m"), seq_id=9) == UnloadModelOp("m", 9)


def test_a_sample_carries_everything_the_sdk_asked_for():
    op = sample(
        num_samples=3,
        prompt_logprobs=True,
        topk_prompt_logprobs=5,
        sampling_params={"temperature": 0.7, "top_k": 4, "top_p": 0.9},
    )
    assert (op.sampling_session_id, op.seq_id, op.num_samples, op.blob_key) == ("s:sample:0", 3, 3, "blob")
    assert op.prompt.dtype == np.int32
    assert op.prompt.tolist() == [1, 2, 3]
    assert (op.wants_prompt_logprobs, op.topk_prompt_logprobs) == (True, 5)
    assert (op.params.temperature, op.params.top_k, op.params.top_p) == (0.7, 4, 0.9)
    assert (op.params.seed, op.params.max_tokens, op.params.use_eos) == (1, 4, True)


def test_a_missing_sample_seed_is_drawn():
    assert sample(sampling_params={"seed": None}, draw_seed=lambda: 123).params.seed == 123
    assert sample(sampling_params={"seed": 0}).params.seed == 0


@pytest.mark.parametrize(
    ("stop", "strings", "token_ids", "use_eos"),
    [
        (None, (), (), True),
        ([], (), (), False),
        ("x", ("x",), (), True),
        (["x", "yz"], ("x", "yz"), (), True),
        ([0, 49], (), (0, 49), True),
    ],
)
def test_the_forms_of_stop(stop, strings, token_ids, use_eos):
    params = sample(sampling_params={"stop": stop}).params
    assert (params.stop_strings, params.stop_token_ids, params.use_eos) == (strings, token_ids, use_eos)


@pytest.mark.parametrize(
    "stop",
    [
        [1, "a"],
        [True],
        [1.5],
        [[1]],
        {"a": 1},
        7,
        "",
        ["a", ""],
        [50],
        [-1],
        ["a" * (MAX_STOP_CHARS + 1)],
        [1] * (MAX_STOP_SEQUENCES + 1),
    ],
)
def test_bad_stops_are_refused(stop):
    fields = {"sampling_session_id": "s", "seq_id": 1, "prompt": {"chunks": [{"tokens": [1]}]}}
    body = body_of(bodies.SampleBody, **fields, sampling_params={"stop": stop, "seed": 1})
    with pytest.raises(InvalidRequest, match=r"sampling_params\.stop"):
        ops.sample_op(body, blob_key=None, limits=LIMITS, draw_seed=never_drawn)


def test_an_overlong_request_is_refused_in_the_words_that_clients_look_for():
    assert sample([1] * 12).params.max_tokens == 4
    with pytest.raises(InvalidRequest) as caught:
        sample([1] * 13)
    assert "exceeds the model's context window: 13 prompt tokens + 4 max_tokens > 16" in str(caught.value)
    assert sample([1] * 15, sampling_params={"max_tokens": None}).params.max_tokens is None
    with pytest.raises(InvalidRequest, match="16 prompt tokens"):
        sample([1] * 16, sampling_params={"max_tokens": None})


def targets_of(ids, *, sparse=False):
    tensor = torch.tensor(ids, dtype=torch.int64)
    data = types.TensorData.from_torch_sparse(tensor, pad_value=-1) if sparse else types.TensorData.from_torch(tensor)
    return _tensor_data_to_model(data).model_dump(mode="json", exclude_none=True)


def test_every_field_of_a_sample_reaches_the_op():
    op = sample(
        (1, 2, 3, 4),
        topk_sample_logprobs=2,
        prompt_alt_tokens_k=3,
        prompt_logprobs=True,
        prompt_logprobs_last_n=3,
        target_prompt_logprobs=targets_of([[5, -1], [-1, -1], [49, 0]]),
        record_stability_info=True,
    )
    assert (op.topk_sample_logprobs, op.prompt_alt_tokens_k, op.prompt_logprobs_last_n) == (2, 3, 3)
    assert op.record_stability_info
    assert op.target_prompt_logprobs.token_ids.tolist() == [5, -1, -1, -1, 49, 0]
    assert op.target_prompt_logprobs.starts.tolist() == [0, 2, 4, 6]
    assert op.target_prompt_logprobs.row_starts is None


def test_sparse_targets_keep_the_rows_and_columns_that_were_sent():
    ids = [[-1, -1, -1, -1, -1, 7], [-1] * 6, [-1, 4, -1, -1, -1, -1]]
    targets = sample((1, 2, 3, 4), target_prompt_logprobs=targets_of(ids, sparse=True)).target_prompt_logprobs
    assert targets.token_ids.tolist() == [7, 4]
    assert (targets.row_starts.tolist(), targets.columns.tolist(), targets.num_columns) == ([0, 1, 1, 2], [5, 1], 6)
    assert targets.starts is targets.row_starts


DENSE = {"data": [1, -1], "dtype": "int64", "shape": [2, 1]}
SPARSE = {**DENSE, "data": [1], "sparse_crow_indices": [0, 1, 1], "sparse_col_indices": [0]}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ([1], "must be a tensor"),
        (DENSE | {"layout": "csr"}, "layout"),
        (DENSE | {"dtype": "float32"}, "'float32'"),
        (DENSE | {"shape": None}, r"None.*\[2, K\]"),
        (DENSE | {"shape": [2]}, r"\[2, K\]"),
        (DENSE | {"shape": [3, 1]}, r"shape \[3, 1\]"),
        (DENSE | {"shape": [2, 0], "data": []}, "0 columns"),
        (DENSE | {"shape": [2, 129]}, "129 columns.*1 to 128"),
        (DENSE | {"shape": [2, 2]}, "2 values; due are 4"),
        (DENSE | {"data": [1, "a"]}, "data must be a list of integers"),
        (DENSE | {"data": [1, 1.0]}, "data must be a list of integers"),
        (DENSE | {"data": [True, 1]}, "data must be a list of integers"),
        (DENSE | {"data": [1, 50]}, "has 50; allowed are -1 to 49"),
        (DENSE | {"data": [-2, 1]}, "has -2"),
        (DENSE | {"data": [-1, -1]}, "names no token"),
        (DENSE | {"sparse_crow_indices": [0, 1, 2]}, "sparse_col_indices must be a list"),
        (SPARSE | {"sparse_crow_indices": [0, 1]}, "2 row starts for 2 rows"),
        (SPARSE | {"sparse_crow_indices": [0, 2, 1]}, "do not rise"),
        (SPARSE | {"sparse_col_indices": [1]}, "column index"),
        (SPARSE | {"sparse_col_indices": [0, 0]}, "1 values for 2 column"),
        (SPARSE | {"sparse_col_indices": [2**63]}, "allowed are 0"),
        (SPARSE | {"data": [1, 2], "sparse_crow_indices": [0, 2, 2], "sparse_col_indices": [0, 0]}, "repeated"),
    ],
)
def test_targets_that_cannot_be_scored_are_refused(tensor, words):
    with pytest.raises(InvalidRequest, match=f"target_prompt_logprobs.*{words}"):
        sample((1, 2, 3), target_prompt_logprobs=tensor)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_logprobs_last_n": 2}, "set prompt_logprobs"),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, "allowed are 1 to 2"),
        ({"prompt_logprobs_last_n": 0, "prompt_logprobs": True}, "prompt_logprobs_last_n"),
        ({"prompt_alt_tokens_k": 129}, "prompt_alt_tokens_k"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
        ({"topk_sample_logprobs": 129}, "topk_sample_logprobs"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs"),
        ({"topk_sample_logprobs": 51}, "topk_sample_logprobs=51 is over the vocabulary of 50"),
    ],
)
def test_numbers_of_logprobs_out_of_bounds_are_refused(fields, words):
    with pytest.raises(InvalidRequest, match=words):
        sample((1, 2, 3), **fields)


def test_an_answer_of_too_many_logprobs_is_refused_before_anything_is_computed():
    limits = PassLimits(vocab_size=500, max_context_length=40_000)
    fields = {"limits": limits, "num_samples": 1_024, "sampling_params": {"max_tokens": 1_000}}
    assert sample(topk_sample_logprobs=16, **fields).topk_sample_logprobs == 16
    with pytest.raises(
        InvalidRequest, match=r"up to 17408000 logprobs .*topk_sample_logprobs=17.* allowed are 16777216"
    ):
        sample(topk_sample_logprobs=17, **fields)
    # Without max_tokens a sequence may run to the end of the context.
    with pytest.raises(InvalidRequest, match="159988 sampled ones"):
        sample(topk_sample_logprobs=128, num_samples=4, limits=limits, sampling_params={"max_tokens": None})


def test_topk_cannot_exceed_the_vocabulary():
    assert sample(topk_prompt_logprobs=50).topk_prompt_logprobs == 50
    with pytest.raises(InvalidRequest, match="51"):
        sample(topk_prompt_logprobs=51)
    assert sample(sampling_params={"top_k": 10**9}).params.top_k == 50


def test_chunks_without_type_tags_are_text():
    chunks = [{"tokens": [1]}, {"type": "encoded_text", "tokens": [2, 3]}, {"tokens": [], "type": None}]
    assert ops.flat_prompt({"chunks": chunks}, vocab_size=10).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (None, InvalidRequest),
        ([1, 2], InvalidRequest),
        ({}, InvalidRequest),
        ({"chunks": {}}, InvalidRequest),
        ({"chunks": []}, InvalidRequest),
        ({"chunks": [{"tokens": []}]}, InvalidRequest),
        ({"chunks": [3]}, InvalidRequest),
        ({"chunks": [{"tokens": 3}]}, InvalidRequest),
        ({"chunks": [{"type": "encoded_text"}]}, InvalidRequest),
        ({"chunks": [{"tokens": [1, True]}]}, InvalidRequest),
        ({"chunks": [{"tokens": [1, 1.0]}]}, InvalidRequest),
        ({"chunks": [{"tokens": [1, -1]}]}, InvalidRequest),
        ({"chunks": [{"tokens": [10]}]}, InvalidRequest),
        ({"chunks": [{"tokens": [2**70]}]}, InvalidRequest),
        ({"chunks": [{"type": "image", "data": "aa", "format": "png"}]}, NotSupported),
        ({"chunks": [{"data": "aa", "format": "png"}]}, NotSupported),
        ({"chunks": [{"type": "dmel", "dmel": "aa"}]}, NotSupported),
        ({"chunks": [{"type": {"a": 1}, "tokens": [1]}]}, NotSupported),
    ],
)
def test_bad_prompts_are_refused(prompt, kind):
    with pytest.raises(kind) as caught:
        ops.flat_prompt(prompt, vocab_size=10)
    assert "prompt" in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["chunks", "tokens", "type"]), inner),
    max_leaves=8,
)


@given(json_values, json_values)
def test_random_prompts_and_stops_raise_only_our_errors(prompt, stop):
    fields = {"sampling_session_id": "s", "seq_id": 1, "prompt": prompt, "sampling_params": {"stop": stop}}
    with contextlib.suppress(TreadleError):
        body = parse_body(bodies.SampleBody, json.dumps(fields).encode())
        ops.sample_op(body, blob_key=None, limits=LIMITS, draw_seed=lambda: 1)
