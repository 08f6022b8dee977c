"""The search for sessions: newest first, page by page, each with what its checkpoints take.

It refuses to know who may search; a query is about what one tenant may read. Invariant: a page begins right behind the
last session of the one before, however many were made since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from treadle.domain.ids import SessionId, TenantId
from treadle.domain.records import SessionRecord
from treadle.domain.states import SessionState
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.sessions import SESSION_COLUMNS, record_of, session_project
from treadle.store.sharing import effective_members, readable_session_ids
from treadle.store.tables import checkpoints, models, sessions

_s = sessions.c
# Of the sessions of one page.
_SIZES = (
    sa.select(models.c.session_id, sa.func.count(), sa.func.sum(checkpoints.c.size_bytes))
    .join_from(checkpoints, models)
    .where(
        models.c.session_id.in_(sa.bindparam("ids", expanding=True)),
        sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > sa.bindparam("now", type_=sa.Double)),
    )
    .group_by(models.c.session_id)
)


@dataclass(frozen=True, slots=True)
class Place:
    """Behind which session a page begins. created_at is used when there is no such session (any more)."""

    created_at: float
    session_id: SessionId


@dataclass(frozen=True, slots=True)
class SessionQuery:
    """What to look for among a tenant's sessions; None filters nothing.

    with_shared: among those that others share with it as well. owners: of which one must own the session.
    display_name: words that must all be in the name, whatever their case (SQLite: of ASCII letters). A session with
    this session_id matches as well as one with this display_name. user_metadata: pairs that must all be there.
    states: of which one must fit; of finished sessions also the reason, unless it is None.
    """

    tenant_id: TenantId
    limit: int
    with_shared: bool = False
    owners: Sequence[TenantId] | None = None
    session_id: SessionId | None = None
    display_name: str | None = None
    project_ids: Sequence[str] | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    states: Sequence[tuple[SessionState, str | None]] | None = None
    behind: Place | None = None


@dataclass(frozen=True, slots=True)
class FoundSession:
    """A session and its live checkpoints."""

    record: SessionRecord
    num_checkpoints: int
    checkpoint_bytes: int


class SessionSearch:
    """See the module."""

    def __init__(self, *, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def find(self, query: SessionQuery) -> list[FoundSession]:
        """The next `query.limit` sessions."""
        statement = _statement(query, self._database.dialect)
        now = self._clock()

        def read(conn: sa.Connection) -> list[FoundSession]:
            records = [record_of(row) for row in conn.execute(statement)]
            ids = [record.session_id for record in records]
            sizes = {row[0]: (row[1], int(row[2])) for row in conn.execute(_SIZES, {"ids": ids, "now": now})}
            return [FoundSession(record, *sizes.get(record.session_id, (0, 0))) for record in records]

        return await self._database.read(read)

    async def projects_among(self, tenant_id: TenantId, project_ids: Sequence[str]) -> set[str]:
        """Those of these projects that a session of the tenant is in, or that the tenant takes part in."""
        own = sa.select(session_project).where(_s.tenant_id == tenant_id, session_project.in_(project_ids))
        members = effective_members().c
        joined = sa.select(members.project_id).where(
            members.tenant_id == tenant_id, members.project_id.in_(project_ids)
        )
        query = sa.union(own, joined)
        return set(await self._database.read(lambda conn: conn.execute(query).scalars().all()))


def _statement(query: SessionQuery, dialect: Dialect) -> sa.Select[tuple[object, ...]]:
    statement = (
        sa.select(*SESSION_COLUMNS)
        .where(_is_readable(sessions, query))
        .order_by(_s.created_at.desc(), _s.session_id.desc())
        .limit(checked_limit(query.limit))
    )
    if query.owners is not None:
        statement = statement.where(_s.tenant_id.in_(query.owners))
    if (named := _named(query)) is not None:
        statement = statement.where(named)
    if query.project_ids is not None:
        statement = statement.where(session_project.in_(query.project_ids))
    for name, value in query.user_metadata.items():
        statement = statement.where(dialect.has_pair(_s.user_metadata, name, value))
    if query.states is not None:
        statement = statement.where(sa.or_(sa.false(), *(_is_in(*state) for state in query.states)))
    if query.behind is not None:
        statement = statement.where(_is_behind(query, query.behind))
    return statement


def _is_readable(table: sa.FromClause, query: SessionQuery) -> sa.ColumnElement[bool]:
    """Of rows of `sessions`, under whatever name."""
    if query.with_shared:
        return table.c.session_id.in_(readable_session_ids(query.tenant_id))
    return table.c.tenant_id == query.tenant_id


def _named(query: SessionQuery) -> sa.ColumnElement[bool] | None:
    ways: list[sa.ColumnElement[bool]] = []
    if query.session_id is not None:
        ways.append(_s.session_id == query.session_id)
    if query.display_name is not None:
        words = query.display_name.split()
        ways.append(sa.and_(sa.true(), *(_s.display_name.icontains(word, autoescape=True) for word in words)))
    return sa.or_(*ways) if ways else None


def _is_in(state: SessionState, reason: str | None) -> sa.ColumnElement[bool]:
    is_in = _s.state == state.value
    return is_in if reason is None else sa.and_(is_in, _s.finish_reason == reason)


def _is_behind(query: SessionQuery, place: Place) -> sa.ColumnElement[bool]:
    # A cursor holds microseconds; the row knows the time exactly.
    last = sessions.alias()
    exact = (
        sa.select(last.c.created_at)
        .where(last.c.session_id == place.session_id, _is_readable(last, query))
        .scalar_subquery()
    )
    created_at = sa.func.coalesce(exact, sa.literal(place.created_at, sa.Double))
    return sa.or_(_s.created_at < created_at, sa.and_(_s.created_at == created_at, _s.session_id < place.session_id))
