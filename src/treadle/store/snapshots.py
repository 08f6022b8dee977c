"""Snapshots: what a run's state is restored from, and how long the log behind them is kept.

The log is the run's DONE forward_backward and optim_step rows behind a snapshot. Loads are not in it, so a snapshot
in front of a load can never serve again. It refuses to know what a blob holds.
Invariants: a run keeps its two newest snapshots that can serve, and the payloads of the log behind the older of them;
what is older goes, and a blob's key is handed out for deletion only when no row names it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId
from treadle.domain.limits import MAX_PAGE_ROWS, MAX_RETIRED_ROWS
from treadle.domain.ops import OpKind
from treadle.domain.records import LeaseRecord, ReplayDebt, SnapshotRecord
from treadle.domain.states import ModelState, RequestState
from treadle.store.blob_names import named_among
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.leases import fence
from treadle.store.request_rows import IS_REPLAYED, chunks
from treadle.store.tables import AnyRow, models, payloads, requests, snapshots
from treadle.store.writer import Writer

# Blobs that only snapshots name. A checkpoint's blob that serves as a snapshot lies elsewhere and has its own life.
SNAPSHOT_PREFIX = "snapshots/"
# One to restore from, and one to fall back on when that cannot be read.
NUM_KEPT = 2
# No op of such a run ever runs again. A LOST run keeps what it has: an operator may find a way back.
STATES_OVER = frozenset({ModelState.FAILED, ModelState.UNLOADED})

_OF_MODEL = requests.c.model_id == sa.bindparam("of_model")
_BEHIND = requests.c.seq_id > sa.bindparam("after")

_NEWEST = (
    sa.select(*snapshots.c)
    .where(snapshots.c.model_id == sa.bindparam("of_model"))
    .order_by(snapshots.c.seq_id.desc())
    .limit(NUM_KEPT)
)
_OF_RUNS = (
    sa.select(snapshots.c.model_id, snapshots.c.seq_id, snapshots.c.blob_key)
    .where(snapshots.c.model_id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(snapshots.c.model_id, snapshots.c.seq_id.desc())
)
_RUNS = (
    sa.select(models.c.model_id, models.c.state, models.c.next_seq_id, models.c.retired_seq)
    .where(models.c.model_id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(models.c.model_id)
    # As an update that leaves the key alone would: a gateway that admits requests of these runs need not wait.
    .with_for_update(key_share=True)
)
_DELETE = snapshots.delete().where(
    snapshots.c.model_id == sa.bindparam("of_model"), snapshots.c.seq_id == sa.bindparam("of_seq")
)
_NEWEST_LOAD = sa.select(sa.func.max(requests.c.seq_id)).where(
    _OF_MODEL,
    _BEHIND,
    requests.c.kind == OpKind.LOAD_WEIGHTS.value,
    requests.c.state == RequestState.DONE.value,
)
RETIRABLE = (
    sa.select(requests.c.row_id, requests.c.seq_id, requests.c.payload_key)
    .where(_OF_MODEL, _BEHIND, requests.c.seq_id <= sa.bindparam("up_to"), IS_REPLAYED)
    .order_by(requests.c.seq_id)
    .limit(sa.bindparam("max_rows"))
)
_DROP_PAYLOAD = payloads.delete().where(payloads.c.row_id == sa.bindparam("of_row"))
_DROP_KEY = requests.update().where(requests.c.row_id == sa.bindparam("of_row")).values(payload_key=None)
_RETIRED = (
    models.update().where(models.c.model_id == sa.bindparam("of_model")).values(retired_seq=sa.bindparam("up_to"))
)
_RETAINED = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(requests.c.payload_bytes), 0)).where(
    _OF_MODEL,
    requests.c.seq_id
    > sa.select(models.c.retired_seq).where(models.c.model_id == sa.bindparam("of_model")).scalar_subquery(),
    IS_REPLAYED,
)
_IS_OVER = models.c.state.in_(sorted(state.value for state in STATES_OVER))
_WITH_BACKLOG = (
    sa.select(models.c.model_id)
    .outerjoin_from(models, snapshots, snapshots.c.model_id == models.c.model_id)
    .group_by(models.c.model_id)
    .having(
        sa.case(
            (_IS_OVER, sa.or_(sa.func.count(snapshots.c.seq_id) > 0, models.c.next_seq_id - 1 > models.c.retired_seq)),
            else_=sa.func.min(snapshots.c.seq_id) > models.c.retired_seq,
        )
    )
    .limit(sa.bindparam("max_rows"))
)


@dataclass(frozen=True, slots=True)
class Retired:
    """What one transaction retired: blobs that nobody names now, and whether there was too much for it."""

    unused_keys: list[BlobKey]
    is_cut: bool


class SnapshotRows:
    """The statements inside a write transaction; without state, safe to share."""

    def __init__(self, dialect: Dialect) -> None:
        insert = dialect.insert(snapshots)
        replaced = {column.name: insert.excluded[column.name] for column in snapshots.c if not column.primary_key}
        # The newer blob is the one that the leader knows, should an answer to the first have been lost.
        self._register = insert.on_conflict_do_update(
            index_elements=[snapshots.c.model_id, snapshots.c.seq_id], set_=replaced
        )

    def register(
        self,
        conn: sa.Connection,
        records: Sequence[SnapshotRecord],
        *,
        also: Collection[ModelId] = (),
        now: float,
    ) -> list[BlobKey]:
        """The keys of blobs that nobody names any more, once `records` are registered.

        Retires what their runs, and the runs `also`, need no more: at most MAX_RETIRED_ROWS payloads of each; the rest
        goes with its next registration or with `Snapshots.retire`. The ops in a snapshot are committed already, or in
        this transaction: from any other, a restore would apply its last ops twice.
        """
        model_ids = sorted({record.model_id for record in records}.union(also))
        if not model_ids:
            return []
        runs = _locked_runs(conn, model_ids)
        replaced: list[BlobKey] = []
        if records:
            next_seq_ids = {run.model_id: run.next_seq_id for run in runs}
            assert all(r.seq_id < next_seq_ids.get(r.model_id, 0) for r in records), (
                "a snapshot of what is not committed"
            )
            replaced = _replaced_keys(conn, records)
            conn.execute(self._register, [_row_of(record, now) for record in records])
        return _retire(conn, runs, replaced).unused_keys

    def retire(self, conn: sa.Connection, model_id: ModelId) -> Retired:
        """Drop what a run needs no more, without anything new."""
        return _retire(conn, _locked_runs(conn, [model_id]), [])


class Snapshots:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, rows: SnapshotRows) -> None:
        self._database = database
        self._writer = writer
        self._rows = rows

    async def newest(self, model_id: ModelId) -> tuple[SnapshotRecord, ...]:
        """What the run can be restored from: newest first, at most two, none when its state is beyond reach."""
        rows = await self._database.read(lambda conn: conn.execute(_NEWEST, {"of_model": model_id}).all())
        return tuple(_record_of(row) for row in rows)

    async def drop(self, lease: LeaseRecord, model_id: ModelId, seq_id: int) -> None:
        """Forget a snapshot that cannot be read. Raises Fenced. Idempotent; its blob, if any, is left to a sweep."""

        def write(conn: sa.Connection) -> None:
            fence(conn, lease, ends_cycle=False)
            conn.execute(_DELETE, {"of_model": model_id, "of_seq": seq_id})

        await self._writer.run(write)

    async def debt(self, model_id: ModelId) -> ReplayDebt:
        """What is kept so that this run's state can be made again."""

        def read(conn: sa.Connection) -> ReplayDebt:
            values = {"of_model": model_id}
            num_payloads, payload_bytes = conn.execute(_RETAINED, values).one()
            newest = tuple(_record_of(row) for row in conn.execute(_NEWEST, values))
            return ReplayDebt(newest, num_payloads=num_payloads, payload_bytes=int(payload_bytes))

        return await self._database.read(read)

    async def retire(self, max_runs: int = MAX_PAGE_ROWS) -> tuple[BlobKey, ...]:
        """Go on where commits had too much to retire; the keys of blobs to delete. For a sweep: it reads every run.

        Each transaction drops at most MAX_RETIRED_ROWS payloads. Any server may call it at any time: it drops only
        what no restore reads any more.
        """
        values = {"max_rows": max_runs}
        behind = await self._database.read(lambda conn: conn.execute(_WITH_BACKLOG, values).scalars().all())
        keys: list[BlobKey] = []
        for model_id in behind:
            is_cut = True
            while is_cut:
                retired = await self._writer.run(partial(self._rows.retire, model_id=model_id))
                keys += retired.unused_keys
                is_cut = retired.is_cut
        return tuple(keys)


