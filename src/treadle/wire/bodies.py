"""JSON request bodies: what each endpoint reads, and the words in which a bad one is refused.

Tolerant where clients differ: unknown top-level fields are ignored (newer SDKs add some), null means absent (older
SDKs send nulls), absent fields take the SDK's defaults. Strict where numbers would change: no coercion between types,
and an unknown key with a value inside `lora_config`, `adam_params`, `sampling_params` or `optimizer_config` is refused
by name. A body whose owner or sequence number cannot be read is UnreadableBody, anything else InvalidRequest or
NotSupported. Knows no pools, no runs and no limits of a model; ops.py combines a body with those.
"""

from __future__ import annotations

import json
import reprlib
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from treadle.domain.ids import ModelId, SamplingSessionId, SessionId
from treadle.domain.limits import (
    MAX_ID_CHARS,
    MAX_METADATA_BYTES,
    MAX_NUM_SAMPLES,
    MAX_TEXT_CHARS,
    MAX_TOPK_LOGPROBS,
    MAX_TTL_S,
    MIN_TTL_S,
)
from treadle.errors import InvalidRequest, NotSupported, UnreadableBody

# Passes carry their seq_id as an int32, so no op of a model can go further.
_MAX_OP_SEQ_ID = 2**31 - 1
# The largest integer of a database column; the samples of cloned clients count up to 1e18.
_MAX_COUNTER = 2**63 - 1
# What a torch generator takes as a seed.
_MIN_SEED, _MAX_SEED = -(2**63), 2**64 - 1


def _without_nul(text: str) -> str:
    # PostgreSQL has no NUL in text.
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    return text


def _stringified(metadata: object) -> object:
    """Metadata with every value as text: answers must give strings, whatever JSON the client sent."""
    if not isinstance(metadata, dict):
        return metadata
    try:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if len(json.dumps(texts, ensure_ascii=False).encode()) > MAX_METADATA_BYTES:
        raise ValueError(f"is over {MAX_METADATA_BYTES} bytes of JSON")
    return texts


def _only_adamw(config: dict[str, Any]) -> dict[str, Any]:
    family = config.get("type")
    if family != "adamw":
        raise NotSupported(f"optimizer_config type {str(family)[:80]!r} is not supported; the only optimizer is adamw")
    for key, value in config.items():
        if key != "type" and value is not None:
            raise InvalidRequest(f"optimizer_config.{key[:80]} is not a setting of adamw; known: type")
    return config


_Id = StringConstraints(min_length=1, max_length=MAX_ID_CHARS)
Id = Annotated[str, _Id, AfterValidator(_without_nul)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_without_nul)]
Metadata = Annotated[
    dict[Annotated[str, AfterValidator(_without_nul)], Annotated[str, AfterValidator(_without_nul)]],
    BeforeValidator(_stringified),
]
SessionIdField = Annotated[SessionId, _Id, AfterValidator(_without_nul)]
ModelIdField = Annotated[ModelId, _Id, AfterValidator(_without_nul)]
SamplingSessionIdField = Annotated[SamplingSessionId, _Id, AfterValidator(_without_nul)]
OpSeqId = Annotated[int, Field(ge=1, le=_MAX_OP_SEQ_ID)]
Counter = Annotated[int, Field(ge=0, le=_MAX_COUNTER)]
Seed = Annotated[int, Field(ge=_MIN_SEED, le=_MAX_SEED)]
Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)]
OptimizerConfig = Annotated[dict[str, Any], AfterValidator(_only_adamw)]
_B = TypeVar("_B", bound="Body")


class Body(BaseModel):
    """One request body, frozen. `head_fields` say whose request it is and where in a sequence it belongs."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    head_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {key: value for key, value in fields.items() if value is not None}


class _Section(Body):
    """An object inside a body whose unknown keys are refused: ignoring one could change results.

    `number_fields` may be absent but not null: SDK 0.38 writes NaN and infinity as null, and taking the default
    instead would train with a number that nobody chose.
    """

    model_config = ConfigDict(extra="forbid")
    number_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_not_null(cls, fields: object) -> object:
        if isinstance(fields, dict):
            for key in sorted(cls.number_fields):
                if key in fields and fields[key] is None:
                    raise InvalidRequest(f"{key} is null, which is how the SDK sends NaN and infinity; send a number")
        return fields


class OpHead(Body):
    """The ids of any request body, as far as it has them. Which of them must be there, the endpoint knows."""

    head_fields = frozenset({"model_id", "seq_id", "session_id", "model_seq_id", "sampling_session_id"})

    model_id: ModelIdField | None = None
    seq_id: Counter | None = None
    session_id: SessionIdField | None = None
    model_seq_id: Counter | None = None
    sampling_session_id: SamplingSessionIdField | None = None

    @model_validator(mode="after")
    def _op_seq_ids_start_at_one(self) -> Self:
        if self.model_id is not None and self.seq_id is not None and not 1 <= self.seq_id <= _MAX_OP_SEQ_ID:
            raise UnreadableBody(f"seq_id {self.seq_id} is not in 1 to {_MAX_OP_SEQ_ID}")
        return self


def parse_body(model: type[_B], raw: bytes) -> _B:
    """The body as `model`.

    Raises UnreadableBody when it is not a JSON object or an id that says whose request it is cannot be read,
    InvalidRequest or NotSupported for everything else, naming the field and the value.
    """
    return checked_fields(model, json_object(raw))


def checked_fields(model: type[_B], fields: dict[str, Any]) -> _B:
    """`parse_body` for an object that was read already."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        findings = error.errors(include_url=False, include_context=False)
        in_head = [finding for finding in findings if finding["loc"] and finding["loc"][0] in model.head_fields]
        refusal = UnreadableBody if in_head else InvalidRequest
        raise refusal(_message((in_head or findings)[0])) from None


