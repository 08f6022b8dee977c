"""What planning reads and what it decides. Pure data: no clock, no database, no tensors.

`plan_cycle(PolicyInput) -> (CyclePlan, PolicyState)` in scheduler/policy.py is the only producer of plans.
Queue heads only: each model's queued ops in seq order, at most MAX_HEADS_PER_MODEL of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.domain.ids import BlobKey, ModelId, RequestId, TenantId
from treadle.domain.ops import LoraSpec, OpKind

# The incarnation of a run's first state; each rebuilding counts up from it.
FIRST_INCARNATION = 1


@dataclass(frozen=True, slots=True)
class StateTag:
    """Which state of a run a worker holds. An op names the tag it starts from; a worker refuses any other.

    incarnation grows each time the state is rebuilt; applied_seq is the newest seq_id in it.
    """

    model_id: ModelId
    incarnation: int
    applied_seq: int


@dataclass(frozen=True, slots=True)
class QueuedOp:
    """One queued op as planning sees it. `quantum_tokens` is empty for everything but passes."""

    request_id: RequestId
    seq_id: int
    kind: OpKind
    quantum_tokens: tuple[int, ...] = ()
    # Quanta already run in earlier cycles of this op; its result comes when all are done.
    num_quanta_done: int = 0
    # How long the row has been queued, measured by the caller on the store's clock.
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelQueue:
    """One run's queue head. `ops` are sorted by seq_id; `next_seq_id` is the first one not yet consumed.

    settled_seq_ids: numbers from next_seq_id on whose requests were refused at admission. They are no holes: there
    is nothing to run for them, and what is behind them may run.
    """

    model_id: ModelId
    tenant_id: TenantId
    next_seq_id: int
    ops: tuple[QueuedOp, ...]
    settled_seq_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What planning remembers between cycles: each tenant's deficit in tokens, and whose turn it is.

    deficits: fair share minus what was served; positive is owed to the tenant, absent is 0. last_tenant: the last
    one that ran an op without tokens. turns: within a tenant, the model whose pass is due first.
    """

    deficits: Mapping[TenantId, float] = field(default_factory=dict)
    last_tenant: TenantId | None = None
    turns: Mapping[TenantId, ModelId] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicyInput:
    """Everything a plan may depend on.

    weights: share per tenant, 1.0 when absent. quarantined: requests that were in flight when a worker died;
    each is planned alone. gap_wait_s: how long a hole is waited for once a step, save or load is queued behind it.
    """

    models: tuple[ModelQueue, ...]
    state: PolicyState
    budget_tokens: int
    tenant_cap_tokens: int
    gap_wait_s: float
    weights: Mapping[TenantId, float] = field(default_factory=dict)
    quarantined: frozenset[RequestId] = frozenset()


@dataclass(frozen=True, slots=True)
class PlannedOp:
    """One op, or for a pass the quanta [quantum_start, quantum_stop) of it, in this cycle."""

    request_id: RequestId
    model_id: ModelId
    seq_id: int
    kind: OpKind
    quantum_start: int = 0
    quantum_stop: int = 0
    num_tokens: int = 0
    # False while a pass has more quanta for later cycles.
    is_last_part: bool = True


@dataclass(frozen=True, slots=True)
class Gap:
    """Sequence numbers of a model that never arrived and are given up: each becomes a FAILED row."""

    model_id: ModelId
    seq_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CyclePlan:
    """One cycle: per model setup, then passes, then steps, then publishes, always in seq order."""

    ops: tuple[PlannedOp, ...] = ()
    gaps: tuple[Gap, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(op.num_tokens for op in self.ops)

    @property
    def is_empty(self) -> bool:
        return not self.ops and not self.gaps


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A planned op with what a worker needs to run it. `payload` is as stored; the executor decodes it.

    starts_from: the tag the op expects (None creates the state). A worker that holds (incarnation, applied_seq)
    accepts the same incarnation and any applied_seq from its own up to the op's seq_id - 1: the sequence numbers
    between were refused or given up, and the scheduler vouches that none of them was applied.
    blob_key: where a save writes, assigned by the scheduler, never used before. num_refused_passes: for a step, how
    many forward_backward requests since the last one were refused at admission, so that no worker saw them.
    """

    planned: PlannedOp
    payload: bytes
    starts_from: StateTag | None
    blob_key: BlobKey | None = None
    num_refused_passes: int = 0


@dataclass(frozen=True, slots=True)
class RestoreItem:
    """Rebuild a run's state before the cycle's ops: from a registered snapshot, or fresh from its seed.

    `blob_key` None means that `lora` alone makes it. tag.applied_seq is the snapshot's seq_id: what was committed
    behind it follows as ordinary ops of this cycle and the next ones. with_optimizer False: the file's moments, if it
    has any, are not the run's.
    """

    model_id: ModelId
    lora: LoraSpec
    blob_key: BlobKey | None
    tag: StateTag
    with_optimizer: bool = True


@dataclass(frozen=True, slots=True)
class CycleWork:
    """A plan on its way to a worker.

    `token` fences: a worker refuses one older than it has seen, and a newer one ends a cycle on its way. predicted_s:
    how long it should take, 0 unknown; a worker that is silent for many times as long counts as hung.
    """

    token: int
    cycle: int
    items: tuple[WorkItem, ...]
    restores: tuple[RestoreItem, ...] = ()
    predicted_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SampleWork:
    """A sample on its way to a sampler; `payload` is as stored (a SampleOp, which names its weights)."""

    request_id: RequestId
    tenant_id: TenantId
    payload: bytes
