"""What an outside service said about tokens, shared by all gateways and kept over restarts.

A token is known by its SHA-256; it refuses to see one, and to know whom anybody asks. Invariant: whoever is a member by
a verdict here has a row among the tenants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from treadle.domain.fairness import WeightClass
from treadle.domain.ids import TenantId
from treadle.store import policies
from treadle.store.engine import Database
from treadle.store.request_rows import chunks
from treadle.store.tables import tenants, token_verdicts
from treadle.store.writer import Writer

# Long over: deleted by the way, some with each new one, so that the table does not grow for ever.
_MAX_DROPPED = 100

_v = token_verdicts.c
_COLUMNS = (_v.digest, _v.method, _v.tenant_id, _v.user, _v.is_member, _v.checked_at, _v.good_until)
_FIND = sa.select(*_COLUMNS).where(_v.digest == sa.bindparam("of_digest"), _v.method == sa.bindparam("of_method"))
_AMONG = sa.select(*_COLUMNS).where(
    _v.digest.in_(sa.bindparam("digests", expanding=True)), _v.method == sa.bindparam("of_method")
)
_EXTEND = (
    token_verdicts.update()
    .where(
        _v.digest == sa.bindparam("of_digest"),
        _v.method == sa.bindparam("of_method"),
        _v.good_until < sa.bindparam("until"),
    )
    .values(good_until=sa.bindparam("until"))
)
_FORGET = token_verdicts.delete().where(_v.digest == sa.bindparam("of_digest"), _v.method == sa.bindparam("of_method"))
_DROP = token_verdicts.delete().where(
    _v.digest.in_(sa.select(_v.digest).where(_v.checked_at < sa.bindparam("before")).limit(_MAX_DROPPED))
)
_ORGANIZATION = sa.select(tenants.c.organization).where(tenants.c.tenant_id == sa.bindparam("of_tenant"))
_JOIN = (
    tenants.update()
    .where(tenants.c.tenant_id == sa.bindparam("of_tenant"), tenants.c.organization.is_(None))
    .values(organization=sa.bindparam("new_organization"), updated_at=sa.bindparam("now"))
)


@dataclass(frozen=True, slots=True)
class TokenVerdict:
    """Whose a token is. method: who was asked, and about what; a verdict of another one says nothing.

    checked_at: when that was said. good_until: how long it is believed.
    """

    digest: str
    method: str
    tenant_id: TenantId
    user: str
    is_member: bool
    checked_at: float
    good_until: float


class TokenVerdicts:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        insert = database.dialect.insert(token_verdicts)
        changed = ("method", "tenant_id", "user", "is_member", "checked_at", "good_until")
        self._put = insert.on_conflict_do_update(
            index_elements=[_v.digest], set_={name: insert.excluded[name] for name in changed}
        )
        self._make_tenant = database.dialect.insert(tenants).on_conflict_do_nothing(
            index_elements=[tenants.c.tenant_id]
        )

    async def find(self, digest: str, method: str) -> TokenVerdict | None:
        """What was said about a token, however long ago."""
        values = {"of_digest": digest, "of_method": method}
        row = await self._database.read(lambda conn: conn.execute(_FIND, values).one_or_none())
        return None if row is None else TokenVerdict(*row)

    async def among(self, digests: Sequence[str], method: str) -> dict[str, TokenVerdict]:
        """The verdicts there are about these tokens."""

        def read(conn: sa.Connection) -> dict[str, TokenVerdict]:
            pages = (conn.execute(_AMONG, {"digests": chunk, "of_method": method}).all() for chunk in chunks(digests))
            return {row.digest: TokenVerdict(*row) for rows in pages for row in rows}

        return await self._database.read(read)

    async def put(self, verdict: TokenVerdict, *, source: str, organization: str, forget_before: float) -> bool:
        """Keep a verdict in place of the one before. Whether the picture of policies changed.

        A member's tenant gets a row with that source, and the organisation unless it is in one. Verdicts that were
        given before `forget_before` are dropped by the way.
        """

        def write(conn: sa.Connection) -> bool:
            conn.execute(_DROP, {"before": forget_before})
            conn.execute(self._put, asdict(verdict))
            return verdict.is_member and self._has_joined(conn, verdict.tenant_id, source, organization)

        return await self._writer.run(write)

    async def extend(self, digest: str, method: str, good_until: float) -> None:
        """Believe a verdict for longer: nobody could be asked. Never for less."""
        values = {"of_digest": digest, "of_method": method, "until": good_until}
        await self._writer.run(lambda conn: conn.execute(_EXTEND, values).rowcount)

    async def forget(self, digest: str, method: str) -> None:
        """The token is worth nothing any more. Idempotent."""
        values = {"of_digest": digest, "of_method": method}
        await self._writer.run(lambda conn: conn.execute(_FORGET, values).rowcount)

    def _has_joined(self, conn: sa.Connection, tenant_id: TenantId, source: str, organization: str) -> bool:
        """Whether the tenant is in an organisation now and was in none before."""
        now = self._clock()
        tenant = {
            "tenant_id": tenant_id,
            "weight_class": WeightClass.STANDARD.value,
            "source": source,
            "created_at": now,
            "updated_at": now,
        }
        conn.execute(self._make_tenant, tenant)
        values = {"of_tenant": tenant_id, "new_organization": organization, "now": now}
        if conn.execute(_ORGANIZATION, {"of_tenant": tenant_id}).scalar_one() is not None:
            return False
        conn.execute(_JOIN, values)
        policies.changed(conn, now)
        return True
