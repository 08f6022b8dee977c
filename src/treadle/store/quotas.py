"""Quotas: what operators set, and the counts that are compared with them inside the transactions that add to them.

It refuses to know a server's own limits and what values make sense. Invariants: of runs and checkpoints, whatever
happens at the same time, no transaction takes a tenant over a limit; what it had before stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId, TenantId, op_request_id
from treadle.domain.outcome import Failure
from treadle.domain.policy import Policies, Quota, Scope
from treadle.domain.quotas import at_limit
from treadle.domain.records import CheckpointRecord, FinishedCycle, FinishedRequest
from treadle.domain.states import Category
from treadle.store import policies as policy_store
from treadle.store.audit import Author, add_change
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.tables import IS_ACTIVE, IS_ALIVE, IS_QUEUED, IS_SAMPLE, checkpoints, models, quotas, sessions
from treadle.store.tables import requests as requests_table
from treadle.store.writer import Writer

_KNOWN = frozenset(quota.value for quota in Quota)
_ALL = sa.select(quotas.c.scope, quotas.c.quota, quotas.c.value).order_by(quotas.c.scope, quotas.c.quota)
_OF_SCOPE = sa.select(quotas.c.quota, quotas.c.value).where(quotas.c.scope == sa.bindparam("of_scope"))
_CLEAR = quotas.delete().where(quotas.c.scope == sa.bindparam("of_scope"))
_OF_TENANT: sa.BindParameter[str] = sa.bindparam("of_tenant")
_NUM_ALIVE = (
    sa.select(sa.func.count())
    .select_from(models.join(sessions, sessions.c.session_id == models.c.session_id))
    .where(models.c.tenant_id == _OF_TENANT, IS_ALIVE, IS_ACTIVE, models.c.model_id != sa.bindparam("besides"))
)
_NUM_SAMPLES = (
    sa.select(sa.func.count())
    .select_from(requests_table)
    .where(requests_table.c.tenant_id == _OF_TENANT, IS_QUEUED, IS_SAMPLE)
)
_c = checkpoints.c
_IS_KEPT = sa.and_(
    _c.tenant_id == _OF_TENANT,
    sa.or_(_c.expires_at.is_(None), _c.expires_at > sa.bindparam("now", type_=sa.Double)),
)
_SAVED = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_c.size_bytes), 0)).where(_IS_KEPT)
_SAVED_AT = sa.select(_c.tinker_path, _c.size_bytes).where(
    _IS_KEPT, _c.tinker_path.in_(sa.bindparam("paths", expanding=True))
)

# What frees a place, in words for the tenant.
FREE_A_MODEL = "unload one (unload_model) or finish the session of one"
FREE_A_CHECKPOINT = "delete one"


@dataclass(frozen=True, slots=True)
class Saved:
    """What a tenant's checkpoints come to: those whose time is not up."""

    num: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Using:
    """What a tenant has of things that quotas count. num_samples: that wait or run."""

    num_models: int
    num_samples: int
    saved: Saved


@dataclass(frozen=True, slots=True)
class SaveLimits:
    """A tenant's quotas on checkpoints; None: unlimited."""

    num: int | None
    num_bytes: int | None

    @staticmethod
    def of(policies: Policies, tenant_id: TenantId) -> SaveLimits | None:
        """None when neither is set."""
        limits = SaveLimits(
            policies.quota(tenant_id, Quota.CHECKPOINTS), policies.quota(tenant_id, Quota.CHECKPOINT_BYTES)
        )
        return None if limits.num is None and limits.num_bytes is None else limits

    def refusal(self, before: Saved, after: Saved) -> str | None:
        """Why a save may not take a tenant from `before` to `after`, if it may not. What adds nothing always may."""
        if self.num is not None and after.num > max(self.num, before.num):
            what = f"you have {before.num:,} of {self.num:,} checkpoints"
            return at_limit(Quota.CHECKPOINTS, what, advice=FREE_A_CHECKPOINT)
        if self.num_bytes is not None and after.num_bytes > max(self.num_bytes, before.num_bytes):
            added = after.num_bytes - before.num_bytes
            what = (
                f"your checkpoints have {before.num_bytes:,} of {self.num_bytes:,} bytes, and this one takes {added:,}"
            )
            return at_limit(Quota.CHECKPOINT_BYTES, what, advice=FREE_A_CHECKPOINT)
        return None


