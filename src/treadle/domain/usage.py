"""What is counted of a tenant's work: kinds, amounts and the hours that they fall into.

It refuses to know prices. Invariant: hours are UTC's, and begin on multiples of 3,600 seconds since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from treadle.domain.ids import SessionId, TenantId

HOUR_S = 3_600
# Storage of an hour is counted so long after its end: a commit is tried for a minute, and its checkpoints are as old as
# its cycle.
SETTLED_AFTER_S = 300


class UsageKind(StrEnum):
    """What an amount counts: tokens, named saves (CHECKPOINT), or bytes times seconds (STORAGE)."""

    TRAINING = "training"
    PREFILL = "sampling_prefill"
    PREFILL_CACHED = "sampling_prefill_cached"
    SAMPLED = "sampling_sample"
    CHECKPOINT = "checkpoint"
    STORAGE = "storage"


@dataclass(frozen=True, slots=True)
class SampleUsage:
    """Tokens of one finished sample request. num_cached_tokens: of its prompt, found in the prefix cache."""

    num_prompt_tokens: int
    num_sampled_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What one session used of one kind in the hour that begins at `bucket_start`, in epoch seconds.

    model_id: the run, "" for samples of weights that are none of its tenant's runs.
    """

    tenant_id: TenantId
    bucket_start: int
    session_id: SessionId
    base_model: str
    kind: UsageKind
    amount: float
    model_id: str = ""


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """What the live checkpoints of one project take."""

    tenant_id: TenantId
    project_id: str
    num_checkpoints: int
    num_bytes: int


def hour_of(seconds: float) -> int:
    """The first second of the hour that this time is in."""
    return int(seconds // HOUR_S) * HOUR_S
