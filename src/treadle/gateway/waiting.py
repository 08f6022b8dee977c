"""Why a queued request has no result yet, for the client that waits and the user who asks.

It refuses to know how cycles are planned: it says what stands in front of a request, not when its turn comes.
Invariant: nothing about another tenant is told but sums over a whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.domain.backlog import Place
from treadle.domain.pool_decisions import PoolDecision, PoolState
from treadle.domain.rates import RateKind
from treadle.domain.records import RequestRecord
from treadle.domain.states import QueueState
from treadle.gateway.context import Gateway


@dataclass(frozen=True, slots=True)
class Wait:
    """Why one request waits: the SDK's word for it, words for a person, and its place in its own line."""

    state: QueueState
    reason: str
    place: Place


async def why_queued(gateway: Gateway, row: RequestRecord) -> Wait:
    """Why the request of this queued row waits. The first of several reasons is given."""
    place = await gateway.store.backlog.place_of(row)
    pool = gateway.deps.pools.by_name(row.pool)
    if (stopped := _stopped(gateway.deps.pools.decision(row.pool))) is not None:
        return Wait(QueueState.PAUSED_CAPACITY, stopped, place)
    if pool is None:
        return Wait(QueueState.PAUSED_CAPACITY, f"base model {row.pool} is not served by this server now", place)
    if not pool.is_ready:
        reason = f"base model {pool.name} is not ready: {pool.reason or 'loading'}"
        return Wait(QueueState.PAUSED_CAPACITY, reason, place)
    if place.missing_seq_id is not None:
        return Wait(
            QueueState.PAUSED_CAPACITY, f"waiting for request {place.missing_seq_id}, which has not come", place
        )
    is_sample = row.model_id is None
    if (paused := await _rate(gateway, row, place)) is not None:
        return Wait(QueueState.PAUSED_RATE_LIMIT, paused, place)
    if (excess := gateway.backlog.excess(row.tenant_id, is_sample=is_sample)) is not None:
        return Wait(excess.state, excess.words, place)
    return Wait(QueueState.ACTIVE, _in_line(gateway, row, place), place)


def _stopped(decision: PoolDecision | None) -> str | None:
    """What an operator stopped, and why; None when nothing."""
    if decision is None or decision.state not in (PoolState.PAUSED, PoolState.REMOVED):
        return None
    why = f": {decision.reason}" if decision.reason else ""
    if decision.state is PoolState.PAUSED:
        return f"base model {decision.pool} is paused by an operator{why}"
    return f"base model {decision.pool} is not served now, an operator removed it{why}"


async def _rate(gateway: Gateway, row: RequestRecord, place: Place) -> str | None:
    """Why a request waits for a rate, if it does: it costs tokens, or stands behind what does."""
    if not (row.num_tokens or place.ahead.num_tokens):
        return None
    kind = RateKind.SAMPLING if row.model_id is None else RateKind.TRAINING
    use = await gateway.quotas.used_up(row.tenant_id, kind)
    return None if use is None else gateway.quotas.words_of(use)


def _in_line(gateway: Gateway, row: RequestRecord, place: Place) -> str:
    whose = "your samples" if row.model_id is None else "this run's requests"
    ahead = f"{place.ahead.num_ops:,} of {whose} ({place.ahead.num_tokens:,} tokens) are ahead"
    others = {entry.tenant_id for entry in gateway.backlog.in_pool(row.pool)} - {row.tenant_id}
    return f"{ahead}; {len(others):,} other tenants have work in the pool"
