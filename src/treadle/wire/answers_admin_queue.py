"""Answers to operators about what waits and what workers hold. See answers.py."""

from __future__ import annotations

from datetime import datetime

from treadle.wire.answers import Answer, LoadAnswer
from treadle.wire.answers_admin_pools import PoolWorkerAnswer


class QueuedWorkAnswer(LoadAnswer):
    """What waits or runs."""

    oldest_s: float | None
    """Seconds since the oldest of it came; null for nothing."""


class QueuedTenantAnswer(Answer):
    """What one tenant has waiting in one pool."""

    tenant_id: str
    weight_class: str
    training: QueuedWorkAnswer
    sampling: QueuedWorkAnswer


class QueuedPoolAnswer(Answer):
    """What waits in one pool."""

    pool: str
    is_ready: bool
    reason: str
    """Why it is not ready."""
    leader: str | None
    """Which server leads it now."""
    cycle: int | None
    """Number of its newest cycle."""
    num_in_flight: int
    """Training requests that the worker has, as its leader noted before the cycle."""
    training: QueuedWorkAnswer
    sampling: QueuedWorkAnswer
    num_tenants: int
    tenants: list[QueuedTenantAnswer]
    """Those with the most waiting tokens first."""


class QueueAnswer(Answer):
    pools: list[QueuedPoolAnswer]


class SlotAnswer(Answer):
    """One run that a worker holds."""

    model_id: str
    tenant_id: str
    lora_rank: int
    state: str
    next_seq_id: int
    last_request_at: datetime


class RunningSamplesAnswer(Answer):
    tenant_id: str
    num_samples: int
    """Sample requests that the worker has."""


class SlotsOfPoolAnswer(Answer):
    """What the workers of one pool hold, as its leader reported it at most a second before it changed."""

    pool: str
    leader: str | None
    cycle: int | None
    reported_at: datetime | None
    """Null when nobody leads it, or its leader has said nothing yet."""
    num_runs: int | None
    runs: list[SlotAnswer]
    num_samples: int | None
    samples: list[RunningSamplesAnswer]
    workers: list[PoolWorkerAnswer]
    """One by one."""


class SlotsAnswer(Answer):
    pools: list[SlotsOfPoolAnswer]
