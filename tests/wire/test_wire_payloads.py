"""Every op survives its payload: what a worker gets is what admission accepted."""

from __future__ import annotations

import dataclasses

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.losses import resolve_loss
from treadle.domain.ops import (
    AdamParams,
    CreateModelOp,
    Datum,
    LoadWeightsOp,
    LoraSpec,
    OpKind,
    OptimStepOp,
    PassOp,
    SampleOp,
    SamplingParams,
    SaveExternalOp,
    SaveForSamplerOp,
    SaveWeightsOp,
    TargetTokens,
    UnloadModelOp,
    kind_of,
)
from treadle.wire.payloads import decode_payload, encode_payload

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
seq_ids = st.integers(1, 2**31 - 1)
seeds = st.integers(-(2**63), 2**64 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
# Settings of losses are refused beyond what float32 holds.
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
ttls = st.none() | st.integers(3_600, 10**9)
metadata = st.dictionaries(texts, texts, max_size=3)
loras = st.builds(LoraSpec, st.integers(1, 64), seeds, st.booleans(), st.booleans(), st.booleans())
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20).map(lambda ids: np.array(ids, np.int32))
params = st.builds(
    SamplingParams,
    seed=seeds,
    max_tokens=st.none() | st.integers(1, 10**6),
    temperature=st.floats(0, 1e3),
    top_k=st.integers(-1, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    stop_strings=st.lists(names, max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    use_eos=st.booleans(),
)


@st.composite
def passes(draw):
    low, high = sorted((draw(float32s), draw(float32s)))
    loss = resolve_loss("ppo", {"clip_low_threshold": low, "clip_high_threshold": high})
    datums = []
    for ids in draw(st.lists(tokens, min_size=1, max_size=4)):
        floats = st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=len(ids), max_size=len(ids)
        )
        inputs = {"target_tokens": ids.astype(np.int64)}
        inputs |= {name: np.array(draw(floats), np.float32) for name in ("logprobs", "advantages")}
        datums.append(Datum(ids, inputs))
    return PassOp(draw(names), draw(seq_ids), tuple(datums), loss, draw(st.booleans()))


@st.composite
def targets(draw):
    num_rows, num_columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    is_named = np.array(draw(st.lists(st.booleans(), min_size=num_rows * num_columns, max_size=num_rows * num_columns)))
    token_ids = np.where(is_named, 7, -1).astype(np.int32)
    if draw(st.booleans()):
        return TargetTokens(token_ids, num_columns)
    rows, columns = np.nonzero(is_named.reshape(num_rows, num_columns))
    row_starts = np.searchsorted(rows, np.arange(num_rows + 1)).astype(np.int64)
    return TargetTokens(token_ids[is_named], num_columns, row_starts, columns.astype(np.int64))


ops = st.one_of(
    st.builds(CreateModelOp, names, names, loras),
    st.builds(LoadWeightsOp, names, seq_ids, names, names, loras, st.booleans(), st.booleans()),
    passes(),
    st.builds(OptimStepOp, names, seq_ids, st.builds(AdamParams, finite, finite, finite, finite, finite, finite)),
    st.builds(SaveWeightsOp, names, seq_ids, names, st.booleans(), ttls, metadata),
    st.builds(SaveForSamplerOp, names, seq_ids, st.none() | names, st.none() | names, ttls, metadata, st.booleans()),
    st.builds(SaveExternalOp, names, seq_ids, names, ttls, st.lists(names, max_size=3).map(tuple)),
    st.builds(UnloadModelOp, names, seq_ids),
    st.builds(
        SampleOp,
        sampling_session_id=names,
        seq_id=st.integers(0, 2**63 - 1),
        prompt=tokens,
        num_samples=st.integers(1, 100),
        params=params,
        blob_key=st.none() | names,
        wants_prompt_logprobs=st.booleans(),
        topk_prompt_logprobs=st.integers(0, 10),
        topk_sample_logprobs=st.integers(0, 10),
        target_prompt_logprobs=st.none() | targets(),
        prompt_alt_tokens_k=st.integers(0, 10),
        prompt_logprobs_last_n=st.none() | st.integers(1, 10),
        record_stability_info=st.booleans(),
    ),
)


def plain(value):
    """The same value with arrays as (dtype, shape, bytes), so that equality is exact and one word."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if dataclasses.is_dataclass(value):
        return (type(value), {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)})
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


@given(ops)
def test_every_op_survives_its_payload(op):
    assert plain(decode_payload(kind_of(op), encode_payload(op))) == plain(op)


def test_a_stored_sample_of_an_earlier_release_asks_for_nothing_new():
    op = SampleOp("s", 1, np.array([1], np.int32), 1, SamplingParams(seed=1), topk_prompt_logprobs=2)
    fields = orjson.loads(encode_payload(op))
    known = ("sampling_session_id", "seq_id", "prompt", "num_samples", "params", "blob_key", "wants_prompt_logprobs")
    old = {name: fields[name] for name in (*known, "topk_prompt_logprobs")}
    assert plain(decode_payload(OpKind.SAMPLE, orjson.dumps(old))) == plain(op)


def test_soft_targets_survive():
    targets = np.arange(6, dtype=np.int64).reshape(3, 2)
    inputs = {"target_tokens": targets, "weights": targets.astype(np.float32)}
    datum = Datum(np.arange(3, dtype=np.int32), inputs)
    op = PassOp("m", 1, (datum,), resolve_loss("cross_entropy", {}), forward_only=True)
    assert kind_of(op) is OpKind.FORWARD
    assert plain(decode_payload(OpKind.FORWARD, encode_payload(op))) == plain(op)


def test_a_pass_payload_of_the_other_kind_is_our_bug():
    datum = Datum(np.zeros(1, np.int32), {"target_tokens": np.zeros(1, np.int64)})
    payload = encode_payload(PassOp("m", 1, (datum,), resolve_loss("cross_entropy", {}), forward_only=True))
    with pytest.raises(AssertionError):
        decode_payload(OpKind.FORWARD_BACKWARD, payload)
