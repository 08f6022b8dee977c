"""The start of every line of a pool, at a price that depends on the number of lines and not on their length.

Lines are found by skipping through the index from one run to the next. With many of them only the first few ops of each
are read, and rows that were read before are not read again: a row does not change while it is in line.
Invariants: no line is left out for long, however many there are; whoever has a hole in what was read of it is read to
the full depth, because what ends the wait for a hole may lie behind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import PoolName
from treadle.domain.limits import MAX_HEAD_ROWS, MAX_HEADS_PER_MODEL, MAX_IDS_PER_QUERY
from treadle.domain.records import RequestRecord
from treadle.store.engine import Database
from treadle.store.tables import IS_IN_LINE, models, requests

# Up to so many rows in all, lines are read to their full depth, in one query.
FEW_ROWS = 1_024
# Rows that are read beyond that. A cycle runs far fewer, and planning looks at each of them.
MANY_ROWS = 2_048
# Of each line at least a pass and its step, so that they can run in one cycle.
MIN_DEPTH = 2
# With more lines than this, one part of them is read after the other.
MAX_LINES = MAX_HEAD_ROWS // MIN_DEPTH
# Lines with a hole that are read to their full depth in one go.
MAX_HOLES_PER_READ = 32

_r = requests.c
_OF_POOL = _r.pool == sa.bindparam("of_pool")


def _lines() -> sa.CTE:
    """The runs that have a line, in order of their ids, behind the run `after`."""
    first = sa.select(sa.func.min(_r.model_id).label("model_id")).where(
        _OF_POOL, IS_IN_LINE, _r.model_id > sa.bindparam("after")
    )
    lines = first.cte("lines", recursive=True)
    following = sa.select(sa.func.min(_r.model_id)).where(_OF_POOL, IS_IN_LINE, _r.model_id > lines.c.model_id)
    return lines.union_all(sa.select(following.correlate(lines).scalar_subquery()).where(lines.c.model_id.is_not(None)))


def _starts() -> sa.Subquery:
    """Of each line behind `after`: its run, the number that the run needs next, and the last one that is read."""
    lines, ops = _lines(), requests.alias("ops")
    last = (
        sa.select(ops.c.seq_id)
        .where(ops.c.pool == sa.bindparam("of_pool"), ops.c.in_line.is_(sa.true()))
        .where(ops.c.model_id == lines.c.model_id)
        .order_by(ops.c.seq_id)
        .limit(1)
        .offset(sa.bindparam("num_before_last"))
        .scalar_subquery()
    )
    needed = sa.select(models.c.next_seq_id).where(models.c.model_id == lines.c.model_id).scalar_subquery()
    # A line that ends before is read whole.
    largest: sa.ColumnClause[int] = sa.literal_column(str(2**63 - 1))
    return (
        sa.select(lines.c.model_id, sa.func.coalesce(last, largest).label("last_seq_id"), needed.label("next_seq_id"))
        .where(lines.c.model_id.is_not(None))
        .limit(sa.bindparam("max_lines"))
        .subquery("starts")
    )


def _heads(*columns: sa.ColumnElement[Any], with_next: bool = False) -> sa.Select[tuple[Any, ...]]:
    starts = _starts()
    return (
        sa.select(*columns, *([starts.c.next_seq_id] if with_next else []))
        .join_from(starts, requests, _r.model_id == starts.c.model_id)
        .where(_OF_POOL, IS_IN_LINE, _r.seq_id <= starts.c.last_seq_id)
        .order_by(_r.model_id, _r.seq_id)
        .limit(sa.bindparam("max_rows"))
    )


def _line_ids() -> sa.Select[tuple[Any, ...]]:
    lines = _lines()
    return sa.select(lines.c.model_id).where(lines.c.model_id.is_not(None)).limit(sa.bindparam("max_lines"))


LINES = _line_ids()
HEAD_IDS = _heads(_r.model_id, _r.seq_id, _r.row_id, with_next=True)
WHOLE_LINE = (
    sa.select(_r.row_id)
    .where(_OF_POOL, _r.model_id == sa.bindparam("of_model"), IS_IN_LINE)
    .order_by(_r.seq_id)
    .limit(sa.bindparam("per_model"))
)


@dataclass(slots=True)
class _Memory:
    """What is remembered of one pool between readings. records: of the rows that were in line the last time.

    is_long: it takes more than one query. after: the last run of the window, when there are too many for one.
    """

    is_long: bool = False
    after: str = ""
    records: Mapping[int, RequestRecord] = field(default_factory=dict)


class Heads:
    """Reads lines. One reader per pool at a time."""

    def __init__(
        self,
        database: Database,
        *,
        columns: Sequence[sa.ColumnElement[Any]],
        record_of: Callable[[Any], RequestRecord],
    ) -> None:
        """columns: of a request, as `record_of` takes them."""
        self._database = database
        self._record_of = record_of
        self._all_at_once = _heads(*columns)
        self._by_id = sa.select(_r.row_id, *columns).where(_r.row_id.in_(sa.bindparam("ids", expanding=True)))
        self._memories: dict[PoolName, _Memory] = {}

    async def read(self, pool: PoolName, per_model: int) -> list[tuple[RequestRecord, ...]]:
        """Per run with a line, in order of their ids, its first ops by seq_id: `per_model`, or fewer of many lines."""
        assert 0 < per_model <= MAX_HEADS_PER_MODEL, per_model
        memory = self._memories.setdefault(pool, _Memory())
        records = await self._database.read(lambda conn: self._read(conn, pool, per_model, memory))
        return [tuple(line) for _model_id, line in groupby(records, key=lambda record: record.model_id)]

    def _read(self, conn: sa.Connection, pool: PoolName, per_model: int, memory: _Memory) -> list[RequestRecord]:
        if not memory.is_long:
            values = {"of_pool": pool, "after": "", "num_before_last": per_model - 1}
            rows = conn.execute(self._all_at_once, values | {"max_lines": FEW_ROWS, "max_rows": FEW_ROWS}).all()
            if len(rows) < FEW_ROWS:
                return [self._record_of(row) for row in rows]
        row_ids = self._row_ids(conn, pool, per_model, memory)
        records = self._records(conn, row_ids, memory.records)
        memory.is_long = len(row_ids) >= FEW_ROWS // 2
        memory.records = records if memory.is_long else {}
        return [records[row_id] for row_id in row_ids if row_id in records]

    def _row_ids(self, conn: sa.Connection, pool: PoolName, per_model: int, memory: _Memory) -> list[int]:
        """Rows to be handed out, line by line."""
        windows = self._next_windows(conn, pool, memory)
        num_lines_in_all = sum(num_lines for _, num_lines in windows)
        depth = min(per_model, max(MIN_DEPTH, MANY_ROWS // max(1, num_lines_in_all)))
        lines: dict[str, list[int]] = {}
        with_holes: set[str] = set()
        for after, num_lines in windows:
            values = {"of_pool": pool, "after": after, "num_before_last": depth - 1, "max_lines": num_lines}
            expected = 0
            for model_id, seq_id, row_id, next_seq_id in conn.execute(HEAD_IDS, values | {"max_rows": MAX_HEAD_ROWS}):
                line = lines.get(model_id)
                if line is None:
                    line = lines[model_id] = []
                    expected = next_seq_id
                if seq_id != expected:
                    with_holes.add(model_id)
                line.append(row_id)
                expected = seq_id + 1
        if depth < per_model:
            # One that is shorter was read whole.
            self._deepen(conn, pool, per_model, lines, sorted(id_ for id_ in with_holes if len(lines[id_]) == depth))
        return [row_id for line in lines.values() for row_id in line]

    def _deepen(
        self, conn: sa.Connection, pool: PoolName, per_model: int, lines: dict[str, list[int]], with_holes: list[str]
    ) -> None:
        """Read those with holes further, as many as there is time for, not always the same ones."""
        if len(with_holes) > MAX_HOLES_PER_READ:
            with_holes = random.sample(with_holes, MAX_HOLES_PER_READ)
        for model_id in with_holes:
            values = {"of_pool": pool, "of_model": model_id, "per_model": per_model}
            lines[model_id] = [row.row_id for row in conn.execute(WHOLE_LINE, values)] or lines[model_id]

    def _next_windows(self, conn: sa.Connection, pool: PoolName, memory: _Memory) -> list[tuple[str, int]]:
        """What to read now: so many lines behind this run. All lines, or the next ones round and round."""
        windows: list[tuple[str, int]] = []
        num_left, last = MAX_LINES, ""
        for after in (memory.after, "") if memory.after else ("",):
            values = {"of_pool": pool, "after": after, "max_lines": num_left}
            lines = [id_ for id_ in conn.execute(LINES, values).scalars() if after or id_ <= (memory.after or id_)]
            if lines:
                windows.append((after, len(lines)))
                num_left, last = num_left - len(lines), lines[-1]
            if num_left == 0:
                break
        memory.after = "" if num_left else last
        return windows

    def _records(
        self, conn: sa.Connection, row_ids: Sequence[int], known: Mapping[int, RequestRecord]
    ) -> dict[int, RequestRecord]:
        """The records of these rows; read are those that were not in line the last time."""
        records = {row_id: known[row_id] for row_id in row_ids if row_id in known}
        new = [row_id for row_id in row_ids if row_id not in known]
        assert len(new) <= MAX_IDS_PER_QUERY
        for row in conn.execute(self._by_id, {"ids": new}) if new else ():
            records[row.row_id] = self._record_of(row[1:])
        return records
