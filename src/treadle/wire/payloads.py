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
    params = fields["params"]
    return SampleOp(
        sampling_session_id=SamplingSessionId(fields["sampling_session_id"]),
        seq_id=fields["seq_id"],
        prompt=np.array(fields["prompt"], dtype=np.int32),
        num_samples=fields["num_samples"],
        params=SamplingParams(
            **params
            | {"stop_strings": tuple(params["stop_strings"]), "stop_token_ids": tuple(params["stop_token_ids"])}
        ),
        blob_key=fields["blob_key"],
        wants_prompt_logprobs=fields["wants_prompt_logprobs"],
        topk_prompt_logprobs=fields["topk_prompt_logprobs"],
        record_stability_info=fields.get("record_stability_info", False),
        streams=fields.get("streams", False),
    )
