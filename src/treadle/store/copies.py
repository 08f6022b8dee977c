"""Copies of checkpoints: names of blobs that another name has already, each under a run of its own.

It refuses to touch blobs and to judge who may read what. Invariant: a copy, its run and its audit event come into being
together, and only while the source still has the blob; from then on neither needs the other.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from treadle.domain.ids import op_request_id
from treadle.domain.records import CheckpointRecord, ModelRecord
from treadle.errors import InvalidRequest, NotFound
from treadle.store import audit
from treadle.store.checkpoints import event_of, row_of
from treadle.store.engine import Database
from treadle.store.models import row_of as run_row_of
from treadle.store.quotas import SaveLimits, no_room_for
from treadle.store.tables import checkpoints, models
from treadle.store.writer import Writer

_RUN = sa.select(models.c.state, models.c.state_message).where(models.c.model_id == sa.bindparam("id"))
_SOURCE = (
    sa.select(sa.literal(1))
    .where(checkpoints.c.tinker_path == sa.bindparam("path"), checkpoints.c.blob_key == sa.bindparam("key"))
    # A sweep that takes the source away at the same time must see this copy, or find nothing: it deletes the blob.
    .with_for_update()
)
_ADD = checkpoints.insert()


class Copies:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._writer = writer
        self._clock = clock
        self._dialect = database.dialect
        self._insert_run = (
            database.dialect.insert(models)
            .on_conflict_do_nothing(index_elements=[models.c.model_id])
            .returning(models.c.model_id)
        )

    async def add(self, run: ModelRecord, copy: CheckpointRecord, *, limits: SaveLimits | None = None) -> None:
        """Make `run`, which nothing can train, and `copy` of `copy.copied_from` in it.

        The same copy into the same run again changes nothing, even when it was deleted meanwhile. Raises InvalidRequest
        when the run's id is taken by anything else or `limits` leave no room, NotFound when the source is gone.
        """
        assert copy.model_id == run.model_id
        assert copy.copied_from is not None

        def write(conn: sa.Connection) -> None:
            values = run_row_of(run) | {"create_request_id": op_request_id(run.model_id, 0)}
            if conn.execute(self._insert_run, values).one_or_none() is None:
                _check_replay(conn, run)
                return
            source = {"path": copy.copied_from, "key": copy.blob_key}
            if conn.execute(_SOURCE, source).one_or_none() is None:
                raise NotFound(f"checkpoint {copy.copied_from!r} does not exist")
            if limits is not None and (reason := no_room_for(conn, self._dialect, copy, limits, self._clock())):
                raise InvalidRequest(reason)
            conn.execute(_ADD, row_of(copy))
            event = event_of(
                "checkpoint_copy",
                copy.tenant_id,
                path=copy.tinker_path,
                model_id=copy.model_id,
                now=self._clock(),
                source_path=copy.copied_from,
                expires_at=copy.expires_at,
            )
            audit.add(conn, [event])

        await self._writer.run(write)


def _check_replay(conn: sa.Connection, run: ModelRecord) -> None:
    """Raises InvalidRequest unless the run that is there says of itself what this one does."""
    first = conn.execute(_RUN, {"id": run.model_id}).one()
    if (first.state, first.state_message) != (run.state.value, run.state_message):
        raise InvalidRequest(f"model {run.model_id} exists and holds something else; copy under another model_seq_id")
