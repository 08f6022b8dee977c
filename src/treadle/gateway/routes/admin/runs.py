"""Training runs of all tenants: list, inspect, snapshot, evict.

A command is stored here and carried out by whoever leads the run's pool, between two cycles. It refuses to know how.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.commands import CommandKind, OperatorCommand
from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.pool_decisions import PoolState
from treadle.domain.records import ModelRecord, RunLogEntry, SnapshotRecord
from treadle.domain.states import ModelState
from treadle.errors import InvalidRequest, NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.keyset import cursor_of, place_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.store.run_search import RunFilter, RunWork
from treadle.wire.answers import ErrorAnswer
from treadle.wire.answers_admin_pools import (
    AdminRunDetailAnswer,
    AdminRunsAnswer,
    CommandAnswer,
    CommandGivenAnswer,
)
from treadle.wire.pool_bodies import AdminRunsQuery

router = Resource("/admin/v1")

_OTHERS = {403: ErrorAnswer}
NUM_RECENT_OPS = 20


@router.get("/runs", query=AdminRunsQuery, answer=AdminRunsAnswer, others=_OTHERS)
async def list_runs(request: Request) -> Response:
    """Runs of all tenants, newest first."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, AdminRunsQuery)
    after = None
    if query.after is not None:
        created_at, model_id = place_of(query.after, float, str)
        after = (created_at, ModelId(model_id))
    wanted = RunFilter(
        tenant_id=None if query.tenant is None else TenantId(query.tenant),
        pool=None if query.pool is None else PoolName(query.pool),
        state=query.state,
    )
    runs = await gateway.store.run_search.page(wanted, limit=query.limit, after=after)
    is_last = len(runs) < query.limit
    cursor = None if is_last else cursor_of((runs[-1].created_at, runs[-1].model_id))
    return json_response({"runs": [_run(run) for run in runs], "next": cursor})


@router.get("/runs/{model_id}", answer=AdminRunDetailAnswer, others=_OTHERS)
async def show_run(request: Request, model_id: str) -> Response:
    """One run: its state, what it can be restored from and what that would cost, what waits, its newest requests."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    run = await _find(gateway, model_id)
    debt = await gateway.store.snapshots.debt(run.model_id)
    newest_seq_id = debt.snapshots[0].seq_id if debt.snapshots else -1
    work = await gateway.store.run_search.work(run, snapshot_seq_id=newest_seq_id)
    entries = await gateway.store.run_log.read(run.model_id, NUM_RECENT_OPS)
    replay = {
        "num_ops": work.num_replayed,
        "run_s": work.replay_s,
        "num_payloads": debt.num_payloads,
        "payload_bytes": debt.payload_bytes,
    }
    return json_response(
        {
            **_run(run),
            **_shape(run),
            **await _residence(gateway, run),
            "snapshots": [_snapshot(snapshot) for snapshot in debt.snapshots],
            "replay": replay,
            "queued": _queued(work, gateway.deps.clock.now()),
            "recent": [_op(entry) for entry in reversed(entries)],
        }
    )


@router.post("/runs/{model_id}/snapshot", answer=CommandGivenAnswer, others=_OTHERS)
async def snapshot_run(request: Request, model_id: str) -> Response:
    """Have the leader of its pool register a snapshot of the run's state, between two cycles."""
    return await _command(request, model_id, CommandKind.SNAPSHOT)


@router.post("/runs/{model_id}/evict", answer=CommandGivenAnswer, others=_OTHERS)
async def evict_run(request: Request, model_id: str) -> Response:
    """Have the leader of its pool persist the run and its worker forget it. Its next request brings it back."""
    return await _command(request, model_id, CommandKind.EVICT)