def _retire(conn: sa.Connection, runs: Sequence[AnyRow], unused: Sequence[BlobKey]) -> Retired:
    """Drop what these runs need no more. `unused`: blobs that are not needed either, unless some row names them."""
    rows_of = {
        model_id: list(rows) for model_id, rows in groupby(_snapshots_of(conn, runs), key=lambda row: row.model_id)
    }
    snapshot_keys, payload_keys = list(unused), list[BlobKey]()
    is_cut = False
    for run in runs:
        rows = rows_of.get(run.model_id, [])
        kept = _kept(conn, run, rows)
        retired = rows[len(kept) :]
        if retired:
            conn.execute(_DELETE, [{"of_model": row.model_id, "of_seq": row.seq_id} for row in retired])
            snapshot_keys += [row.blob_key for row in retired if row.blob_key is not None]
        # Without a snapshot the log leads nowhere; but while the run lives, one may be on its way.
        up_to = kept[-1].seq_id if kept else run.next_seq_id - 1 if _is_over(run) else run.retired_seq
        if up_to > run.retired_seq:
            of_run = _retire_payloads(conn, run, up_to)
            payload_keys += of_run.unused_keys
            is_cut |= of_run.is_cut
    own_keys = [key for key in snapshot_keys if key.startswith(SNAPSHOT_PREFIX)]
    named = named_among(conn, own_keys) if own_keys else set()
    return Retired([*payload_keys, *(key for key in own_keys if key not in named)], is_cut)


