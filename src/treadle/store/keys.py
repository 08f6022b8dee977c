"""API keys, known by their digest. It refuses to see a raw key. Invariant: a revoked key's row stays, so that
creating one key ends open mode for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.domain.records import KeyRecord
from treadle.store.engine import Database
from treadle.store.request_rows import chunks
from treadle.store.tables import AnyRow, keys
from treadle.store.writer import Writer

_COLUMNS = (
    keys.c.key_id,
    keys.c.tenant_id,
    keys.c.user,
    keys.c.is_admin,
    keys.c.created_at,
    keys.c.revoked_at,
)
_FIND = sa.select(*_COLUMNS).where(keys.c.digest == sa.bindparam("digest"))
_REVOKED = sa.select(keys.c.digest).where(
    keys.c.digest.in_(sa.bindparam("digests", expanding=True)), keys.c.revoked_at.is_not(None)
)
_LIST = sa.select(*_COLUMNS).order_by(keys.c.key_id.desc()).limit(MAX_PAGE_ROWS)
_ANY = sa.select(sa.literal(1)).select_from(keys).limit(1)
_ADD = keys.insert().returning(*_COLUMNS)
_REVOKE = (
    keys.update()
    .where(keys.c.key_id == sa.bindparam("of_key"), keys.c.revoked_at.is_(None))
    .values(revoked_at=sa.bindparam("now"))
)


class Keys:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock

    async def add(self, user: str, digest: str, is_admin: bool) -> KeyRecord:
        """A new key of `user`, whose keys all belong to one tenant. Raises ServerError when the digest exists."""
        values = {
            "tenant_id": f"user:{user}",
            "user": user,
            "digest": digest,
            "is_admin": is_admin,
            "created_at": self._clock(),
        }
        row = await self._writer.run(lambda conn: conn.execute(_ADD, values).one())
        return _record_of(row)

    async def list(self) -> list[KeyRecord]:
        """The newest MAX_PAGE_ROWS keys, oldest of them first, revoked ones included."""
        rows = await self._database.read(lambda conn: conn.execute(_LIST).all())
        return [_record_of(row) for row in reversed(rows)]

    async def revoke(self, key_id: int) -> bool:
        """Whether this call ended the key: False when it is unknown or was revoked before."""
        values = {"of_key": key_id, "now": self._clock()}
        return await self._writer.run(lambda conn: conn.execute(_REVOKE, values).rowcount == 1)

    async def find(self, digest: str) -> KeyRecord | None:
        """The key with this SHA-256 (hex); check `revoked_at`."""
        row = await self._database.read(lambda conn: conn.execute(_FIND, {"digest": digest}).one_or_none())
        return None if row is None else _record_of(row)

    async def revoked_among(self, digests: Sequence[str]) -> set[str]:
        """Those of these digests whose keys were revoked."""

        def revoked(conn: sa.Connection) -> set[str]:
            rows = (conn.execute(_REVOKED, {"digests": chunk}).scalars() for chunk in chunks(digests))
            return {digest for found in rows for digest in found}

        return await self._database.read(revoked)

    async def any_ever(self) -> bool:
        """Whether a key was ever created, revoked or not."""
        return await self._database.read(lambda conn: conn.execute(_ANY).first() is not None)


def _record_of(row: AnyRow) -> KeyRecord:
    key_id, tenant_id, user, is_admin, created_at, revoked_at = row
    return KeyRecord(
        key_id=key_id,
        tenant_id=TenantId(tenant_id),
        user=user,
        is_admin=is_admin,
        created_at=created_at,
        revoked_at=revoked_at,
    )