class Quotas:
    """What operators set, and what tenants use of it now."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        insert = database.dialect.insert(quotas)
        self._put = insert.on_conflict_do_update(
            index_elements=[quotas.c.scope, quotas.c.quota],
            set_={"value": insert.excluded.value, "updated_at": insert.excluded.updated_at},
        )

    async def all(self) -> dict[str, dict[Quota, int]]:
        """What is set, by scope."""
        found: defaultdict[str, dict[Quota, int]] = defaultdict(dict)
        for scope, quota, value in await self._database.read(lambda conn: conn.execute(_ALL).all()):
            if quota in _KNOWN:
                found[scope][Quota(quota)] = value
        return dict(found)

    async def of(self, scope: Scope) -> dict[Quota, int]:
        """What is set for one scope."""
        return await self._database.read(lambda conn: _set_for(conn, scope))

    async def change(self, scope: Scope, changes: Mapping[Quota, int | None], author: Author) -> dict[Quota, int]:
        """Set these, or unset those that are None; what is set for the scope then. Audited when anything changes."""

        def write(conn: sa.Connection) -> dict[Quota, int]:
            before = _set_for(conn, scope)
            after = {quota: value for quota, value in {**before, **changes}.items() if value is not None}
            if after != before:
                now = self._clock()
                conn.execute(_CLEAR, {"of_scope": str(scope)})
                rows = [
                    {"scope": str(scope), "quota": quota.value, "value": value, "updated_at": now}
                    for quota, value in after.items()
                ]
                if rows:
                    conn.execute(self._put, rows)
                policy_store.changed(conn, now)
                add_change(conn, author, "quota.set", str(scope), before=before, after=after, now=now)
            return after

        return await self._writer.run(write)

    async def clear(self, scope: Scope, author: Author) -> dict[Quota, int]:
        """Unset all of a scope: what was set."""

        def write(conn: sa.Connection) -> dict[Quota, int]:
            before = _set_for(conn, scope)
            if before:
                now = self._clock()
                conn.execute(_CLEAR, {"of_scope": str(scope)})
                policy_store.changed(conn, now)
                add_change(conn, author, "quota.deleted", str(scope), before=before, after=None, now=now)
            return before

        return await self._writer.run(write)

    async def num_models(self, tenant_id: TenantId) -> int:
        """Runs that are alive: created or being created, in an active session."""
        return await self._database.read(lambda conn: _num_alive(conn, tenant_id))

    async def num_samples(self, tenant_id: TenantId) -> int:
        """Samples that wait or run."""
        return await self._database.read(lambda conn: _num_samples(conn, tenant_id))

    async def saved(self, tenant_id: TenantId) -> Saved:
        """What its checkpoints come to."""
        return await self._database.read(lambda conn: _saved(conn, tenant_id, self._clock()))

    async def using(self, tenant_id: TenantId) -> Using:
        """All of these at one moment."""

        def read(conn: sa.Connection) -> Using:
            return Using(
                num_models=_num_alive(conn, tenant_id),
                num_samples=_num_samples(conn, tenant_id),
                saved=_saved(conn, tenant_id, self._clock()),
            )

        return await self._database.read(read)


def too_many_models(
    conn: sa.Connection, dialect: Dialect, tenant_id: TenantId, model_id: ModelId, *, max_alive: int
) -> Failure | None:
    """Why a tenant may not have this run as well, inside the write transaction that creates it."""
    dialect.lock(conn, f"models of {tenant_id}")
    num_alive = _num_alive(conn, tenant_id, besides=model_id)
    if num_alive < max_alive:
        return None
    what = f"you have {num_alive:,} of {max_alive:,} models"
    return Failure(at_limit(Quota.MODELS, what, advice=FREE_A_MODEL), Category.USER)


def no_room_for(
    conn: sa.Connection, dialect: Dialect, copy: CheckpointRecord, limits: SaveLimits, now: float
) -> str | None:
    """Why a tenant may not have this new checkpoint as well, inside the write transaction that adds it."""
    dialect.lock(conn, f"checkpoints of {copy.tenant_id}")
    before = _saved(conn, copy.tenant_id, now)
    return limits.refusal(before, Saved(before.num + 1, before.num_bytes + copy.size_bytes))


@dataclass(frozen=True, slots=True)
class Judged:
    """A cycle without the saves that its tenants' quotas have no room for, and the blobs that these wrote."""

    cycle: FinishedCycle
    unused_keys: tuple[BlobKey, ...] = ()