def _kept(conn: sa.Connection, run: AnyRow, rows: Sequence[AnyRow]) -> Sequence[AnyRow]:
    """Those of a run's snapshots, newest first, that a restore may use. One that came late may be of no use."""
    if _is_over(run) or not rows:
        return ()
    # Behind it all payloads are there ...
    oldest_usable = run.retired_seq
    if run.next_seq_id > rows[-1].seq_id + 1:
        # ... and no load, which would be missing from its log.
        newest_load = conn.execute(_NEWEST_LOAD, {"of_model": run.model_id, "after": rows[-1].seq_id}).scalar_one()
        oldest_usable = max(oldest_usable, newest_load or 0)
    return [row for row in rows[:NUM_KEPT] if row.seq_id >= oldest_usable]


def _is_over(run: AnyRow) -> bool:
    return ModelState(run.state) in STATES_OVER


def _retire_payloads(conn: sa.Connection, run: AnyRow, up_to: int) -> Retired:
    """Drop payloads of the log up to this op."""
    values = {"of_model": run.model_id, "after": run.retired_seq, "up_to": up_to, "max_rows": MAX_RETIRED_ROWS + 1}
    rows = conn.execute(RETIRABLE, values).all()
    is_cut = len(rows) > MAX_RETIRED_ROWS
    if is_cut:
        rows = rows[:MAX_RETIRED_ROWS]
        up_to = rows[-1].seq_id
    inline = [{"of_row": row.row_id} for row in rows if row.payload_key is None]
    if inline:
        conn.execute(_DROP_PAYLOAD, inline)
    large = [row for row in rows if row.payload_key is not None]
    if large:
        conn.execute(_DROP_KEY, [{"of_row": row.row_id} for row in large])
    conn.execute(_RETIRED, {"of_model": run.model_id, "up_to": up_to})
    return Retired([BlobKey(row.payload_key) for row in large], is_cut)


def _replaced_keys(conn: sa.Connection, records: Sequence[SnapshotRecord]) -> list[BlobKey]:
    """Blobs that were registered for the very ops of these records."""
    known = {(row.model_id, row.seq_id): row.blob_key for row in _snapshots_of(conn, records)}
    found = ((record, known.get((record.model_id, record.seq_id))) for record in records)
    return [key for record, key in found if key not in (None, record.blob_key)]


def _locked_runs(conn: sa.Connection, model_ids: Sequence[ModelId]) -> list[AnyRow]:
    """The runs, by id. Locked, so that of two who retire one run the second sees what the first did."""
    return [row for chunk in chunks(model_ids) for row in conn.execute(_RUNS, {"ids": chunk})]


def _snapshots_of(conn: sa.Connection, of: Sequence[AnyRow | SnapshotRecord]) -> list[AnyRow]:
    """All snapshots of these runs, by run, newest first."""
    model_ids = sorted({one.model_id for one in of})
    return [row for chunk in chunks(model_ids) for row in conn.execute(_OF_RUNS, {"ids": chunk})]


def _row_of(record: SnapshotRecord, now: float) -> dict[str, Any]:
    return {
        "model_id": record.model_id,
        "seq_id": record.seq_id,
        "blob_key": record.blob_key,
        "with_optimizer": record.with_optimizer,
        "num_bytes": record.num_bytes,
        "numerics_profile": record.numerics_profile,
        "created_at": now,
    }


def _record_of(row: AnyRow) -> SnapshotRecord:
    return SnapshotRecord(
        model_id=ModelId(row.model_id),
        seq_id=row.seq_id,
        blob_key=None if row.blob_key is None else BlobKey(row.blob_key),
        with_optimizer=row.with_optimizer,
        num_bytes=row.num_bytes,
        numerics_profile=row.numerics_profile,
        created_at=row.created_at,
    )
