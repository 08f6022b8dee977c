"""Ops: the validated content of requests. One frozen class per kind.

Arrays are numpy and owned by the op (readers must not write to them). Tokens of a datum are
`int32 [T]`; loss inputs are `[T]` or `[T, K]`, aligned with the tokens (targets are already shifted).
Nothing here knows HTTP, SQL or the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from treadle.domain.ids import BlobKey, ModelId, SamplingSessionId
from treadle.domain.limits import LORA_ALPHA
from treadle.domain.losses import Loss
from treadle.domain.provenance import Provenance


class OpKind(StrEnum):
    CREATE_MODEL = "create_model"
    LOAD_WEIGHTS = "load_weights"
    FORWARD_BACKWARD = "forward_backward"
    FORWARD = "forward"
    OPTIM_STEP = "optim_step"
    SAVE_WEIGHTS = "save_weights"
    SAVE_FOR_SAMPLER = "save_weights_for_sampler"
    SAVE_EXTERNAL = "save_weights_external"
    UNLOAD_MODEL = "unload_model"
    SAMPLE = "sample"
    CREATE_CUSTOM_LOSS = "create_custom_loss"


class Phase(StrEnum):
    """Where in a cycle an op runs; within one model and cycle phases never go back."""

    SETUP = "setup"
    PASS = "pass"
    STEP = "step"
    PUBLISH = "publish"


def phase_of(kind: OpKind) -> Phase:
    """The phase in which ops of this kind run. Samples are not part of a cycle and are refused."""
    match kind:
        case OpKind.CREATE_MODEL | OpKind.LOAD_WEIGHTS:
            return Phase.SETUP
        case OpKind.FORWARD_BACKWARD | OpKind.FORWARD:
            return Phase.PASS
        case OpKind.OPTIM_STEP:
            return Phase.STEP
        case OpKind.SAVE_WEIGHTS | OpKind.SAVE_FOR_SAMPLER | OpKind.SAVE_EXTERNAL | OpKind.UNLOAD_MODEL:
            return Phase.PUBLISH
        case OpKind.SAMPLE | OpKind.CREATE_CUSTOM_LOSS:
            raise AssertionError(f"{kind} is never planned into a cycle")
        case _:
            assert_never(kind)


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA adapter's shape. scale = alpha / rank; `seed` fixes the initial A (B starts at 0)."""

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = LORA_ALPHA


@dataclass(frozen=True, slots=True)
class AdamParams:
    """AdamW settings of one step; defaults are the SDK's (tinker 0.38, types.AdamParams)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence: tokens int32 [T] and loss inputs by name, float32 or int64, [T] or [T, K].

    provenance: what the client says of where the tokens came from; read at admission, absent in what workers decode.
    """

    tokens: NDArray[np.int32]
    inputs: Mapping[str, NDArray[np.generic]]
    provenance: Provenance | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(frozen=True, slots=True)
class CreateModelOp:
    """A new run with a fresh adapter. `lora.seed` was drawn at admission when the client sent none."""

    model_id: ModelId
    base_model: str
    lora: LoraSpec


@dataclass(frozen=True, slots=True)
class LoadWeightsOp:
    """Replace a run's state by a checkpoint, or create the run from it (`creates_model`, seq_id 0).

    `blob_key` and `lora` were read from the checkpoint's row at admission; the blob is immutable.
    `with_optimizer` False starts the moments and the step count at zero.
    """

    model_id: ModelId
    seq_id: int
    path: str
    blob_key: BlobKey
    lora: LoraSpec
    with_optimizer: bool
    creates_model: bool


@dataclass(frozen=True, slots=True)
class PassOp:
    """forward_backward, or forward when `forward_only` (which leaves no trace).

    uses_adapter: False for a forward through the bare base model.
    """

    model_id: ModelId
    seq_id: int
    datums: tuple[Datum, ...]
    loss: Loss
    forward_only: bool
    uses_adapter: bool = True


@dataclass(frozen=True, slots=True)
class OptimStepOp:
    model_id: ModelId
    seq_id: int
    adam: AdamParams


