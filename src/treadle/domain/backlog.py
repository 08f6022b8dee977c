"""How much work waits, and in front of whom: sums over queued requests, in operations, tokens and stored bytes."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.domain.ids import PoolName, TenantId


@dataclass(frozen=True, slots=True)
class Load:
    """Queued requests added up. num_bytes: of their stored payloads."""

    num_ops: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.num_ops + other.num_ops, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class TenantBacklog:
    """What one tenant has waiting in one pool, samples and training ops apart. oldest_at: epoch seconds."""

    pool: PoolName
    tenant_id: TenantId
    is_sample: bool
    load: Load
    oldest_at: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a queued request stands. ahead: what its tenant's own line holds in front of it.

    missing_seq_id: the first number in front of it that never came, which its run waits for; None when all are there.
    """

    ahead: Load
    missing_seq_id: int | None = None