def judge_saves(conn: sa.Connection, dialect: Dialect, cycle: FinishedCycle, policies: Policies, now: float) -> Judged:
    """Take out what would exceed a quota, inside the transaction that publishes the rest: those requests fail.

    A save that replaces its own name adds only what it is larger by. Where it is refused, what was there stays.
    """
    owners = {record.tenant_id for record in cycle.checkpoints}
    limits = {tenant_id: of for tenant_id in sorted(owners) if (of := SaveLimits.of(policies, tenant_id)) is not None}
    if not limits:
        return Judged(cycle)
    refused: dict[str, tuple[CheckpointRecord, str]] = {}
    for tenant_id, limit in limits.items():
        dialect.lock(conn, f"checkpoints of {tenant_id}")
        wanted = [record for record in cycle.checkpoints if record.tenant_id == tenant_id]
        for record, reason in _without_room(conn, tenant_id, wanted, limit, now):
            refused[op_request_id(record.model_id, record.seq_id)] = record, reason
    return Judged(_without(cycle, refused), _written_for_nothing(cycle, refused)) if refused else Judged(cycle)


def _without_room(
    conn: sa.Connection, tenant_id: TenantId, wanted: list[CheckpointRecord], limits: SaveLimits, now: float
) -> list[tuple[CheckpointRecord, str]]:
    values = {"of_tenant": tenant_id, "now": now, "paths": [record.tinker_path for record in wanted]}
    there = {str(path): int(size) for path, size in conn.execute(_SAVED_AT, values)}
    saved = _saved(conn, tenant_id, now)
    refused = []
    for record in wanted:
        is_new, old_bytes = record.tinker_path not in there, there.get(record.tinker_path, 0)
        after = Saved(saved.num + is_new, saved.num_bytes + record.size_bytes - old_bytes)
        if (reason := limits.refusal(saved, after)) is not None:
            refused.append((record, reason))
        else:
            saved, there[record.tinker_path] = after, record.size_bytes
    return refused


def _without(cycle: FinishedCycle, refused: Mapping[str, tuple[CheckpointRecord, str]]) -> FinishedCycle:
    return replace(
        cycle,
        checkpoints=tuple(
            record for record in cycle.checkpoints if op_request_id(record.model_id, record.seq_id) not in refused
        ),
        finished=tuple(
            FinishedRequest(one.request_id, failure=Failure(refused[one.request_id][1], Category.USER))
            if one.request_id in refused
            else one
            for one in cycle.finished
        ),
    )


def _written_for_nothing(
    cycle: FinishedCycle, refused: Mapping[str, tuple[CheckpointRecord, str]]
) -> tuple[BlobKey, ...]:
    """A training checkpoint is a snapshot of its run as well, and stays as that."""
    kept = {snapshot.blob_key for snapshot in cycle.snapshots}
    return tuple(record.blob_key for record, _ in refused.values() if record.blob_key not in kept)


def _set_for(conn: sa.Connection, scope: Scope) -> dict[Quota, int]:
    rows = conn.execute(_OF_SCOPE, {"of_scope": str(scope)})
    return {Quota(quota): value for quota, value in rows if quota in _KNOWN}


def _num_alive(conn: sa.Connection, tenant_id: TenantId, *, besides: str = "") -> int:
    return int(conn.execute(_NUM_ALIVE, {"of_tenant": tenant_id, "besides": besides}).scalar_one())


def _num_samples(conn: sa.Connection, tenant_id: TenantId) -> int:
    return int(conn.execute(_NUM_SAMPLES, {"of_tenant": tenant_id}).scalar_one())


def _saved(conn: sa.Connection, tenant_id: TenantId, now: float) -> Saved:
    num, num_bytes = conn.execute(_SAVED, {"of_tenant": tenant_id, "now": now}).one()
    return Saved(int(num), int(num_bytes))
