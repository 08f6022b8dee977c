"""Tenants' weight classes, as operators set them. It refuses to know what a class is worth.

Invariant: a tenant without a row is STANDARD, so the table holds only those that somebody set apart.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from treadle.domain.fairness import WeightClass
from treadle.domain.ids import TenantId
from treadle.store.engine import Database
from treadle.store.tables import tenants
from treadle.store.writer import Writer

_READ = sa.select(tenants.c.tenant_id, tenants.c.weight_class).order_by(tenants.c.tenant_id)
_FORGET = tenants.delete().where(tenants.c.tenant_id == sa.bindparam("of_tenant"))


class Tenants:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        insert = database.dialect.insert(tenants)
        self._set = insert.on_conflict_do_update(
            index_elements=[tenants.c.tenant_id],
            set_={name: insert.excluded[name] for name in ("weight_class", "updated_at")},
        )

    async def set_class(self, tenant_id: TenantId, weight_class: WeightClass) -> None:
        """Give a tenant, which need not have done anything yet, a class. Idempotent."""
        values = {"tenant_id": tenant_id, "weight_class": weight_class.value, "updated_at": self._clock()}
        if weight_class is WeightClass.STANDARD:
            await self._writer.run(lambda conn: conn.execute(_FORGET, {"of_tenant": tenant_id}).rowcount)
        else:
            await self._writer.run(lambda conn: conn.execute(self._set, values).rowcount)

    async def classes(self) -> dict[TenantId, WeightClass]:
        """The classes of all tenants that are not STANDARD: one row for each that an operator set apart."""
        rows = await self._database.read(lambda conn: conn.execute(_READ).all())
        return {TenantId(tenant_id): WeightClass(weight_class) for tenant_id, weight_class in rows}
