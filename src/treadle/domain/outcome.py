"""What comes back from a worker: one outcome per op, one per sample, and the facts of a loaded pool.

A worker answers in numbers (PassResult and the like); the executor encodes them once into EncodedResult,
the exact bytes the SDK wants, and those are what the store keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from treadle.domain.ids import BlobKey, ModelId, RequestId
from treadle.domain.ops import LoraSpec, OpKind, TargetTokens
from treadle.domain.plan import StateTag
from treadle.domain.stability import RecordedSequence
from treadle.domain.states import Category, StopReason


@dataclass(frozen=True, slots=True)
class PassResult:
    """Per datum, in request order: `logprobs` float32 shaped like its target_tokens. Metric names end ":reduction"."""

    logprobs: tuple[NDArray[np.float32], ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Metrics of an optim_step; every value is finite."""

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BlobResult:
    """Bytes can be read under `blob_key`: durably, or those of weights without a name for now by this machine alone.

    `lora` goes into the checkpoint's row.
    """

    blob_key: BlobKey
    num_bytes: int
    lora: LoraSpec


@dataclass(frozen=True, slots=True)
class ModelResult:
    """The run exists (create, load) or is gone (unload)."""

    model_id: ModelId


@dataclass(frozen=True, slots=True)
class TopkLogprobs:
    """The k most likely tokens of each of N positions, best first: token_ids int32 [N, k], logprobs float32 [N, k].

    A cell whose logprob is NaN is no entry; a position without a prediction has a whole row of them.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """tokens int32 [N] including the stop token; logprobs float32 [N] of the model at temperature 1, untruncated.

    topk_logprobs: of the same distributions, N rows, or None when not asked for.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    stop_reason: StopReason
    topk_logprobs: TopkLogprobs | None = None


@dataclass(frozen=True, slots=True)
class TargetLogprobs:
    """What the tokens that a request named would have had: logprobs float32, one for each of its cells, 0.0 for -1."""

    targets: TargetTokens
    logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AltTokens:
    """Independent draws at each prompt position behind the first: tokens int32 [P - 1, k], logprobs float32 [P - 1, k].

    The logprobs are the model's, at temperature 1, whatever the temperature of the draws.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """prompt_logprobs float32 [P], NaN where not scored; like all fields about the prompt None when not asked for.

    prompt_cache_hit_tokens: of the prompt's tokens those whose keys and values were there from an earlier request.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: NDArray[np.float32] | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
    target_prompt_logprobs: TargetLogprobs | None = None
    prompt_alt_tokens: AltTokens | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """The bytes a client gets, verbatim, and their content type."""

    content_type: str
    body: bytes


OpResult = PassResult | StepResult | BlobResult | ModelResult


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed, in words for its client."""

    message: str
    category: Category


@dataclass(frozen=True, slots=True)
class OpOutcome:
    """One op after a cycle.

    Exactly one of result and failure is set, except for a pass with quanta left (`is_partial`), which has neither.
    encoded: set by the executor when result is final and has bytes of its own (passes and steps).
    tag_after: the state the worker holds now (None when it holds none). num_tokens: of the quanta run in this cycle;
    num_tokens_of_op: of the whole pass, with its final outcome. must_restore: the worker does not hold the state
    that the op starts from, so nothing of it ran; `failure` says why, and the op runs again behind a restore.
    """

    request_id: RequestId
    model_id: ModelId
    seq_id: int
    kind: OpKind
    result: OpResult | None = None
    failure: Failure | None = None
    is_partial: bool = False
    encoded: EncodedResult | None = None
    tag_after: StateTag | None = None
    num_tokens: int = 0
    num_tokens_of_op: int = 0
    must_restore: bool = False


class RestoreEnd(StrEnum):
    """How a restore ended. UNREADABLE: this blob will never do; FAILED: it may do another time."""

    DONE = "done"
    UNREADABLE = "unreadable"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RestoreOutcome:
    """One restore of a cycle. Unless it is DONE, every op of the run in that cycle comes back with must_restore."""

    model_id: ModelId
    end: RestoreEnd
    message: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotWritten:
    """A snapshot that is durable. compute_s: wall seconds that the device's thread spent on it."""

    num_bytes: int
    compute_s: float


class CyclePart(StrEnum):
    """What a worker does in a cycle, in this order."""

    RESTORE = "restore"
    SETUP = "setup"
    PASSES = "passes"
    STEPS = "steps"
    PUBLISH = "publish"


@dataclass(frozen=True, slots=True)
class WorkTiming:
    """A part of a cycle: when it began on the worker's clock (epoch seconds), and its wall seconds.

    Passes and steps of all runs go together; a restore is of one run, a set-up or a publish of one request.
    """

    part: CyclePart
    began_at: float
    seconds: float
    model_id: ModelId | None = None
    request_id: RequestId | None = None


@dataclass(frozen=True, slots=True)
class CycleOutcome:
    """All ops of one cycle, in plan order. compute_s: wall seconds of the worker; num_forwards: base passes run.

    timings: of its parts; none from a worker that takes no times.
    """

    token: int
    cycle: int
    outcomes: tuple[OpOutcome, ...]
    compute_s: float
    num_forwards: int
    restores: tuple[RestoreOutcome, ...] = ()
    timings: tuple[WorkTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleOutcome:
    """One finished sample request. `is_transient` failures are answered 410, so that the SDK submits again.

    num_cached_tokens: of the prompt's tokens those that a prefix cache served.
    needs_builtin: this sampler cannot do what is asked for, and the built-in one can; no result, no failure.
    recorded: its sequences, in order, when the request asked for record_stability_info.
    began_at, worked_s: when it came to the worker, on the worker's clock (epoch seconds), and wall seconds until it was
    done; 0 from a worker that takes no times.
    """

    request_id: RequestId
    result: SampleResult | None = None
    failure: Failure | None = None
    is_transient: bool = False
    needs_builtin: bool = False
    encoded: EncodedResult | None = None
    num_prompt_tokens: int = 0
    num_sampled_tokens: int = 0
    num_cached_tokens: int = 0
    recorded: tuple[RecordedSequence, ...] = ()
    began_at: float = 0.0
    worked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SampledPart:
    """Tokens that a sequence of a running sample has got, for whoever watches it grow. start: the first one's place."""

    request_id: RequestId
    sequence_index: int
    start: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WorkerVitals:
    """What a worker process takes of its machine, in bytes: of memory, and of its device's memory (0 without one)."""

    resident_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What a worker reports once its base model is loaded.

    revision: the hub's commit, or a digest of the directory's config and weight index. source_dir: the absolute
    directory of a local model, for loopback clients. tokenizer_dir: where the tokenizer's files lie, or None.
    """

    base_model: str
    revision: str
    architecture: str
    vocab_size: int
    max_context_length: int
    num_parameters: int
    dtype: str
    device: str
    numerics_profile: str
    source_dir: str | None = None
    tokenizer_dir: str | None = None
    trainable_targets: tuple[str, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