def read_op_head(raw: bytes) -> OpHead:
    """The ids of a body, whatever the rest of it holds. Raises UnreadableBody when one is there but is not an id."""
    return parse_body(OpHead, raw)


def json_object(raw: bytes) -> dict[str, Any]:
    """The fields of a body. Raises UnreadableBody for anything but a JSON object."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _json_with_nonfinite(raw)
    if not isinstance(value, dict):
        raise UnreadableBody("the body is not a JSON object")
    return value


def _json_with_nonfinite(raw: bytes) -> object:
    """JSON with NaN, Infinity or numbers beyond double: not legal, but Python writes it.

    It is read so that the request gets a row and an answer that names the field; every number is checked later.
    """
    try:
        value = json.loads(raw)
        # Lone surrogates pass here, but can neither be stored nor answered.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise UnreadableBody(f"the body of {len(raw)} bytes is not JSON") from None
    return value


def _message(finding: ErrorDetails) -> str:
    field = ".".join(str(part)[:80] for part in finding["loc"]) or "the body"
    # A plain repr of a client's value could be megabytes, or too deep to make.
    shown = reprlib.repr(finding["input"])
    match finding["type"]:
        case "missing":
            return f"{field} is missing"
        case "extra_forbidden":
            return f"{field}={shown} is not a setting that this server knows"
        case "model_type":
            return f"{field}={shown} should be a JSON object"
    reason = finding["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{field}={shown} {reason}"


class ClientConfigBody(Body):
    """client/config and client/dynamic_config."""

    sdk_version: Text = ""


class CreateSessionBody(Body):
    tags: list[Text] = Field(default_factory=list, max_length=256)
    user_metadata: Metadata = Field(default_factory=dict)
    sdk_version: Text = ""
    project_id: Id | None = None
    display_name: Text | None = None


class HeartbeatBody(Body):
    head_fields = frozenset({"session_id"})

    session_id: SessionIdField


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"] = "success"


class FinishBody(Body):
    """sessions/{id}/finish; the first reason that arrives counts."""

    reason: FinishReason = FinishReason()
    detail: Text | None = None


class LoraConfigBody(_Section):
    """lora_config. The default rank is that of the SDK's create_lora_training_client; its bounds are the server's."""

    rank: int = 32
    seed: Seed | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModelBody(Body):
    head_fields = frozenset({"session_id", "model_seq_id"})

    session_id: SessionIdField
    model_seq_id: Counter
    base_model: Id
    lora_config: LoraConfigBody | None = None
    user_metadata: Metadata = Field(default_factory=dict)
    optimizer_config: OptimizerConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_lora_is_trained(cls, fields: object) -> object:
        # PEFT's setting. Beside lora_config, where unknown fields are ignored, it must not look as if it were honoured.
        if isinstance(fields, dict) and (modules := fields.get("modules_to_save")):
            raise NotSupported(f"modules_to_save={reprlib.repr(modules)} is not supported; only LoRA is trained here")
        return fields


class LoadWeightsBody(Body):
    """load_weights in both forms: into a run (model_id, seq_id), or creating one (session_id, model_seq_id)."""

    head_fields = frozenset({"model_id", "seq_id", "session_id", "model_seq_id"})

    path: Id
    optimizer: bool
    model_id: ModelIdField | None = None
    seq_id: OpSeqId | None = None
    session_id: SessionIdField | None = None
    model_seq_id: Counter | None = None
    base_model: Id | None = None
    user_metadata: Metadata = Field(default_factory=dict)
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: Text | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        loads = (self.model_id is not None, self.seq_id is not None)
        creates = (self.session_id is not None, self.model_seq_id is not None)
        if (loads, creates) not in (((True, True), (False, False)), ((False, False), (True, True))):
            raise UnreadableBody("load_weights needs model_id and seq_id, or session_id and model_seq_id, and not both")
        return self

    @property
    def creates_model(self) -> bool:
        """Whether the load makes a new run instead of replacing the state of one."""
        return self.session_id is not None


class GetInfoBody(Body):
    head_fields = frozenset({"model_id"})

    model_id: ModelIdField


class UnloadModelBody(Body):
    head_fields = frozenset({"model_id", "seq_id"})

    model_id: ModelIdField
    seq_id: OpSeqId | None = None


class AdamParamsBody(_Section):
    """adam_params; defaults are the SDK's, which older SDKs leave to the server."""

    number_fields = frozenset({"learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"})

    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-12
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0


