"""What waits and what runs: queues and slots of all pools, from what the store has and leaders report.

Any server answers the same. What only the scheduler of a leader knows (its deficits, what it will plan next) is in
nobody's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.backlog import TenantBacklog
from treadle.domain.fairness import WeightClass
from treadle.domain.ids import PoolName, TenantId
from treadle.domain.records import ModelRecord
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.queries import query_of
from treadle.gateway.routes.admin.tenants import FORBIDDEN
from treadle.gateway.routing import Resource
from treadle.store.slots import Slots, SlotsReport
from treadle.wire.admin_bodies import QueueQuery, SlotsQuery
from treadle.wire.answers_admin_queue import QueueAnswer, SlotsAnswer

router = Resource("/admin/v1")


@router.get("/queue", query=QueueQuery, answer=QueueAnswer, others=FORBIDDEN)
async def show_queue(request: Request) -> Response:
    """What every tenant has waiting or running in every pool now: requests, tokens, bytes, age of the oldest."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, QueueQuery)
    waiting = await gateway.store.backlog.read()
    classes = await gateway.store.tenants.classes()
    pools = []
    for pool in _pools(gateway, query.pool, {entry.pool for entry in waiting}):
        entries = [entry for entry in waiting if entry.pool == pool]
        pools.append(await _queue_of(gateway, pool, entries, classes, limit=query.limit))
    return json_response({"pools": pools})


@router.get("/slots", query=SlotsQuery, answer=SlotsAnswer, others=FORBIDDEN)
async def show_slots(request: Request) -> Response:
    """Which runs and samples each pool's worker holds now, by its leader's report, which follows within a second."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, SlotsQuery)
    pools = [await _slots_of(gateway, pool, limit=query.limit) for pool in _pools(gateway, query.pool, set())]
    return json_response({"pools": pools})


def _pools(gateway: Gateway, only: str | None, others: set[PoolName]) -> list[PoolName]:
    """This server's pools as it names them, then others that have work waiting."""
    own = [view.name for view in gateway.deps.pools.all()]
    names = own + sorted(others - set(own))
    return names if only is None else [name for name in names if name == only]


async def _queue_of(
    gateway: Gateway,
    pool: PoolName,
    entries: Sequence[TenantBacklog],
    classes: Mapping[TenantId, WeightClass],
    *,
    limit: int,
) -> dict[str, object]:
    now = gateway.deps.clock.now()
    report = await gateway.store.pools.report(pool)
    lease = await gateway.store.leases.current(pool)
    in_flight = await gateway.store.leases.in_flight(pool)
    of_tenant: dict[TenantId, list[TenantBacklog]] = {}
    for entry in entries:
        of_tenant.setdefault(entry.tenant_id, []).append(entry)
    largest = sorted(of_tenant.items(), key=lambda item: (-sum(one.load.num_tokens for one in item[1]), item[0]))
    return {
        "pool": pool,
        "is_ready": report.is_ready,
        "reason": "" if report.is_ready else report.reason,
        "leader": report.holder or None,
        "cycle": None if lease is None else lease.cycle,
        "num_in_flight": len(in_flight),
        **_work(entries, now),
        "num_tenants": len(of_tenant),
        "tenants": [
            {
                "tenant_id": tenant_id,
                "weight_class": classes.get(tenant_id, WeightClass.STANDARD).value,
                **_work(own, now),
            }
            for tenant_id, own in largest[:limit]
        ],
    }


def _work(entries: Sequence[TenantBacklog], now: float) -> dict[str, object]:
    """Training and sampling, added up."""

    def total(is_sample: bool) -> dict[str, object]:
        found = [entry for entry in entries if entry.is_sample == is_sample]
        return {
            "num_ops": sum(entry.load.num_ops for entry in found),
            "num_tokens": sum(entry.load.num_tokens for entry in found),
            "num_bytes": sum(entry.load.num_bytes for entry in found),
            "oldest_s": max(0.0, now - min(entry.oldest_at for entry in found)) if found else None,
        }

    return {"training": total(False), "sampling": total(True)}


async def _slots_of(gateway: Gateway, pool: PoolName, *, limit: int) -> dict[str, object]:
    lease = await gateway.store.leases.current(pool)
    report = SlotsReport(Slots(), None) if lease is None else await gateway.store.slots.report(lease)
    shown = sorted(report.slots.model_ids)[:limit]
    models = await gateway.store.models.of_ids(shown)
    has_report = report.reported_at is not None
    return {
        "pool": pool,
        "leader": None if lease is None else lease.holder,
        "cycle": None if lease is None else lease.cycle,
        "reported_at": None if report.reported_at is None else iso_time(report.reported_at),
        "num_runs": len(report.slots.model_ids) if has_report else None,
        "runs": [_slot(model) for model in models],
        "num_samples": sum(report.slots.num_samples.values()) if has_report else None,
        "samples": [
            {"tenant_id": tenant_id, "num_samples": number}
            for tenant_id, number in sorted(report.slots.num_samples.items())
        ],
        "workers": [asdict(worker) for worker in report.slots.workers],
    }


def _slot(model: ModelRecord) -> dict[str, object]:
    return {
        "model_id": model.model_id,
        "tenant_id": model.tenant_id,
        "lora_rank": model.lora.rank,
        "state": model.state.value,
        "next_seq_id": model.next_seq_id,
        "last_request_at": iso_time(model.last_request_at),
    }
