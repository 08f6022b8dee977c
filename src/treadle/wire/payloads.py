"""Ops as they are stored and as they travel to workers: bytes that name no Python class.

A pass is the client's protobuf, verbatim; everything else is a JSON object of the op's fields. The kind stands in the
request's row, not in the payload. Invariant: decode_payload(kind_of(op), encode_payload(op)) is `op`.
"""

from __future__ import annotations

from typing import Any, assert_never

import numpy as np
import orjson

from treadle.domain.ids import BlobKey, ModelId, SamplingSessionId
from treadle.domain.ops import (
    AdamParams,
    CreateModelOp,
    LoadWeightsOp,
    LoraSpec,
    Op,
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
)
from treadle.wire.passes import decode_pass_trusted, encode_pass


def encode_payload(op: Op) -> bytes:
    """The payload of `op`. For a pass that came from a client, store its own decompressed body instead: it is one."""
    if isinstance(op, PassOp):
        return encode_pass(op)
    # Dataclasses become objects of their fields, arrays become lists.
    return orjson.dumps(op, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_payload(kind: OpKind, payload: bytes) -> Op:
    """The op that `encode_payload` wrote. Payloads were checked at admission, so a malformed one is our bug."""
    if kind in (OpKind.FORWARD, OpKind.FORWARD_BACKWARD):
        op = decode_pass_trusted(payload)
        assert op.forward_only == (kind is OpKind.FORWARD), f"payload of another kind than {kind}"
        return op
    return _from_fields(kind, orjson.loads(payload))


def _from_fields(kind: OpKind, fields: dict[str, Any]) -> Op:
    match kind:
        case OpKind.CREATE_MODEL:
            return CreateModelOp(
                ModelId(fields["model_id"]), base_model=fields["base_model"], lora=LoraSpec(**fields["lora"])
            )
        case OpKind.LOAD_WEIGHTS:
            lora = LoraSpec(**fields.pop("lora"))
            return LoadWeightsOp(blob_key=BlobKey(fields.pop("blob_key")), lora=lora, **fields)
        case OpKind.OPTIM_STEP:
            return OptimStepOp(ModelId(fields["model_id"]), fields["seq_id"], AdamParams(**fields["adam"]))
        case OpKind.SAVE_WEIGHTS:
            return SaveWeightsOp(**fields)
        case OpKind.SAVE_FOR_SAMPLER:
            return SaveForSamplerOp(**fields)
        case OpKind.SAVE_EXTERNAL:
            return SaveExternalOp(**fields | {"recipients": tuple(fields["recipients"])})
        case OpKind.UNLOAD_MODEL:
            return UnloadModelOp(**fields)
        case OpKind.SAMPLE:
            return _sample_op(fields)
        case OpKind.FORWARD | OpKind.FORWARD_BACKWARD:
            raise AssertionError("passes are protobuf")
        case OpKind.CREATE_CUSTOM_LOSS:
            raise AssertionError("a custom loss is done when it is admitted; nothing reads it back")
        case _:
            assert_never(kind)


def _sample_op(fields: dict[str, Any]) -> SampleOp:
    params, targets = fields.pop("params"), fields.pop("target_prompt_logprobs", None)
    # Fields that a stored sample of an earlier release lacks take their defaults, which are off.
    return SampleOp(
        sampling_session_id=SamplingSessionId(fields.pop("sampling_session_id")),
        prompt=np.array(fields.pop("prompt"), dtype=np.int32),
        params=SamplingParams(
            **params
            | {"stop_strings": tuple(params["stop_strings"]), "stop_token_ids": tuple(params["stop_token_ids"])}
        ),
        target_prompt_logprobs=None if targets is None else _target_tokens(targets),
        **fields,
    )


def _target_tokens(fields: dict[str, Any]) -> TargetTokens:
    row_starts, columns = fields["row_starts"], fields["columns"]
    return TargetTokens(
        token_ids=np.array(fields["token_ids"], dtype=np.int32),
        num_columns=fields["num_columns"],
        row_starts=None if row_starts is None else np.array(row_starts, dtype=np.int64),
        columns=None if columns is None else np.array(columns, dtype=np.int64),
    )