@dataclass(frozen=True, slots=True)
class SaveWeightsOp:
    """A training checkpoint: weights, moments, step."""

    model_id: ModelId
    seq_id: int
    name: str
    overwrite: bool = False
    ttl_s: int | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SaveForSamplerOp:
    """Weights for sampling: named (a checkpoint) or ephemeral (`sampling_session_id` is set instead).

    is_inflight: the sampling session takes newer weights of the run as they are saved.
    """

    model_id: ModelId
    seq_id: int
    name: str | None = None
    sampling_session_id: SamplingSessionId | None = None
    ttl_s: int | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    is_inflight: bool = False


@dataclass(frozen=True, slots=True)
class SaveExternalOp:
    """Weights as a PEFT directory for use elsewhere, in files encrypted to `recipients` (age) if there are any."""

    model_id: ModelId
    seq_id: int
    name: str
    ttl_s: int | None = None
    recipients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnloadModelOp:
    model_id: ModelId
    seq_id: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. temperature 0 is greedy; top_k -1 and top_p 1.0 are off.

    EOS ids stop unless `use_eos` is False, which only an empty stop list asks for; strings and ids stop as well.
    max_tokens None = to the context limit. `seed` was drawn at admission when the client sent none.
    """

    seed: int
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    use_eos: bool = True


@dataclass(frozen=True, slots=True)
class TargetTokens:
    """Token ids to score behind each token of a prompt but the last: a tensor [P - 1, K], dense or sparse.

    Row i is about prompt position i + 1. token_ids: int32, the tensor's cells in their order, -1 where nothing is
    wanted; dense ones row by row, of a sparse tensor (CSR) those that are listed. row_starts int64 [P] and columns
    int64 [cells] are those of the sparse tensor, None of a dense one.
    """

    token_ids: NDArray[np.int32]
    num_columns: int
    row_starts: NDArray[np.int64] | None = None
    columns: NDArray[np.int64] | None = None

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each row's cells start, and the end: int64 [P]."""
        if self.row_starts is not None:
            return self.row_starts
        return np.arange(0, len(self.token_ids) + 1, self.num_columns, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class SampleOp:
    """`num_samples` continuations of one prompt from one set of weights.

    Weights: `blob_key` names sampler or training weights in the blob store, None is the bare base model.
    topk_sample_logprobs: alternatives per sampled token. target_prompt_logprobs: token ids whose logprobs are wanted at
    positions of the prompt. prompt_alt_tokens_k: tokens drawn at each position of the prompt instead of its own, at the
    temperature of `params`, from the whole vocabulary. prompt_logprobs_last_n: of the prompt's own tokens and its top-k
    only the last n positions are scored. record_stability_info: what is sampled is kept for stable_reinforce.
    streams: somebody watches it grow.
    """

    sampling_session_id: SamplingSessionId
    seq_id: int
    prompt: NDArray[np.int32]
    num_samples: int
    params: SamplingParams
    blob_key: BlobKey | None = None
    wants_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool = False
    streams: bool = False


TrainingOp = (
    CreateModelOp
    | LoadWeightsOp
    | PassOp
    | OptimStepOp
    | SaveWeightsOp
    | SaveForSamplerOp
    | SaveExternalOp
    | UnloadModelOp
)
Op = TrainingOp | SampleOp


def kind_of(op: Op) -> OpKind:
    """The kind of an op."""
    match op:
        case CreateModelOp():
            return OpKind.CREATE_MODEL
        case LoadWeightsOp():
            return OpKind.LOAD_WEIGHTS
        case PassOp():
            return OpKind.FORWARD if op.forward_only else OpKind.FORWARD_BACKWARD
        case OptimStepOp():
            return OpKind.OPTIM_STEP
        case SaveWeightsOp():
            return OpKind.SAVE_WEIGHTS
        case SaveForSamplerOp():
            return OpKind.SAVE_FOR_SAMPLER
        case SaveExternalOp():
            return OpKind.SAVE_EXTERNAL
        case UnloadModelOp():
            return OpKind.UNLOAD_MODEL
        case SampleOp():
            return OpKind.SAMPLE
        case _:
            assert_never(op)
