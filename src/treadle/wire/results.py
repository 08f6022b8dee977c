"""Results and failures as the exact bytes a client gets.

They are encoded once, off the event loop, and handed out verbatim as often as they are asked for. Passes and samples
are protobuf, everything else JSON. No JSON result has a top-level "error", a "type" of "try_again" or a "status": the
SDK tells answers apart by those keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import orjson
from numpy.typing import NDArray

from treadle.domain.ids import ModelId, SamplingSessionId
from treadle.domain.outcome import (
    EncodedResult,
    Failure,
    PassResult,
    SampleResult,
    StepResult,
    TargetLogprobs,
    TopkLogprobs,
)
from treadle.domain.states import QueueState, StopReason
from treadle.wire import treadle_pb2 as pb
from treadle.wire.tensors import FLOAT32, INT32, INT64

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

# What the SDK takes for "no entry" in a top-k table: token 0 with exactly this logprob (types/topk_logprobs.py, 0.38).
NO_ENTRY_LOGPROB = -99999.0

_STOP_REASONS = {
    StopReason.STOP: pb.STOP_REASON_CODE_STOP,
    StopReason.LENGTH: pb.STOP_REASON_CODE_LENGTH,
}


def encode_pass_result(result: PassResult) -> EncodedResult:
    """Protobuf: `logprobs` of every datum in request order, and the metrics.

    Consecutive datums of the same number of target columns share a record. Metric names must have exactly one ":".
    """
    assert result.logprobs, "a pass has at least one datum"
    assert all(name.count(":") == 1 for name in result.metrics), f"metric names are name:reduction: {result.metrics}"
    message = pb.PassOutput(output_type="ArrayRecord", metrics=dict(result.metrics))
    for trailing_shape, arrays in groupby(result.logprobs, key=lambda array: array.shape[1:]):
        _write_record(message.records.add(), trailing_shape, list(arrays))
    return EncodedResult(PROTOBUF, message.SerializeToString())


def encode_step_result(result: StepResult) -> EncodedResult:
    """JSON `{"metrics": {...}}`. Values are finite: the SDK's JSON parser has no NaN."""
    assert all(math.isfinite(value) for value in result.metrics.values()), f"not finite: {result.metrics}"
    return _json({"metrics": {name: float(value) for name, value in result.metrics.items()}})


def encode_sample_result(result: SampleResult) -> EncodedResult:
    """Protobuf: the sequences, and what was asked for about the prompt."""
    message = pb.SampleOutput(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs)
        written = message.sequences.add(
            stop_reason=_STOP_REASONS[sequence.stop_reason],
            tokens=sequence.tokens.astype(INT32, copy=False).tobytes(),
            logprobs=sequence.logprobs.astype(FLOAT32, copy=False).tobytes(),
        )
        if sequence.topk_logprobs is not None:
            assert len(sequence.topk_logprobs.token_ids) == len(sequence.tokens)
            _write_topk(written.topk_logprobs, sequence.topk_logprobs)
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.astype(FLOAT32, copy=False).tobytes()
    if result.topk_prompt_logprobs is not None:
        _write_topk(message.topk_prompt_logprobs, result.topk_prompt_logprobs)
    if result.target_prompt_logprobs is not None:
        _write_targets(message.target_prompt_logprobs, result.target_prompt_logprobs)
    if result.prompt_alt_tokens is not None:
        _write_dense(message.prompt_alt_tokens.tokens, result.prompt_alt_tokens.tokens)
        _write_dense(message.prompt_alt_tokens.logprobs, result.prompt_alt_tokens.logprobs)
    return EncodedResult(PROTOBUF, message.SerializeToString())


def create_model_result(model_id: ModelId) -> EncodedResult:
    """The run exists."""
    return _json({"model_id": model_id, "type": "create_model"})