class OptimStepBody(Body):
    head_fields = frozenset({"model_id", "seq_id"})

    model_id: ModelIdField
    seq_id: OpSeqId
    adam_params: AdamParamsBody | None = None
    optimizer_params: Any = None


class SaveWeightsBody(Body):
    """save_weights; `path` is the checkpoint's name."""

    head_fields = frozenset({"model_id", "seq_id"})

    model_id: ModelIdField
    seq_id: OpSeqId
    path: Id | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata = Field(default_factory=dict)


class SaveForSamplerBody(Body):
    """save_weights_for_sampler: named (`path`), or for a sampling session of its own (`sampling_session_seq_id`)."""

    head_fields = frozenset({"model_id", "seq_id"})

    model_id: ModelIdField
    seq_id: OpSeqId
    path: Id | None = None
    sampling_session_seq_id: Counter | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: Metadata = Field(default_factory=dict)


class CreateSamplingSessionBody(Body):
    """create_sampling_session: a base model, weights at a tinker:// path, or both (which must agree)."""

    head_fields = frozenset({"session_id", "sampling_session_seq_id"})

    session_id: SessionIdField
    sampling_session_seq_id: Counter
    base_model: Id | None = None
    model_path: Id | None = None

    @model_validator(mode="after")
    def _names_weights(self) -> Self:
        if self.base_model is None and self.model_path is None:
            raise InvalidRequest("create_sampling_session needs base_model or model_path")
        return self


class JoinSamplingSessionBody(Body):
    head_fields = frozenset({"sampling_session_id"})

    sampling_session_id: SamplingSessionIdField


class SamplingParamsBody(_Section):
    """sampling_params; `stop` is checked where ops are built, because its three forms mean different things."""

    number_fields = frozenset({"temperature", "top_k", "top_p"})

    max_tokens: Annotated[int, Field(ge=1, le=_MAX_COUNTER)] | None = None
    seed: Seed | None = None
    stop: Any = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=_MAX_COUNTER)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _top_k_is_off_or_positive(self) -> Self:
        if self.top_k == 0:
            raise InvalidRequest("sampling_params.top_k is 0; use -1 for no limit, or 1 and more")
        return self


class SampleBody(Body):
    """asample. `prompt` and `target_prompt_logprobs` stay as parsed: they are checked where ops are built.

    base_model, model_path: the SDK sends none; whoever does must name what the sampling session samples.
    """

    head_fields = frozenset({"sampling_session_id", "seq_id"})

    sampling_session_id: SamplingSessionIdField
    seq_id: Counter
    prompt: Any
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    num_samples: Annotated[int, Field(ge=1, le=MAX_NUM_SAMPLES)] = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOPK_LOGPROBS)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=MAX_TOPK_LOGPROBS)] = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=MAX_TOPK_LOGPROBS)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool = False
    base_model: Id | None = None
    model_path: Id | None = None


class RetrieveFutureBody(Body):
    head_fields = frozenset({"request_id"})

    request_id: Id
    allow_metadata_only: bool = False


class CancelFutureBody(Body):
    head_fields = frozenset({"request_id"})

    request_id: Id


class SamplingSessionTarget(Body):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: SamplingSessionIdField
    cloned_sampler_id: Counter = 0


class RetrieveFuturesBody(Body):
    """retrieve_futures; timeout 0 acknowledges and asks for nothing, None is the server's usual hold."""

    head_fields = frozenset({"target"})

    target: SamplingSessionTarget
    prev_cursor: Counter = 0
    timeout: Annotated[float, Field(ge=0)] | None = None
    retrieved_request_ids: list[Id] = Field(default_factory=list)


class WeightsInfoBody(Body):
    tinker_path: Id


class TelemetryBody(Body):
    """telemetry: any JSON object is accepted, since a refusal would hold up the client's own errors."""

    events: Any = None
    session_id: Any = None
    sdk_version: Any = None
    platform: Any = None
    process_uuid: Any = None
