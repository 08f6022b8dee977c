"""Pools and their models: add, pause, resume, drain, remove.

What is decided here is stored; every server follows within a second (store/pool_watch.py, server_pools.py).
docs/pools.md says what each state means for clients.
"""

from __future__ import annotations

from dataclasses import asdict

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from treadle.config import ModelSettings
from treadle.config.names import BUNDLED_MODEL
from treadle.domain.ids import PoolName
from treadle.domain.outcome import PoolFacts
from treadle.domain.pool_decisions import PoolDecision, PoolState
from treadle.errors import InvalidRequest, NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.store.slots import Slots
from treadle.wire.answers import ErrorAnswer
from treadle.wire.answers_admin_pools import PoolAnswer, PoolsAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.pool_bodies import AddPoolBody, PoolBody, ScalePoolBody

router = Resource("/admin/v1")

_OTHERS = {403: ErrorAnswer}


@router.get("/pools", answer=PoolsAnswer, others=_OTHERS)
async def list_pools(request: Request) -> Response:
    """Every pool: where its model comes from, what operators decided, whether it is ready, who leads it."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    own = [view.name for view in gateway.deps.pools.all()]
    others = sorted(gateway.deps.pools.decisions.pools.keys() - set(own))
    return json_response({"pools": [await _pool(gateway, name) for name in (*own, *others)]})


@router.post("/pools", body=AddPoolBody, answer=PoolAnswer, others=_OTHERS)
async def add_pool(request: Request) -> Response:
    """Serve a base model from now on, on every server of this database. One that cannot be loaded says why here, and
    is tried again. Idempotent."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(AddPoolBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    pool = PoolName(body.pool)
    source = _source_to_store(gateway, body)
    revision = None if source is None else body.revision
    await gateway.store.pool_settings.add(Author(principal.tenant_id, principal.actor), pool, source, revision)
    return await _answer(gateway, pool)


@router.post("/pools/pause", body=PoolBody, answer=PoolAnswer, others=_OTHERS)
async def pause_pool(request: Request) -> Response:
    """Begin nothing more of the pool: requests are admitted and wait, their clients are told why. What runs ends."""
    return await _decide(request, PoolState.PAUSED)


@router.post("/pools/resume", body=PoolBody, answer=PoolAnswer, others=_OTHERS)
async def resume_pool(request: Request) -> Response:
    """Serve a paused or draining pool as before."""
    return await _decide(request, PoolState.SERVING)


@router.post("/pools/drain", body=PoolBody, answer=PoolAnswer, others=_OTHERS)
async def drain_pool(request: Request) -> Response:
    """Refuse new runs and new sampling sessions of the pool, with the reason. What exists goes on."""
    return await _decide(request, PoolState.DRAINING)


