"""Rows as the layers above the store see them: immutable, typed, without SQL.

Times are seconds since the epoch (float, UTC); JSON columns arrive as plain mappings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.domain.ids import (
    BlobKey,
    CheckpointKind,
    LossId,
    ModelId,
    PoolName,
    RequestId,
    SamplingSessionId,
    SessionId,
    TenantId,
)
from treadle.domain.ops import LoraSpec, OpKind
from treadle.domain.outcome import EncodedResult, Failure
from treadle.domain.stability import RecordedSequence
from treadle.domain.states import ModelState, RequestState, SessionState
from treadle.domain.usage import SampleUsage


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key; only its SHA-256 is stored."""

    key_id: int
    tenant_id: TenantId
    user: str
    is_admin: bool
    created_at: float
    revoked_at: float | None = None
    name: str | None = None
    expires_at: float | None = None
    # As the audit log names people.
    created_by: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRecord:
    session_id: SessionId
    tenant_id: TenantId
    state: SessionState
    created_at: float
    last_heartbeat_at: float
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    # TINKER_TAGS of its client.
    tags: tuple[str, ...] = ()
    # What its client said at its end: success, errored or interrupted, and why.
    finish_reason: str | None = None
    finish_detail: str | None = None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A training run. next_seq_id: first sequence number not consumed. incarnation: how often it was built."""

    model_id: ModelId
    session_id: SessionId
    tenant_id: TenantId
    pool: PoolName
    base_model: str
    revision: str
    lora: LoraSpec
    state: ModelState
    next_seq_id: int
    created_at: float
    last_request_at: float
    incarnation: int = 0
    # Newest op that changed the state; a snapshot is current when it was taken at or after it.
    changed_seq: int = 0
    state_message: str = ""
    user_metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A registered snapshot: a blob that holds a run's whole state right behind its op `seq_id`.

    blob_key None: the run as its seed makes it. with_optimizer False: a checkpoint that was loaded without its
    optimiser, whose moments therefore start anew. The log that leads from it to the committed state is every DONE
    forward_backward and optim_step behind seq_id. created_at is set by the store.
    """

    model_id: ModelId
    seq_id: int
    blob_key: BlobKey | None
    with_optimizer: bool = True
    num_bytes: int = 0
    numerics_profile: str = ""
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplayDebt:
    """What a run keeps so that its state can be made again: its snapshots, newest first, and the log behind them.

    num_payloads, payload_bytes: of the ops whose payloads are kept for a replay, wherever they lie.
    """

    snapshots: tuple[SnapshotRecord, ...]
    num_payloads: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class CustomLossRecord:
    """A registered loss. definition: its inputs and graph as checked, JSON. created_at is set by the store."""

    loss_id: LossId
    session_id: SessionId
    tenant_id: TenantId
    custom_loss_seq_id: int
    name: str
    definition: bytes
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request on its way into the store. `payload` is bytes, or a blob key when it was too large for a row.

    payload_bytes: the size of that blob; the store counts a payload of its own itself.
    weights_id: the sampling session whose version a sample takes, when that is not its own.
    failure set: the request was refused at admission and becomes a FAILED row at once.
    """

    request_id: RequestId
    tenant_id: TenantId
    pool: PoolName
    kind: OpKind
    seq_id: int
    num_tokens: int
    quantum_tokens: tuple[int, ...] = ()
    model_id: ModelId | None = None
    sampling_session_id: SamplingSessionId | None = None
    payload: bytes = b""
    payload_key: BlobKey | None = None
    payload_bytes: int = 0
    weights_id: SamplingSessionId | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A narrow row: everything but payload and result. payload_bytes: the payload's size, kept or not."""

    request_id: RequestId
    tenant_id: TenantId
    pool: PoolName
    kind: OpKind
    state: RequestState
    seq_id: int
    num_tokens: int
    created_at: float
    quantum_tokens: tuple[int, ...] = ()
    model_id: ModelId | None = None
    sampling_session_id: SamplingSessionId | None = None
    payload_key: BlobKey | None = None
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FutureRecord:
    """What retrieve_future needs: the owner, the state, and the result or the failure once it is final."""

    request_id: RequestId
    tenant_id: TenantId
    kind: OpKind
    state: RequestState
    result: EncodedResult | None = None
    failure: Failure | None = None
    is_transient: bool = False
    # The result was acknowledged or swept; the row remains.
    is_expired: bool = False


