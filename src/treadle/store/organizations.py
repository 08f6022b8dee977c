"""Organisations: names that tenants share, so that one decision is about all of them.

It refuses to know what is decided. Invariants: one that a tenant is in, or that a quota or a rule is about, is not
deleted; every change is in the audit log.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from treadle.domain.policy import Scope
from treadle.domain.tenants import OrganizationRecord
from treadle.errors import InvalidRequest
from treadle.store.audit import Author, add_change
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.tables import AnyRow, loss_rules, organizations, quotas, tenants
from treadle.store.writer import Writer

# Those that an operator made, and those that tenants came with.
_names = sa.union(
    sa.select(organizations.c.name),
    sa.select(tenants.c.organization).where(tenants.c.organization.is_not(None)),
).subquery()
_size = (
    sa.select(sa.func.count())
    .where(tenants.c.organization == _names.c.name)
    .correlate(_names)
    .scalar_subquery()
    .label("num_tenants")
)
_LIST = sa.select(_names.c.name, organizations.c.description, organizations.c.created_at, _size).outerjoin_from(
    _names, organizations, organizations.c.name == _names.c.name
)
_PAGE = _LIST.where(_names.c.name > sa.bindparam("after")).order_by(_names.c.name).limit(sa.bindparam("max_rows"))
_GET = _LIST.where(_names.c.name == sa.bindparam("name"))
_LOCKED = sa.select(organizations.c.description).where(organizations.c.name == sa.bindparam("name")).with_for_update()
_DESCRIBE = (
    organizations.update()
    .where(organizations.c.name == sa.bindparam("of_name"))
    .values(description=sa.bindparam("new_description"))
)
_DELETE = organizations.delete().where(organizations.c.name == sa.bindparam("of_name"))
_NUM_TENANTS = sa.select(sa.func.count()).where(tenants.c.organization == sa.bindparam("name"))
_RULES_ABOUT = tuple(
    sa.select(sa.func.count()).where(table.c.scope == sa.bindparam("scope")) for table in (quotas, loss_rules)
)


class Organizations:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._make = (
            database.dialect.insert(organizations)
            .on_conflict_do_nothing(index_elements=[organizations.c.name])
            .returning(organizations.c.name)
        )

    async def list(self, limit: int, *, after: str = "") -> list[OrganizationRecord]:
        """The next `limit` organisations by name."""
        values = {"after": after, "max_rows": checked_limit(limit)}
        rows = await self._database.read(lambda conn: conn.execute(_PAGE, values).all())
        return [_record_of(row) for row in rows]

    async def get(self, name: str) -> OrganizationRecord | None:
        """One organisation; None when no operator made it and no tenant is in it."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"name": name}).one_or_none())
        return None if row is None else _record_of(row)

    async def put(self, name: str, description: str, *, author: Author) -> None:
        """Make it, or describe it anew. Idempotent."""

        def write(conn: sa.Connection) -> None:
            now = self._clock()
            values = {"name": name, "description": description, "created_at": now}
            before: dict[str, object] | None = None
            if conn.execute(self._make, values).one_or_none() is None:
                before = {"description": conn.execute(_LOCKED, {"name": name}).scalar_one()}
                conn.execute(_DESCRIBE, {"of_name": name, "new_description": description})
            after = {"description": description}
            if before != after:
                subject = f"organization:{name}"
                add_change(conn, author, "organization.set", subject, before=before, after=after, now=now)

        await self._writer.run(write)

    async def delete(self, name: str, *, author: Author) -> bool:
        """Whether there was such an organisation that an operator made.

        Raises InvalidRequest while tenants are in it, or quotas or loss rules are about it.
        """

        def write(conn: sa.Connection) -> bool:
            description = conn.execute(_LOCKED, {"name": name}).scalar_one_or_none()
            if num_tenants := conn.execute(_NUM_TENANTS, {"name": name}).scalar_one():
                raise InvalidRequest(f"organization {name!r} has {num_tenants} tenants; move them out of it first")
            if description is None:
                return False
            scope = str(Scope("organization", name))
            if any(conn.execute(query, {"scope": scope}).scalar_one() for query in _RULES_ABOUT):
                raise InvalidRequest(f"quotas or loss rules are about {scope!r}; delete them first")
            conn.execute(_DELETE, {"of_name": name})
            before = {"description": description}
            subject = f"organization:{name}"
            add_change(conn, author, "organization.deleted", subject, before=before, after=None, now=self._clock())
            return True

        return await self._writer.run(write)


def _record_of(row: AnyRow) -> OrganizationRecord:
    return OrganizationRecord(
        name=row.name,
        description=row.description or "",
        num_tenants=row.num_tenants,
        created_at=row.created_at,
    )
