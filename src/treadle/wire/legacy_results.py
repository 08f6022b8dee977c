"""Results of passes and samples as JSON, for clients that do not ask for protobuf (SDKs up to 0.18.0, curl).

Made from the stored protobuf whenever one is asked for: protobuf stays the one stored form. Knows no requests and no
versions. Invariant: every number is written as the double that the protobuf's value equals, so that a client computes
with the same numbers whichever form it reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from treadle.wire import treadle_pb2 as pb
from treadle.wire.results import NO_ENTRY_LOGPROB
from treadle.wire.tensors import FLOAT32, INT32, INT64

_STOP_REASONS = {pb.STOP_REASON_CODE_STOP: "stop", pb.STOP_REASON_CODE_LENGTH: "length"}
# Element type in protobuf: how it lies in the bytes, and what JSON calls it. There are no half precisions in results.
_ELEMENTS: dict[int, tuple[np.dtype[Any], str]] = {
    pb.ELEMENT_TYPE_FLOAT32: (FLOAT32, "float32"),
    pb.ELEMENT_TYPE_INT64: (INT64, "int64"),
    pb.ELEMENT_TYPE_INT32: (INT32, "int64"),
}


def pass_result_json(protobuf: bytes) -> bytes:
    """A pass's output: `{"loss_fn_output_type", "loss_fn_outputs": [{name: tensor}], "metrics"}`.

    A metric that is not a finite number is left out: JSON has no way to write it, and null fails the SDK's check.
    """
    output = pb.PassOutput.FromString(protobuf)
    return _dumps(
        {
            "loss_fn_output_type": output.output_type,
            "loss_fn_outputs": [fields for record in output.records for fields in _datums_of(record)],
            "metrics": {name: value for name, value in output.metrics.items() if math.isfinite(value)},
        }
    )


def sample_result_json(protobuf: bytes) -> bytes:
    """A sample: its sequences, and what was asked for of the prompt. NaN, "no logprob here", is null."""
    output = pb.SampleOutput.FromString(protobuf)
    body: dict[str, Any] = {
        "type": "sample",
        "sequences": [_sequence(sequence) for sequence in output.sequences],
        "prompt_logprobs": _floats(output.prompt_logprobs) if output.HasField("prompt_logprobs") else None,
        "topk_prompt_logprobs": _topk_rows(output.topk_prompt_logprobs),
        "prompt_cache_hit_tokens": output.prompt_cache_hit_tokens,
    }
    if output.HasField("target_prompt_logprobs"):
        body["target_prompt_logprobs"] = _tensor(output.target_prompt_logprobs)
    if output.HasField("prompt_alt_tokens"):
        alternatives = output.prompt_alt_tokens
        body["prompt_alt_tokens"] = {
            "tokens": _tensor(alternatives.tokens),
            "logprobs": _tensor(alternatives.logprobs),
        }
    return _dumps(body)


def _datums_of(record: pb.OutputRecord) -> Iterator[dict[str, Any]]:
    """The fields of each datum of a record, in order."""
    columns = {name: list(_ragged(tensor)) for name, tensor in record.fields.items()}
    for index in range(record.num_datums):
        yield {name: arrays[index] for name, arrays in columns.items()}


def _ragged(tensor: pb.RaggedTensor) -> Iterator[dict[str, Any]]:
    element, dtype = _ELEMENTS[tensor.dtype]
    values = np.frombuffer(tensor.data, dtype=element)
    # Offsets count bytes.
    offsets = (np.frombuffer(tensor.offsets, dtype=INT64) // element.itemsize).tolist()
    trailing = list(tensor.trailing_shape)
    row_size = math.prod(trailing)
    for start, stop in pairwise(offsets):
        shape = [(stop - start) // row_size if row_size else 0, *trailing]
        yield {"data": _exact(values[start:stop]), "dtype": dtype, "shape": shape}


def _tensor(tensor: pb.TensorMessage) -> dict[str, Any]:
    element, dtype = _ELEMENTS[tensor.dtype]
    is_sparse = tensor.WhichOneof("encoding") == "sparse"
    raw = tensor.sparse.values if is_sparse else tensor.dense
    body = {"data": _exact(np.frombuffer(raw, dtype=element)), "dtype": dtype, "shape": list(tensor.shape)}
    if is_sparse:
        body["sparse_crow_indices"] = np.frombuffer(tensor.sparse.row_starts, dtype=INT64)
        body["sparse_col_indices"] = np.frombuffer(tensor.sparse.columns, dtype=INT64)
    return body


def _sequence(sequence: pb.SequenceMessage) -> dict[str, Any]:
    body: dict[str, Any] = {
        "stop_reason": _STOP_REASONS[sequence.stop_reason],
        "tokens": np.frombuffer(sequence.tokens, dtype=INT32),
        "logprobs": _floats(sequence.logprobs) if sequence.HasField("logprobs") else None,
    }
    if sequence.HasField("topk_logprobs"):
        body["topk_sampled_logprobs"] = _topk_rows(sequence.topk_logprobs)
    return body


def _topk_rows(topk: pb.TopkMessage) -> list[list[tuple[int, float]] | None] | None:
    """One row of (token, logprob) per position; None where there is none, and None for no table at all."""
    if not topk.k or not topk.length:
        return None
    token_ids = np.frombuffer(topk.token_ids, dtype=INT32).reshape(topk.length, topk.k)
    logprobs = np.frombuffer(topk.logprobs, dtype=FLOAT32).reshape(topk.length, topk.k)
    is_entry = (token_ids != 0) | (logprobs != np.float32(NO_ENTRY_LOGPROB))
    # Entries come first in a row; behind them it is filled up.
    num_entries = is_entry.sum(axis=1).tolist()
    rows = zip(token_ids.tolist(), logprobs.tolist(), num_entries, strict=True)
    return [list(zip(ids[:count], values[:count], strict=True)) if count else None for ids, values, count in rows]


def _floats(raw: bytes) -> NDArray[Any]:
    return _exact(np.frombuffer(raw, dtype=FLOAT32))


def _exact(values: NDArray[Any]) -> NDArray[Any]:
    """Floats as doubles: of a float32 only the shortest digits that name it among float32s would be written."""
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _dumps(body: object) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