@dataclass(frozen=True, slots=True)
class SamplingSessionRecord:
    """Which weights a sampling session samples: base model only, a checkpoint, or an ephemeral version.

    seq_id: of the save that made it, when a training run saved a version for it. is_dropped: its weights were swept.
    is_inflight: it samples the newest version that its run has published so; blob_key is that of its own save.
    """

    sampling_session_id: SamplingSessionId
    session_id: SessionId
    tenant_id: TenantId
    pool: PoolName
    base_model: str
    created_at: float
    model_path: str | None = None
    blob_key: BlobKey | None = None
    model_id: ModelId | None = None
    seq_id: int | None = None
    is_dropped: bool = False
    is_inflight: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A named checkpoint; its blob is immutable."""

    model_id: ModelId
    tenant_id: TenantId
    kind: CheckpointKind
    name: str
    tinker_path: str
    blob_key: BlobKey
    size_bytes: int
    seq_id: int
    created_at: float
    base_model: str
    lora: LoraSpec
    public: bool = False
    expires_at: float | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    # External weights whose files only the holders of an age key can read.
    is_encrypted: bool = False
    # The path that it is a copy of.
    copied_from: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """Who leads a pool. Every write of a leader carries its token; a larger one has replaced it."""

    pool: PoolName
    token: int
    holder: str
    expires_at: float
    cycle: int


@dataclass(frozen=True, slots=True)
class RunLogEntry:
    """One line of a run's history, for the loss curve: the op and its metrics.

    Where its time went, in wall seconds: queued_s until its first part was sent to a worker, run_s from there to the
    outcome, others' work in the same cycles included. cycle: the number of the one that completed it.
    """

    model_id: ModelId
    seq_id: int
    kind: OpKind
    created_at: float
    metrics: Mapping[str, float]
    queued_s: float = 0.0
    run_s: float = 0.0
    cycle: int = 0


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A final outcome as it is committed: exactly one of result and failure.

    recorded: sequences of a sample to keep for stable_reinforce, under their sample's sequence ids. usage: what its
    tenant got of a sample, in tokens; None when that is nothing.
    """

    request_id: RequestId
    result: EncodedResult | None = None
    failure: Failure | None = None
    is_transient: bool = False
    recorded: tuple[RecordedSequence, ...] = ()
    usage: SampleUsage | None = None


@dataclass(frozen=True, slots=True)
class ModelAdvance:
    """How a committed cycle moved one run: consumed sequence numbers and state. None leaves a field as it is."""

    model_id: ModelId
    next_seq_id: int
    state: ModelState | None = None
    state_message: str = ""
    incarnation: int | None = None
    changed_seq: int | None = None


@dataclass(frozen=True, slots=True)
class FinishedCycle:
    """Everything one cycle commits, in one fenced transaction.

    A tenant's usage follows from the rows: the tokens of each pass, and the checkpoint of each save, that becomes DONE.
    """

    finished: tuple[FinishedRequest, ...] = ()
    never_received: tuple[NewRequest, ...] = ()
    advances: tuple[ModelAdvance, ...] = ()
    # One with the same path is replaced: whether that was asked for is decided before.
    checkpoints: tuple[CheckpointRecord, ...] = ()
    sampling_sessions: tuple[SamplingSessionRecord, ...] = ()
    # What is older than a run's second newest snapshot is retired, and with it the payloads up to that one.
    snapshots: tuple[SnapshotRecord, ...] = ()
    run_log: tuple[RunLogEntry, ...] = ()
