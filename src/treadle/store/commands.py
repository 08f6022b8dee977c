"""Operators' commands about runs: asked for by any gateway, carried out by whoever leads the pool.

It refuses to know how one is carried out. Invariants: a command is in the audit log when, and only when, it was given;
only the leader ends one (`fence`), and one that has ended never changes.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from treadle.domain.commands import CommandKind, CommandOutcome, OperatorCommand
from treadle.domain.ids import ModelId, PoolName
from treadle.domain.limits import MAX_OPEN_COMMANDS, MAX_ROWS_PER_SWEEP
from treadle.domain.records import LeaseRecord, ModelRecord
from treadle.errors import InvalidRequest
from treadle.store.audit import Author, add_change
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.leases import fence
from treadle.store.tables import IS_OPEN_COMMAND, AnyRow, operator_commands
from treadle.store.writer import Writer

_c = operator_commands.c
_OPEN = (
    sa.select(*_c)
    .where(_c.pool == sa.bindparam("of_pool"), IS_OPEN_COMMAND)
    .order_by(_c.command_id)
    .limit(MAX_OPEN_COMMANDS)
)
_NUM_OPEN = sa.select(sa.func.count()).where(_c.pool == sa.bindparam("of_pool"), IS_OPEN_COMMAND)
_SAME = (
    sa.select(_c.command_id)
    .where(
        _c.pool == sa.bindparam("of_pool"),
        _c.model_id == sa.bindparam("of_model"),
        _c.kind == sa.bindparam("of_kind"),
        IS_OPEN_COMMAND,
    )
    .limit(1)
)
_ONE = sa.select(*_c).where(_c.command_id == sa.bindparam("id"))
_END = (
    operator_commands.update()
    .where(_c.command_id == sa.bindparam("id"), IS_OPEN_COMMAND)
    .values(done_at=sa.bindparam("now"), outcome=sa.bindparam("words"))
)
_OLD = sa.select(_c.command_id).where(_c.created_at < sa.bindparam("before")).limit(MAX_ROWS_PER_SWEEP)
_FORGET = operator_commands.delete().where(_c.command_id.in_(_OLD))


class Commands:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, events: Events, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._clock = clock

    async def give(self, author: Author, kind: CommandKind, run: ModelRecord) -> int:
        """The command's id. While the same one is open, that one's: it is the same wish. Raises InvalidRequest."""
        values = {"of_pool": run.pool, "of_model": run.model_id, "of_kind": kind.value}

        def write(conn: sa.Connection) -> int:
            if (same := conn.execute(_SAME, values).scalar_one_or_none()) is not None:
                return int(same)
            if conn.execute(_NUM_OPEN, {"of_pool": run.pool}).scalar_one() >= MAX_OPEN_COMMANDS:
                raise InvalidRequest(f"{MAX_OPEN_COMMANDS} commands wait for the leader of pool {run.pool} already")
            now = self._clock()
            row = {
                "pool": run.pool,
                "kind": kind.value,
                "model_id": run.model_id,
                "created_by": author.actor,
                "created_at": now,
            }
            command_id = conn.execute(operator_commands.insert().returning(_c.command_id), row).scalar_one()
            after = {"command_id": command_id}
            add_change(conn, author, f"run.{kind.value}", f"run:{run.model_id}", before=None, after=after, now=now)
            return int(command_id)

        return await self._writer.run(write, after_commit=lambda _: self._events.announce_pool(run.pool))

    async def get(self, command_id: int) -> OperatorCommand | None:
        """The command, open or ended; None for one that was never given or is forgotten."""
        row = await self._database.read(lambda conn: conn.execute(_ONE, {"id": command_id}).one_or_none())
        return None if row is None else _command_of(row)

    async def open_of(self, pool: PoolName) -> list[OperatorCommand]:
        """A pool's commands that have not ended, in the order in which they were given."""
        rows = await self._database.read(lambda conn: conn.execute(_OPEN, {"of_pool": pool}).all())
        return [_command_of(row) for row in rows]

    async def end(self, lease: LeaseRecord, command_id: int, outcome: CommandOutcome) -> None:
        """Say how a command ended, as the leader of its pool. The first outcome stays. Raises Fenced."""
        words = f"{'done' if outcome.is_done else 'failed'}: {outcome.message}"

        def write(conn: sa.Connection) -> None:
            fence(conn, lease, ends_cycle=False)
            conn.execute(_END, {"id": command_id, "now": self._clock(), "words": words})

        await self._writer.run(write)

    async def forget(self, *, created_before: float) -> int:
        """Drop old ones, bounded: also open ones, whose pool nobody leads any more. How many went."""
        return await self._writer.run(lambda conn: conn.execute(_FORGET, {"before": created_before}).rowcount)


def _command_of(row: AnyRow) -> OperatorCommand:
    outcome = None
    if row.outcome is not None:
        verdict, _, message = row.outcome.partition(": ")
        outcome = CommandOutcome(is_done=verdict == "done", message=message)
    return OperatorCommand(
        command_id=row.command_id,
        pool=PoolName(row.pool),
        kind=CommandKind(row.kind),
        model_id=ModelId(row.model_id),
        created_by=row.created_by,
        created_at=row.created_at,
        done_at=row.done_at,
        outcome=outcome,
    )
