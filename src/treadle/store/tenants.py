"""What operators decide about tenants: weight classes, organisations, suspensions.

It refuses to know what a class is worth and who asks. Invariants: a tenant without a row is STANDARD, in no group
and not suspended; a change is in the audit log, and makes the picture of policies a newer one, in its transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.fairness import WeightClass
from treadle.domain.ids import TenantId
from treadle.domain.tenants import TenantChange, TenantRecord
from treadle.errors import InvalidRequest
from treadle.store import policies
from treadle.store.audit import Author, add_change
from treadle.store.engine import Database
from treadle.store.tables import IS_SET_APART, AnyRow, organizations, tenants
from treadle.store.writer import Writer

COLUMNS = (
    tenants.c.tenant_id,
    tenants.c.weight_class,
    tenants.c.organization,
    tenants.c.source,
    tenants.c.is_suspended,
    tenants.c.suspended_reason,
    tenants.c.created_at,
    tenants.c.updated_at,
)
_CLASSES = sa.select(tenants.c.tenant_id, tenants.c.weight_class).where(IS_SET_APART).order_by(tenants.c.tenant_id)
_CLASSES_OF = sa.select(tenants.c.tenant_id, tenants.c.weight_class).where(
    tenants.c.tenant_id.in_(sa.bindparam("ids", expanding=True))
)
_GET = sa.select(*COLUMNS).where(tenants.c.tenant_id == sa.bindparam("of_tenant"))
_OF_ORGANIZATION = sa.select(tenants.c.tenant_id).where(tenants.c.organization == sa.bindparam("name")).limit(1)
# Locked, where the database has locks of rows, so that nobody deletes it meanwhile.
_ORGANIZATION = (
    sa.select(organizations.c.name).where(organizations.c.name == sa.bindparam("name")).with_for_update(read=True)
)
_CHANGE = tenants.update().where(tenants.c.tenant_id == sa.bindparam("of_tenant"))


class Tenants:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        insert = database.dialect.insert(tenants)
        self._set_class = insert.on_conflict_do_update(
            index_elements=[tenants.c.tenant_id],
            set_={name: insert.excluded[name] for name in ("weight_class", "updated_at")},
        )
        # Not by its row count, which PostgreSQL's driver does not know of inserts.
        self._make_row = (
            database.dialect.insert(tenants)
            .on_conflict_do_nothing(index_elements=[tenants.c.tenant_id])
            .returning(tenants.c.tenant_id)
        )

    async def set_class(self, tenant_id: TenantId, weight_class: WeightClass) -> None:
        """Give a tenant, which need not have done anything yet, a class. Idempotent, and not in the audit log."""
        now = self._clock()
        values = {
            "tenant_id": tenant_id,
            "weight_class": weight_class.value,
            "source": "admin",
            "created_at": now,
            "updated_at": now,
        }
        await self._writer.run(lambda conn: conn.execute(self._set_class, values).close())

    async def classes(self) -> dict[TenantId, WeightClass]:
        """The classes of all tenants that are not STANDARD."""
        rows = await self._database.read(lambda conn: conn.execute(_CLASSES).all())
        return {TenantId(tenant_id): WeightClass(weight_class) for tenant_id, weight_class in rows}

    async def classes_of(self, tenant_ids: Sequence[TenantId]) -> dict[TenantId, WeightClass]:
        """The classes of those of these tenants (at most MAX_IDS_PER_QUERY) that have a row."""
        rows = await self._database.read(lambda conn: conn.execute(_CLASSES_OF, {"ids": list(tenant_ids)}).all())
        return {TenantId(tenant_id): WeightClass(weight_class) for tenant_id, weight_class in rows}

    async def get(self, tenant_id: TenantId) -> TenantRecord | None:
        """What is stored about a tenant; None for nothing."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"of_tenant": tenant_id}).one_or_none())
        return None if row is None else record_of(row)

    async def change(self, tenant_id: TenantId, change: TenantChange, *, author: Author) -> TenantRecord:
        """The tenant as it is afterwards; it need not have done anything yet. What changes nothing leaves no trace.

        Raises InvalidRequest for an organisation that does not exist, and for a reason without a suspension.
        """

        def write(conn: sa.Connection) -> TenantRecord:
            now = self._clock()
            is_new = self._insert_default(conn, tenant_id, now)
            # The lock keeps `before` true until the transaction ends.
            before = record_of(conn.execute(_GET.with_for_update(), {"of_tenant": tenant_id}).one())
            values = _new_values(conn, before, change)
            if not values and not is_new:
                return before
            conn.execute(_CHANGE.values(**values, updated_at=now), {"of_tenant": tenant_id})
            after = record_of(conn.execute(_GET, {"of_tenant": tenant_id}).one())
            add_change(
                conn,
                author,
                "tenant.changed",
                f"tenant:{tenant_id}",
                before=None if is_new else _shown(before),
                after=_shown(after),
                now=now,
            )
            policies.changed(conn, now)
            return after

        return await self._writer.run(write)

    def _insert_default(self, conn: sa.Connection, tenant_id: TenantId, now: float) -> bool:
        """Whether it had no row."""
        values = {
            "tenant_id": tenant_id,
            "weight_class": WeightClass.STANDARD.value,
            "source": "admin",
            "created_at": now,
            "updated_at": now,
        }
        return conn.execute(self._make_row, values).one_or_none() is not None


def _new_values(conn: sa.Connection, before: TenantRecord, change: TenantChange) -> dict[str, Any]:
    """The columns that change. Raises InvalidRequest."""
    values: dict[str, Any] = {}
    if change.weight_class is not None:
        values["weight_class"] = change.weight_class.value
    if change.organization is not None:
        values["organization"] = _checked_organization(conn, change.organization)
    is_suspended = before.is_suspended if change.is_suspended is None else change.is_suspended
    values["is_suspended"] = is_suspended
    if not is_suspended:
        if change.suspended_reason:
            raise InvalidRequest("suspended_reason is of a suspension: set is_suspended too")
        values["suspended_reason"] = None
    elif change.suspended_reason is not None:
        values["suspended_reason"] = change.suspended_reason
    return {name: value for name, value in values.items() if value != getattr(before, name)}


def _checked_organization(conn: sa.Connection, name: str) -> str | None:
    if not name:
        return None
    if not any(conn.execute(query, {"name": name}).first() for query in (_ORGANIZATION, _OF_ORGANIZATION)):
        raise InvalidRequest(f"organization {name!r} does not exist; make it with PUT /admin/v1/organizations/NAME")
    return name


def _shown(record: TenantRecord) -> dict[str, object]:
    """A tenant for the audit log."""
    return {
        "weight_class": record.weight_class.value,
        "organization": record.organization,
        "is_suspended": record.is_suspended,
        "suspended_reason": record.suspended_reason,
    }


def record_of(row: AnyRow) -> TenantRecord:
    """A row of COLUMNS."""
    return TenantRecord(
        tenant_id=TenantId(row.tenant_id),
        weight_class=WeightClass(row.weight_class),
        organization=row.organization,
        source=row.source,
        is_suspended=bool(row.is_suspended),
        suspended_reason=row.suspended_reason,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
