"""What all gateways of a database must agree on and nobody outside may know, like the key that signs URLs.

It refuses to know what a secret is for. Invariant: a name that was read once has that value for good: of several that
make one at the same time, the first to commit is taken, by all.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from treadle.store.engine import Database
from treadle.store.tables import secrets
from treadle.store.writer import Writer

_READ = sa.select(secrets.c.value).where(secrets.c.name == sa.bindparam("of_name"))


class Secrets:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._insert = database.dialect.insert(secrets).on_conflict_do_nothing(index_elements=[secrets.c.name])

    async def get_or_create(self, name: str, make: Callable[[], str]) -> str:
        """The secret called `name`; the first caller of all servers makes it. Idempotent.

        make: a fresh value, of which none is used when somebody else was faster.
        """
        found = await self._find(name)
        if found is not None:
            return found
        values = {"name": name, "value": make(), "created_at": self._clock()}
        await self._writer.run(lambda conn: conn.execute(self._insert, values).rowcount)
        # Read behind the commit: the row is there now, whoever wrote it.
        committed = await self._find(name)
        assert committed is not None, "a secret is never deleted"
        return committed

    async def _find(self, name: str) -> str | None:
        values = {"of_name": name}
        return await self._database.read(lambda conn: conn.execute(_READ, values).scalar_one_or_none())