def load_weights_result(path: str, model_id: ModelId) -> EncodedResult:
    """The run holds the state of the checkpoint at `path`."""
    return _json({"path": path, "model_id": model_id, "type": "load_weights"})


def saved_weights_result(path: str) -> EncodedResult:
    """The training checkpoint is published at `path`."""
    return _json({"path": path, "type": "save_weights"})


def saved_for_sampler_result(
    *, path: str | None = None, sampling_session_id: SamplingSessionId | None = None
) -> EncodedResult:
    """Sampler weights are published: named ones at `path`, ephemeral ones for `sampling_session_id`."""
    assert (path is None) != (sampling_session_id is None)
    return _json({"path": path, "sampling_session_id": sampling_session_id, "type": "save_weights_for_sampler"})


def saved_external_result(path: str, *, size_bytes: int) -> EncodedResult:
    """The PEFT directory is published at `path`."""
    return _json({"path": path, "size_bytes": size_bytes, "type": "save_weights_external"})


def unload_result(model_id: ModelId) -> EncodedResult:
    """The run is gone from the device."""
    return _json({"model_id": model_id, "type": "unload_model"})


def failure_body(failure: Failure) -> bytes:
    """JSON of a request that failed for good; the SDK raises it as RequestFailedError."""
    return orjson.dumps({"error": failure.message, "category": failure.category.value})


def queue_state_body(state: QueueState, *, reason: str | None = None) -> bytes:
    """JSON of a 408: not done yet. The keys are read at the top level only."""
    body = {"queue_state": state.value}
    if reason:
        body["queue_state_reason"] = reason
    return orjson.dumps(body)


def _write_record(
    record: pb.OutputRecord, trailing_shape: Sequence[int], arrays: Sequence[NDArray[np.float32]]
) -> None:
    parts = [array.astype(FLOAT32, copy=False).tobytes() for array in arrays]
    offsets = np.zeros(len(parts) + 1, dtype=INT64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    record.num_datums = len(parts)
    tensor = record.fields["logprobs"]
    tensor.data = b"".join(parts)
    tensor.offsets = offsets.tobytes()
    tensor.dtype = pb.ELEMENT_TYPE_FLOAT32
    tensor.trailing_shape.extend(trailing_shape)


def _write_topk(message: pb.TopkMessage, topk: TopkLogprobs) -> None:
    is_entry = ~np.isnan(topk.logprobs)
    message.token_ids = np.where(is_entry, topk.token_ids, 0).astype(INT32, copy=False).tobytes()
    message.logprobs = np.where(is_entry, topk.logprobs, FLOAT32.type(NO_ENTRY_LOGPROB)).astype(FLOAT32).tobytes()
    message.length, message.k = topk.token_ids.shape


def _write_targets(message: pb.TensorMessage, result: TargetLogprobs) -> None:
    """In the request's layout: dense, or with the very rows and columns of its sparse tensor."""
    targets = result.targets
    values = result.logprobs.astype(FLOAT32, copy=False).tobytes()
    message.dtype = pb.ELEMENT_TYPE_FLOAT32
    message.shape.extend((len(targets.starts) - 1, targets.num_columns))
    if targets.row_starts is None or targets.columns is None:
        message.dense = values
        return
    message.sparse.values = values
    message.sparse.row_starts = targets.row_starts.astype(INT64, copy=False).tobytes()
    message.sparse.columns = targets.columns.astype(INT64, copy=False).tobytes()


def _write_dense(message: pb.TensorMessage, array: NDArray[np.int32] | NDArray[np.float32]) -> None:
    is_float = array.dtype.kind == "f"
    message.dtype = pb.ELEMENT_TYPE_FLOAT32 if is_float else pb.ELEMENT_TYPE_INT32
    message.shape.extend(array.shape)
    message.dense = array.astype(FLOAT32 if is_float else INT32, copy=False).tobytes()


def _json(result: Mapping[str, object]) -> EncodedResult:
    return EncodedResult(JSON, orjson.dumps(result))
