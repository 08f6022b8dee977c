"""API keys, known by their digest. It refuses to see a raw key.

Invariants: a revoked key's row stays, so that creating one key ends open mode for good; a key's tenant has a row of its
own; what operators do to keys is in the audit log, in the transaction that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from treadle.domain.fairness import WeightClass, tenant_of_user
from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.domain.records import KeyRecord
from treadle.errors import InvalidRequest
from treadle.store import policies
from treadle.store.audit import Author, add_change
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.request_rows import chunks
from treadle.store.tables import AnyRow, keys, tenants
from treadle.store.writer import Writer

# Whoever works on the database itself, without a key.
COMMAND_LINE = Author(TenantId("admin:local"), "command line")

_COLUMNS = (
    keys.c.key_id,
    keys.c.tenant_id,
    keys.c.user,
    keys.c.is_admin,
    keys.c.created_at,
    keys.c.revoked_at,
    keys.c.name,
    keys.c.expires_at,
    keys.c.created_by,
)
_FIND = sa.select(*_COLUMNS).where(keys.c.digest == sa.bindparam("digest"))
_GET = sa.select(*_COLUMNS).where(keys.c.key_id == sa.bindparam("of_key"))
_EXPIRIES = sa.select(keys.c.digest, keys.c.expires_at).where(
    keys.c.digest.in_(sa.bindparam("digests", expanding=True)), keys.c.revoked_at.is_(None)
)
_NEWEST = sa.select(*_COLUMNS).order_by(keys.c.key_id.desc())
_ANY = sa.select(sa.literal(1)).select_from(keys).limit(1)
_ADD = keys.insert().returning(*_COLUMNS)
# Locked, where the database has locks of rows, so that nobody else decides it meanwhile.
_ORGANIZATION = (
    sa.select(tenants.c.organization).where(tenants.c.tenant_id == sa.bindparam("of_tenant")).with_for_update()
)
_ORGANIZATIONS = sa.select(tenants.c.tenant_id, tenants.c.organization).where(
    tenants.c.tenant_id.in_(sa.bindparam("ids", expanding=True)), tenants.c.organization.is_not(None)
)
_JOIN = (
    tenants.update()
    .where(tenants.c.tenant_id == sa.bindparam("of_tenant"))
    .values(organization=sa.bindparam("new_organization"), updated_at=sa.bindparam("now"))
)
_CHANGE = keys.update().where(keys.c.key_id == sa.bindparam("of_key"))


class Keys:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._make_tenant = database.dialect.insert(tenants).on_conflict_do_nothing(
            index_elements=[tenants.c.tenant_id]
        )

    async def add(
        self,
        user: str,
        digest: str,
        is_admin: bool,
        *,
        name: str | None = None,
        expires_at: float | None = None,
        organization: str | None = None,
        author: Author = COMMAND_LINE,
    ) -> KeyRecord:
        """A new key of `user`, whose keys all belong to one tenant; `organization` becomes that tenant's.

        Raises InvalidRequest when the tenant is in another organisation, and ServerError when the digest exists.
        """
        values = {"user": user, "digest": digest, "is_admin": is_admin, "name": name, "expires_at": expires_at}
        return await self._writer.run(lambda conn: self._insert(conn, values, organization, author))

    async def add_first(self, user: str, digest: str, *, author: Author) -> KeyRecord | None:
        """An admin key, if no key was ever created; else None. Of servers that start together, one makes it."""
        values = {"user": user, "digest": digest, "is_admin": True, "name": "bootstrap", "expires_at": None}

        def write(conn: sa.Connection) -> KeyRecord | None:
            self._database.dialect.lock(conn, "the first key")
            is_first = conn.execute(_ANY).first() is None
            return self._insert(conn, values, None, author) if is_first else None

        return await self._writer.run(write)

    async def list(self) -> list[KeyRecord]:
        """The newest MAX_PAGE_ROWS keys, oldest of them first, revoked ones included."""
        return list(reversed(await self.page(limit=MAX_PAGE_ROWS)))

    async def page(self, *, limit: int, before: int | None = None, user: str | None = None) -> tuple[KeyRecord, ...]:
        """The newest `limit` keys with ids below `before`, newest first, revoked ones included. user: only theirs."""
        query = _NEWEST.limit(checked_limit(limit))
        if before is not None:
            query = query.where(keys.c.key_id < before)
        if user is not None:
            # By the tenant, which has an index.
            query = query.where(keys.c.tenant_id == tenant_of_user(user))
        rows = await self._database.read(lambda conn: conn.execute(query).all())
        return tuple(_record_of(row) for row in rows)

    async def organizations(self, tenant_ids: Sequence[TenantId]) -> dict[TenantId, str]:
        """The organisations of those of these tenants (a page of them) that have one."""
        values = {"ids": [*set(tenant_ids)]}
        rows = await self._database.read(lambda conn: conn.execute(_ORGANIZATIONS, values).all())
        return {TenantId(tenant_id): organization for tenant_id, organization in rows}

    async def get(self, key_id: int) -> KeyRecord | None:
        """The key with this id; check `revoked_at` and `expires_at`."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"of_key": key_id}).one_or_none())
        return None if row is None else _record_of(row)

    async def change(
        self, key_id: int, *, author: Author, name: str | None, expires_at: float | None
    ) -> KeyRecord | None:
        """The key with its new name and end, as it is afterwards; None when it is unknown. Not of a revoked one."""

        def write(conn: sa.Connection) -> KeyRecord | None:
            row = conn.execute(_GET.with_for_update(), {"of_key": key_id}).one_or_none()
            if row is None:
                return None
            before = _record_of(row)
            if before.revoked_at is not None:
                raise InvalidRequest(f"key {key_id} was revoked; create another one")
            after = replace(before, name=name, expires_at=expires_at)
            if after != before:
                conn.execute(_CHANGE.values(name=name, expires_at=expires_at), {"of_key": key_id})
                self._note(conn, author, "key.changed", before, after)
            return after

        return await self._writer.run(write)

    async def revoke(self, key_id: int, *, author: Author = COMMAND_LINE) -> bool:
        """Whether this call ended the key: False when it is unknown or was revoked before."""

        def write(conn: sa.Connection) -> bool:
            row = conn.execute(_GET.with_for_update(), {"of_key": key_id}).one_or_none()
            if row is None or row.revoked_at is not None:
                return False
            before = _record_of(row)
            after = replace(before, revoked_at=self._clock())
            conn.execute(_CHANGE.values(revoked_at=after.revoked_at), {"of_key": key_id})
            self._note(conn, author, "key.revoked", before, after)
            return True

        return await self._writer.run(write)

    async def find(self, digest: str) -> KeyRecord | None:
        """The key with this SHA-256 (hex); check `revoked_at` and `expires_at`."""
        row = await self._database.read(lambda conn: conn.execute(_FIND, {"digest": digest}).one_or_none())
        return None if row is None else _record_of(row)

    async def expiries(self, digests: Sequence[str]) -> dict[str, float | None]:
        """When those of these keys that were not revoked end."""

        def read(conn: sa.Connection) -> dict[str, float | None]:
            rows = (conn.execute(_EXPIRIES, {"digests": chunk}).all() for chunk in chunks(digests))
            return {digest: expires_at for found in rows for digest, expires_at in found}

        return await self._database.read(read)

    async def any_ever(self) -> bool:
        """Whether a key was ever created, revoked or not."""
        return await self._database.read(lambda conn: conn.execute(_ANY).first() is not None)

    def _insert(
        self, conn: sa.Connection, values: dict[str, Any], organization: str | None, author: Author
    ) -> KeyRecord:
        now = self._clock()
        tenant_id = tenant_of_user(values["user"])
        created_by = None if author == COMMAND_LINE else author.actor
        row = conn.execute(_ADD, {**values, "tenant_id": tenant_id, "created_at": now, "created_by": created_by}).one()
        record = _record_of(row)
        tenant = {
            "tenant_id": tenant_id,
            "weight_class": WeightClass.STANDARD.value,
            "source": "keys",
            "created_at": now,
            "updated_at": now,
        }
        conn.execute(self._make_tenant, tenant)
        if organization is not None:
            _join(conn, tenant_id, organization, now)
        shown = {**_shown(record), "organization": organization}
        add_change(conn, author, "key.created", f"key:{record.key_id}", before=None, after=shown, now=now)
        return record

    def _note(self, conn: sa.Connection, author: Author, event: str, before: KeyRecord, after: KeyRecord) -> None:
        subject = f"key:{before.key_id}"
        add_change(conn, author, event, subject, before=_shown(before), after=_shown(after), now=self._clock())


def _join(conn: sa.Connection, tenant_id: TenantId, organization: str, now: float) -> None:
    """Raises InvalidRequest when the tenant is in another organisation: that is for whoever decides about tenants."""
    current = conn.execute(_ORGANIZATION, {"of_tenant": tenant_id}).scalar_one()
    if current == organization:
        return
    if current is not None:
        raise InvalidRequest(
            f"{tenant_id} is in organization {current!r}; move it with PUT /admin/v1/tenants/{tenant_id} first"
        )
    conn.execute(_JOIN, {"of_tenant": tenant_id, "new_organization": organization, "now": now})
    policies.changed(conn, now)


def _shown(record: KeyRecord) -> dict[str, object]:
    """A key for the audit log."""
    return {
        "user": record.user,
        "name": record.name,
        "is_admin": record.is_admin,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def _record_of(row: AnyRow) -> KeyRecord:
    return KeyRecord(
        key_id=row.key_id,
        tenant_id=TenantId(row.tenant_id),
        user=row.user,
        is_admin=row.is_admin,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        name=row.name,
        expires_at=row.expires_at,
        created_by=row.created_by,
    )