@router.get("/commands/{command_id}", answer=CommandAnswer, others=_OTHERS)
async def show_command(request: Request, command_id: str) -> Response:
    """What became of a command."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    number = int(command_id) if command_id.isascii() and command_id.isdecimal() and len(command_id) < 19 else -1
    command = await gateway.store.commands.get(number) if number >= 0 else None
    if command is None:
        raise NotFound(f"command {command_id[:80]!r} was never given, or is forgotten")
    return json_response(_command_body(command))


async def _command(request: Request, model_id: str, kind: CommandKind) -> Response:
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    run = await _find(gateway, model_id)
    if run.state is not ModelState.READY:
        raise InvalidRequest(f"run {run.model_id} is {run.state.value}: it has no state that could be written")
    if gateway.deps.pools.decisions.state_of(run.pool) is PoolState.REMOVED:
        raise InvalidRequest(f"pool {run.pool} was removed: its runs are persisted, and no worker holds them")
    author = Author(principal.tenant_id, principal.actor)
    return json_response({"command_id": await gateway.store.commands.give(author, kind, run)})


async def _find(gateway: Gateway, model_id: str) -> ModelRecord:
    run = await gateway.store.models.get(ModelId(model_id))
    if run is None:
        raise NotFound(f"run {model_id[:120]!r} does not exist")
    return run


async def _residence(gateway: Gateway, run: ModelRecord) -> dict[str, object]:
    lease = await gateway.store.leases.current(run.pool)
    if lease is None:
        return {"is_resident": None, "leader": None}
    report = await gateway.store.slots.report(lease)
    is_resident = None if report.reported_at is None else run.model_id in report.slots.model_ids
    return {"is_resident": is_resident, "leader": lease.holder}


def _run(run: ModelRecord) -> dict[str, object]:
    return {
        "training_run_id": run.model_id,
        "tenant_id": run.tenant_id,
        "session_id": run.session_id,
        "pool": run.pool,
        "base_model": run.base_model,
        "lora_rank": run.lora.rank,
        "state": run.state.value,
        "state_message": run.state_message,
        "next_seq_id": run.next_seq_id,
        "created_at": iso_time(run.created_at),
        "last_request_at": iso_time(run.last_request_at),
    }


def _shape(run: ModelRecord) -> dict[str, object]:
    return {
        "lora_seed": run.lora.seed,
        "train_attn": run.lora.train_attn,
        "train_mlp": run.lora.train_mlp,
        "train_unembed": run.lora.train_unembed,
        "incarnation": run.incarnation,
        "changed_seq": run.changed_seq,
        "user_metadata": dict(run.user_metadata),
    }


def _snapshot(snapshot: SnapshotRecord) -> dict[str, object]:
    return {
        "seq_id": snapshot.seq_id,
        "num_bytes": snapshot.num_bytes,
        "created_at": iso_time(snapshot.created_at),
        "numerics_profile": snapshot.numerics_profile,
        "is_seed": snapshot.blob_key is None,
    }


def _queued(work: RunWork, now: float) -> dict[str, object]:
    return {
        "num_ops": work.waiting.num_ops,
        "num_tokens": work.waiting.num_tokens,
        "num_bytes": work.waiting.num_bytes,
        "oldest_s": None if work.oldest_at is None else max(0.0, now - work.oldest_at),
    }


def _op(entry: RunLogEntry) -> dict[str, object]:
    return {
        "seq_id": entry.seq_id,
        "kind": entry.kind.value,
        "finished_at": iso_time(entry.created_at),
        "queued_s": entry.queued_s,
        "run_s": entry.run_s,
        "cycle": entry.cycle,
        "metrics": dict(entry.metrics),
    }


def _command_body(command: OperatorCommand) -> dict[str, object]:
    outcome = command.outcome
    state = "open" if outcome is None else "done" if outcome.is_done else "failed"
    return {
        "command_id": command.command_id,
        "kind": command.kind.value,
        "training_run_id": command.model_id,
        "pool": command.pool,
        "created_by": command.created_by,
        "created_at": iso_time(command.created_at),
        "state": state,
        "done_at": None if command.done_at is None else iso_time(command.done_at),
        "message": "" if outcome is None else outcome.message,
    }
