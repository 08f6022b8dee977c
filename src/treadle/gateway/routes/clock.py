"""treadle's own endpoints about waiting: where a request stands, and where the time of a run's recent ops went.

No SDK calls them; they are for people, and for tools such as `treadle runs show`. docs/clock.md explains the answers.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.backlog import Load, TenantBacklog
from treadle.domain.ids import ModelId, PoolName, RequestId, TenantId
from treadle.domain.records import RequestRecord, RunLogEntry
from treadle.domain.states import RequestState
from treadle.errors import NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.paging import page_of
from treadle.gateway.routing import Resource
from treadle.gateway.waiting import why_queued
from treadle.wire.answers import RequestAnswer, RunTimingAnswer
from treadle.wire.queries import LimitQuery

router = Resource("/api/v1/treadle")


@router.get("/requests/{request_id}", answer=RequestAnswer)
async def get_request(request: Request, request_id: str) -> Response:
    """One request of the caller: its state and, while it is queued, what is in front of it and why it waits."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    row = await gateway.store.requests.get(RequestId(request_id))
    if row is None or row.tenant_id != principal.tenant_id:
        raise NotFound(f"request {request_id[:120]!r} does not exist")
    body: dict[str, object] = {
        "request_id": row.request_id,
        "kind": row.kind.value,
        "state": row.state.value,
        "training_run_id": row.model_id,
        "seq_id": row.seq_id,
        "num_tokens": row.num_tokens,
        "num_bytes": row.payload_bytes,
        "created_at": iso_time(row.created_at),
    }
    if row.state is RequestState.QUEUED:
        body |= await _waiting(gateway, row)
    return json_response(body)


@router.get("/runs/{model_id}/timing", query=LimitQuery, answer=RunTimingAnswer)
async def get_run_timing(request: Request, model_id: str) -> Response:
    """Where the time of a run's recent passes and steps went, newest first, and what of it waits now."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    model = await gateway.access.model(principal, ModelId(model_id))
    entries = await gateway.store.run_log.read(model.model_id, page_of(request, default_limit=20).limit)
    waiting = gateway.backlog.of_tenant(model.tenant_id)[False]
    return json_response(
        {
            "training_run_id": model.model_id,
            "state": model.state.value,
            "next_seq_id": model.next_seq_id,
            "recent": [_timing(entry) for entry in reversed(entries)],
            "tenant": {"training": _load(waiting)},
            "pool": await _pool(gateway, model.pool, is_sample=False),
        }
    )


async def _waiting(gateway: Gateway, row: RequestRecord) -> dict[str, object]:
    wait = await why_queued(gateway, row)
    is_sample = row.model_id is None
    return {
        "queued_s": max(0.0, gateway.deps.clock.now() - row.created_at),
        "is_running": row.request_id in await gateway.store.leases.in_flight(row.pool),
        "queue_state": wait.state.value,
        "reason": wait.reason,
        "ahead": _load(wait.place.ahead),
        "waiting_for_seq_id": wait.place.missing_seq_id,
        "tenant": _tenant(gateway, row.tenant_id),
        "pool": await _pool(gateway, row.pool, is_sample=is_sample),
    }


def _tenant(gateway: Gateway, tenant_id: TenantId) -> dict[str, object]:
    """What the caller has waiting, in all pools, and what it may."""
    loads, limits = gateway.backlog.of_tenant(tenant_id), gateway.backlog.limits_of(tenant_id)
    return {
        "training": _load(loads[False]),
        "sampling": _load(loads[True]),
        "max_queued_tokens": limits.tokens_of_tenant,
        "max_queued_bytes": limits.bytes_of_tenant,
    }


async def _pool(gateway: Gateway, pool: PoolName, *, is_sample: bool) -> dict[str, object]:
    """The pool's line as this gateway last saw it, and the newest cycle. Sums only: tenants are not told apart."""
    entries = [entry for entry in gateway.backlog.in_pool(pool) if entry.is_sample == is_sample]
    lease = await gateway.store.leases.current(pool)
    view = gateway.deps.pools.by_name(pool)
    return {
        "name": pool,
        "is_ready": view is not None and view.is_ready,
        "cycle": None if lease is None else lease.cycle,
        "num_tenants": len(entries),
        "oldest_s": _oldest_s(entries, gateway.deps.clock.now()),
        **_load(sum((entry.load for entry in entries), start=Load())),
    }


def _oldest_s(entries: list[TenantBacklog], now: float) -> float:
    return max((now - entry.oldest_at for entry in entries), default=0.0)


def _load(load: Load) -> dict[str, int]:
    return {"num_ops": load.num_ops, "num_tokens": load.num_tokens, "num_bytes": load.num_bytes}


def _timing(entry: RunLogEntry) -> dict[str, object]:
    return {
        "seq_id": entry.seq_id,
        "kind": entry.kind.value,
        "finished_at": iso_time(entry.created_at),
        "num_tokens": int(entry.metrics.get("num_tokens", 0)),
        "queued_s": entry.queued_s,
        "run_s": entry.run_s,
        "cycle": entry.cycle,
    }