@router.post("/pools/scale", body=ScalePoolBody, answer=PoolAnswer, others=_OTHERS)
async def scale_pool(request: Request) -> Response:
    """Have so many workers of the pool from now on. New ones get their part of the tenants; of those too many the last
    ones leave when their tenants have moved and their samples are done. Nothing is lost, and nobody is refused."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(ScalePoolBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    pool = PoolName(body.pool)
    await _check_known(gateway, pool)
    author = Author(principal.tenant_id, principal.actor)
    await gateway.store.pool_settings.scale(author, pool, num_workers=body.workers, num_samplers=body.samplers)
    return await _answer(gateway, pool)


@router.post("/pools/remove", body=PoolBody, answer=PoolAnswer, others=_OTHERS)
async def remove_pool(request: Request) -> Response:
    """Persist the pool's runs and stop its worker, on every server and over restarts. Its runs, checkpoints and queued
    requests stay stored, and go on when it is added again."""
    return await _decide(request, PoolState.REMOVED)


async def _decide(request: Request, state: PoolState) -> Response:
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(PoolBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    pool = PoolName(body.pool)
    await _check_known(gateway, pool)
    author = Author(principal.tenant_id, principal.actor)
    await gateway.store.pool_settings.decide(author, pool, state, body.reason)
    return await _answer(gateway, pool)


async def _check_known(gateway: Gateway, pool: PoolName) -> None:
    """Raises NotFound."""
    if not await _is_known(gateway, pool):
        raise NotFound(f"pool {pool[:200]!r} does not exist; GET /admin/v1/pools lists those that do")


async def _is_known(gateway: Gateway, pool: PoolName) -> bool:
    """Whether this server has it, operators decided about it, or another server leads it."""
    await gateway.deps.pools.refresh()
    if gateway.deps.pools.by_name(pool) is not None or gateway.deps.pools.decision(pool) is not None:
        return True
    return await gateway.store.leases.current(pool) is not None


async def _answer(gateway: Gateway, pool: PoolName) -> Response:
    await gateway.deps.pools.refresh()
    return json_response(await _pool(gateway, pool))


def _source_to_store(gateway: Gateway, body: AddPoolBody) -> str | None:
    """The source of a pool that is to be added; None: as it is or was before. Raises InvalidRequest."""
    _check_model(body)
    pool = PoolName(body.pool)
    view = gateway.deps.pools.by_name(pool)
    if view is not None:
        if body.source is None or (body.source, body.revision) == (view.source, view.revision):
            return None
        at = "" if view.revision is None else f" at {view.revision}"
        raise InvalidRequest(
            f"pool {pool} is served already, from {view.source}{at}; choose another name, or remove it first"
        )
    decision = gateway.deps.pools.decision(pool)
    if body.source is None and decision is None:
        raise InvalidRequest(f"source is missing: no pool {pool} was served before")
    is_of_settings = decision is not None and decision.source is None
    if is_of_settings and gateway.deps.pools.settings_of(pool) == (body.source, body.revision):
        return None
    return body.source


def _check_model(body: AddPoolBody) -> None:
    """Raises InvalidRequest for what `--model` would refuse, and for what differs from server to server."""
    source = body.source
    try:
        ModelSettings(name=body.pool, source=source or "", revision=body.revision)
    except ValidationError as error:
        raise InvalidRequest(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
    if source is None:
        if body.revision is not None:
            raise InvalidRequest("a revision without its source; name both, or neither")
        return
    if not source.isprintable() or source != source.strip():
        raise InvalidRequest(f"source {source[:200]!r} is no hub name and no path")
    if body.pool == BUNDLED_MODEL and source != BUNDLED_MODEL:
        raise InvalidRequest(f"{BUNDLED_MODEL!r} is the bundled model's name; give {source[:200]!r} another one")
    if source in (".", "..") or source.startswith(("./", "../", "~")):
        raise InvalidRequest(f"source {source[:200]!r} is relative to a server's place; give an absolute path")
    if body.revision is not None and (source.startswith("/") or source == BUNDLED_MODEL):
        raise InvalidRequest(f"source {source[:200]!r} is a directory, which has no revisions; leave revision out")


async def _pool(gateway: Gateway, pool: PoolName) -> dict[str, object]:
    view, decision = gateway.deps.pools.by_name(pool), gateway.deps.pools.decision(pool)
    report = await gateway.store.pools.report(pool)
    lease = await gateway.store.leases.current(pool)
    slots = Slots() if lease is None else (await gateway.store.slots.report(lease)).slots
    state = PoolState.SERVING if decision is None else decision.state
    is_ready = report.is_ready if view is None else view.is_ready
    if state is PoolState.REMOVED:
        is_ready, why = False, "it was removed"
    elif view is None:
        why = report.reason
    else:
        why = view.reason or "loading"
    facts = report.facts if view is None else view.facts
    decided = decision or PoolDecision(pool, state)
    return {
        "name": pool,
        "source": decided.source if view is None else view.source,
        "revision": decided.revision if view is None else view.revision,
        "is_added": decided.source is not None,
        "state": state.value,
        "reason": decided.reason,
        "decided_at": None if decision is None else iso_time(decision.decided_at),
        "is_ready": is_ready,
        "not_ready_reason": "" if is_ready else why,
        "leader": report.holder or None,
        "cycle": None if lease is None else lease.cycle,
        "num_workers": report.num_workers,
        "num_deaths": report.num_deaths,
        "wanted_workers": decided.num_workers,
        "wanted_samplers": decided.num_samplers,
        "workers": [asdict(worker) for worker in slots.workers],
        "facts": None if facts is None else _facts(facts),
    }


def _facts(facts: PoolFacts) -> dict[str, object]:
    return {
        "revision": facts.revision,
        "architecture": facts.architecture,
        "vocab_size": facts.vocab_size,
        "max_context_length": facts.max_context_length,
        "num_parameters": facts.num_parameters,
        "dtype": facts.dtype,
        "device": facts.device,
    }
