"""What each pool's worker holds, as its leader reports it, for operators on any server.

It refuses to know what holding means. Invariant: only the leader writes (`fence`), and what a leader before said is
never taken for what the worker of now holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.records import LeaseRecord
from treadle.store.engine import Database
from treadle.store.leases import fence
from treadle.store.tables import control
from treadle.store.writer import Writer

_GET = sa.select(control.c.value, control.c.updated_at).where(control.c.name == sa.bindparam("of_name"))


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker, or the place of one that is being replaced. role, state: of domain/roles.py and scheduler/slot.py."""

    name: str
    role: str
    state: str
    reason: str = ""
    num_tenants: int = 0
    num_runs: int = 0
    num_samples: int = 0
    num_deaths: int = 0


@dataclass(frozen=True, slots=True)
class Slots:
    """What a pool's workers hold: runs, and sample requests per tenant; and how each of them is."""

    model_ids: Sequence[ModelId] = ()
    num_samples: Mapping[TenantId, int] = field(default_factory=dict)
    workers: Sequence[WorkerReport] = ()


_WORKER_FIELDS = frozenset(one.name for one in fields(WorkerReport))


@dataclass(frozen=True, slots=True)
class SlotsReport:
    """What the leader of now said. reported_at: when; None: it has said nothing yet."""

    slots: Slots
    reported_at: float | None


class SlotReports:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        insert = database.dialect.insert(control)
        self._put = insert.on_conflict_do_update(
            index_elements=[control.c.name],
            set_={name: insert.excluded[name] for name in ("version", "value", "updated_at")},
        )

    async def publish(self, lease: LeaseRecord, slots: Slots) -> None:
        """Say what the worker holds, as its leader. Raises Fenced."""
        values = {
            "name": _name(lease.pool),
            "version": lease.token,
            "value": {
                "runs": list(slots.model_ids),
                "samples": dict(slots.num_samples),
                "workers": [asdict(worker) for worker in slots.workers],
            },
            "updated_at": self._clock(),
        }

        def write(conn: sa.Connection) -> None:
            fence(conn, lease, ends_cycle=False)
            conn.execute(self._put, values)

        await self._writer.run(write)

    async def report(self, lease: LeaseRecord) -> SlotsReport:
        """What the holder of this lease said last."""
        statement = _GET.where(control.c.version == lease.token)
        values = {"of_name": _name(lease.pool)}
        row = await self._database.read(lambda conn: conn.execute(statement, values).one_or_none())
        if row is None:
            return SlotsReport(Slots(), None)
        said = row.value
        # A leader of another version may say less, or more.
        workers = [WorkerReport(**_known(worker)) for worker in said.get("workers", ())]
        slots = Slots([ModelId(id_) for id_ in said["runs"]], dict(said["samples"]), workers)
        return SlotsReport(slots, row.updated_at)


def _known(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name in _WORKER_FIELDS}


def _name(pool: PoolName) -> str:
    return f"slots:{pool}"
